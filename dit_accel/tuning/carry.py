"""Carry: whether a block plan also serves the other branches of guidance, or the steps behind its own.

Errors are measured with a plan for every branch and step. Branches that read the same blocks go wrong alike, and
guidance multiplies only what they do not have in common (docs/methods.md); a plan of the step before saves predicting
one. How that turns out is not predicted: real runs of the clips tuned on decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_accel.tuning.results import Carried, Entrant

# each beside what was taken of those before it; a plan that serves more steps is not tried where fewer cost too much
WAYS = {"share_plans": True}, {"predict_every": 2}, {"predict_every": 4}
SLACK = 0.05  # dB: what may be lost for predictions that are saved
_CLOSE = 1e-6


def carry(start: Entrant, run: Callable[[Mapping[str, Any]], tuple[float, float]]) -> tuple[Carried, ...]:
    """What was tried, in turn.

    Args:
        start: with a plan for every branch and step.
        run: gives the PSNR in dB and the computed time that these options have on the clips tuned on.
    """
    found: list[Carried] = []
    options: Mapping[str, Any] = {}
    figure = start.psnr
    for more in WAYS:
        asked = {**options, **more}
        psnr, cost = run(asked)
        taken = psnr >= figure - SLACK and cost <= start.cost + _CLOSE
        found.append(Carried(asked, cost, psnr, taken))
        if taken:
            options, figure = asked, max(figure, psnr)
        elif "predict_every" in more:
            break
    return tuple(found)


def chosen_of(tried: Sequence[Carried]) -> Mapping[str, Any]:
    """The options that are taken; none where a plan for every branch and step is best."""
    return next((one.options for one in reversed(tried) if one.taken), {})


def describe(options: Mapping[str, Any]) -> str:
    """In words, to stand behind what they are options of; nothing where plans are not carried over."""
    shared = ", one plan for all branches" if options.get("share_plans") else ""
    every = options.get("predict_every", 1)
    return shared + (f", a plan every {every} steps" if every > 1 else "")
