"""Which steps compute every token. No torch here: a run's plan can be shown before it."""

from __future__ import annotations

import math

from dit_accel.region.options import Region


def whole_steps(region: Region, n_steps: int) -> dict[int, str]:
    """Steps of a run that compute every token, each with its reason.

    The first one always does, for there is nothing yet to leave out; and the last one, whose errors nothing corrects.
    Resets beyond the end fall away.
    """
    found = dict.fromkeys(range(max(1, _step_at(region.start, n_steps))), "before region sampling starts")
    for reset in region.error_reset:
        found.setdefault(_step_at(reset, n_steps), "error reset")
    found.setdefault(n_steps - 1, "the last step")
    return {step: reason for step, reason in sorted(found.items()) if step < n_steps}


def count_active(region: Region, n_tokens: int) -> int:
    """How many tokens are computed at a step: whole buckets, at least one of them, at most all tokens."""
    buckets = math.ceil(region.sample_ratio * n_tokens / region.bucket - 1e-9)  # .1 of 640 is 64, not 64.00000000000001
    return min(n_tokens, max(1, buckets) * region.bucket)


def _step_at(given: int | float, n_steps: int) -> int:
    return round(given * n_steps) if isinstance(given, float) else given
