"""TeaCache: a polynomial of how much the first block's modulated input changes, added up since the step computed
last.

Source: arXiv 2411.19108. Two signals: `"modulated"`, the first block's input behind its first norm and modulation
(FLUX.1, HunyuanVideo), and `"time"`, the projected time embedding that every block is given (Wan; the coefficients
fitted to it are those published for `use_ret_steps`). The change is measured against the step *before*, made up or
not. Several published polynomials are negative within their range, where the sum would run away: they are clamped at
zero. Coefficients belong to a model, size and number of steps; a fine-tuned one needs its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.caches import cache as base
from dit_accel.caches.cache import Parts, View, need, number
from dit_accel.errors import UsageError, unknown_name

# the highest power first
COEFFICIENTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "flux": ("modulated", (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)),
    "hunyuan-video": ("modulated", (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)),
    "ltx": ("modulated", (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)),
    "wan21-1.3b": ("time", (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664)),
    "wan21-14b": ("time", (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)),
    "wan21-i2v-480p": ("time", (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977)),
    "wan21-i2v-720p": ("time", (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401)),
}
SIGNALS = ("modulated", "time")


@dataclass(frozen=True)
class Cache(base.StepCache):
    """All blocks, an accumulated polynomial, what was added is held."""

    boundary: ClassVar[str] = "stack"

    threshold: float = 0.1
    model: str | None = None  # whose published coefficients; or:
    coefficients: tuple[float, ...] = ()  # the highest power first
    signal: str | None = None  # "modulated" or "time"; none: the model's

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "coefficients", tuple(self.coefficients))
        need(all(map(number, self.coefficients)), "coefficients", self.coefficients, "numbers, the highest power first")
        if self.model is not None and self.model not in COEFFICIENTS:
            raise unknown_name("model of cache 'tea'", self.model, COEFFICIENTS)
        if (self.model is None) == (not self.coefficients):
            raise UsageError(f"cache 'tea' needs either model (one of {', '.join(COEFFICIENTS)}) or coefficients.")
        need(self.signal in (None, *SIGNALS), "signal", self.signal, "'modulated' or 'time'")
        if self.model is None and self.signal is None:
            raise UsageError("cache 'tea' with coefficients of your own needs signal = 'modulated' or 'time'.")

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        from dit_accel.caches.parts.measures import relative_l1, worst

        now, before = self._signal(view), memory["signal"]
        memory["signal"] = now
        published = () if self.model is None else COEFFICIENTS[self.model][1]
        change, error = worst(relative_l1(now, before)), 0.0
        for coefficient in self.coefficients or published:
            error = error * change + coefficient
        memory["error"] += max(error, 0.0)
        return memory["error"]

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        return memory["added"]

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        if "signal" not in memory:  # `judge` has set it since
            memory["signal"] = self._signal(view)
        memory["added"], memory["error"] = parts, 0.0

    def kept(self) -> dict[str, int]:
        signal = {"hidden": 2} if self._kind == "modulated" else {"hidden": 1, "time": 1}
        return {**signal, "text": 1}

    @property
    def _kind(self) -> str:
        return self.signal or COEFFICIENTS[self.model][0]

    def _signal(self, view: View) -> Any:
        arguments = view.arguments
        if self._kind == "time":
            if arguments.get("temb") is None:
                raise UsageError(f"cache 'tea': {_block_of(view)} is given no temb; use signal = 'modulated'.")
            return arguments["temb"].detach().clone()
        if not hasattr(view.block, "norm1"):
            raise UsageError(f"cache 'tea': {_block_of(view)} has no norm1 that modulates; use signal = 'time'.")
        modulated = view.block.norm1(view.x, emb=arguments["temb"])
        return (modulated[0] if isinstance(modulated, tuple) else modulated).detach()


def _block_of(view: View) -> str:
    return type(view.block).__name__
