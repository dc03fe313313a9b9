"""Schedules: what was decided at each step, as text that is kept and replayed.

A digit a step, 1 computes and 0 reuses: `"1101"`. Where branches of guidance decided differently, one for each:
`"cond=1101; uncond=1111"`.
"""

from __future__ import annotations

import re

_DIGITS = re.compile(r"1[01]*")


def parse_schedule(text: str) -> dict[str | None, str]:
    """Digits by branch; those of None hold for every branch.

    Raises:
        ValueError: anything else.
    """
    plans: dict[str | None, str] = {}
    for part in text.split(";"):
        name, named, digits = part.rpartition("=")
        branch, digits = name.strip() if named else None, digits.strip()
        if not _DIGITS.fullmatch(digits) or branch in plans or branch == "":
            raise ValueError(text)
        plans[branch] = digits
    if None in plans and len(plans) > 1:
        raise ValueError(text)
    return plans


class Decisions:
    """Which forwards of a run were computed, by branch and step."""

    def __init__(self) -> None:
        self._computed: dict[str | None, dict[int, bool]] = {}

    def note(self, branch: str | None, step: int, computed: bool) -> None:
        """Of several forwards of one branch in a step, one that is computed counts."""
        steps = self._computed.setdefault(branch, {})
        steps[step] = steps.get(step, False) or computed

    def clear(self) -> None:
        self._computed.clear()

    def text(self) -> str:
        """The schedule that repeats them; empty before the first step.

        Steps before the first that ran (another transformer's) are computed ones: a schedule begins with such. Others
        that none ran are reused ones where branches agree; of a branch by itself they are computed ones: so is the
        first that comes after them.
        """
        branches = self._computed.values()
        n = 1 + max((step for steps in branches for step in steps), default=-1)
        first = min((step for steps in branches for step in steps), default=0)
        seen = [{steps[i] for steps in branches if i in steps} for i in range(n)]
        if all(len(found) < 2 for found in seen):
            return "".join("01"[i < first or True in found] for i, found in enumerate(seen))
        return "; ".join(
            f"{branch}={''.join('01'[steps.get(i, True)] for i in range(n))}"
            for branch, steps in self._computed.items()
            if branch is not None
        )
