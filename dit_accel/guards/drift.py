"""Drift: a few rows of sparse attention beside dense attention every few steps, and more key blocks where they differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.methods import method_class, method_names

if TYPE_CHECKING:
    from dit_accel.options import SparseOptions
    from dit_accel.planner import Planner
    from dit_accel.report import Tally
    from dit_accel.trajectory import Call

ROWS = 64  # query tokens that are looked at in a call
LAYERS = 4  # about so many layers are looked at in a forward, others the next time
RAISE = 1.5  # keep grows by so much at a time


class Drift:
    """Compares sparse with dense attention, and raises keep for the rest of the run where they are too far apart.

    The image's or video's tokens are looked at, evenly spaced; the error is |sparse - dense| / |dense| over these, the
    worst of the batch's rows. Keep is raised for one branch of guidance at a time (for all where they share plans), at
    most once a step, and never above 1.

    Args:
        options: what was asked for.
        planner: raises keep.

    Raises:
        UsageError: a method that has no keep, or was given none.
    """

    def __init__(self, options: SparseOptions, planner: Planner) -> None:
        self._every, self._limit, self._planner = options.drift_every, options.drift_limit, planner
        if getattr(planner.method, "keep", None) is None:
            given = type(planner.method).__module__.rpartition(".")[2]
            fit = [name for name in method_names() if "keep" in {f.name for f in fields(method_class(name))}]
            raise UsageError(
                f"drift_every={self._every} raises keep where attention drifts, and method {given!r} has none "
                f"here: give keep= to one of {', '.join(fit)}, or leave drift_every and drift_limit out."
            )

    def watch(
        self, out: Tensor, dense: Callable[[Tensor], Tensor], query: Tensor, now: Call, tally: Tally
    ) -> None:
        """Look at a call, if it is one's turn; waits for the device then.

        Args:
            out: `[B, S, H, D]`, sparse attention of `query`.
            dense: attends with some of the queries.
        """
        stride = -(-now.n_layers // LAYERS)
        turn, off = divmod(now.step, self._every)
        if off or now.layer % stride != turn % stride:
            return
        rows = _rows(now, query)
        if rows is None:
            return
        error = _apart(out[:, rows], dense(query[:, rows]))
        place = self._planner.place(now)
        tally.note_drift(place, error)
        if error > self._limit:
            raised = self._planner.raise_keep(now, RAISE)
            if raised is not None:
                tally.guards[f"keep raised to {raised:.3g} for {place}"] += 1

    def __deepcopy__(self, memo: dict) -> Drift:
        new = memo[id(self)] = object.__new__(type(self))
        new._every, new._limit = self._every, self._limit
        new._planner = copy.deepcopy(self._planner, memo)
        return new


def _rows(now: Call, query: Tensor) -> Tensor | None:
    """Places of the tokens that are looked at, int64 [rows]; None where the queries are a part of the tokens."""
    first, end = next((first, end) for name, first, end in now.segments if name == "video")
    if query.shape[1] < end:
        return None
    return torch.linspace(first, end - 1, min(ROWS, end - first), device=query.device).round().long()


def _apart(out: Tensor, true: Tensor) -> float:
    """|out - true| / |true|, the worst of the batch."""
    out, true = out.float().flatten(1), true.float().flatten(1)
    size = true.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((out - true).norm(dim=1) / size).max())
