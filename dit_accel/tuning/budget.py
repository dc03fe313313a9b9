"""Budget: what a tuned preset may cost in likeness, or in time. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dit_accel.errors import UsageError

# name -> the sign that belongs to it, and what it is
KINDS = {
    "psnr": (">=", "dB against dense, from 10 to 80"),
    "time": ("<=", "a share of dense's computed time, above 0 and below 1"),
    "error": ("<=", "the relative error of the velocity, above 0 and below 1"),
}
_FORM = re.compile(r"\s*(psnr|time|error)\s*(>=|<=)\s*([0-9.eE+-]+)\s*")


@dataclass(frozen=True)
class Budget:
    """A bound on one figure of held-out clips.

    `psnr` is the mean over clips of the PSNR in dB of the frames against dense, `time` the computed time as a share of
    dense's (what ran, by the seconds measured of each kind of forward, whatever the machine does meanwhile), `error`
    the root mean square over steps of |v - v_dense| / |v_dense|, v being the velocity that the scheduler is given.
    """

    kind: str
    limit: float

    def met_by(self, figure: float) -> bool:
        return figure >= self.limit if self.kind == "psnr" else figure <= self.limit

    def better(self, one: float, other: float) -> bool:
        """Whether the first figure is the nearer to meeting it."""
        return one > other if self.kind == "psnr" else one < other

    def show(self, figure: float) -> str:
        return f"{self.kind} {figure:.2f} dB" if self.kind == "psnr" else f"{self.kind} {figure:.4g}"

    def __str__(self) -> str:
        return f"{self.kind}{KINDS[self.kind][0]}{self.limit:g}"


def parse_budget(text: str) -> Budget:
    """`psnr>=30`, `time<=0.5` or `error<=0.05`.

    Raises:
        UsageError: anything else.
    """
    match = _FORM.fullmatch(text)
    if match:
        kind, sign, digits = match.groups()
        try:
            limit = float(digits)
        except ValueError:
            limit = math.nan
        low, high = (10, 80) if kind == "psnr" else (0, 1)
        fits = low <= limit <= high if kind == "psnr" else low < limit < high
        if sign == KINDS[kind][0] and fits:
            return Budget(kind, limit)
    allowed = ", ".join(f"{kind}{sign}X ({what})" for kind, (sign, what) in KINDS.items())
    raise UsageError(f"--budget {text!r} is no budget: write one of {allowed}; quote it, or the shell takes the sign")
