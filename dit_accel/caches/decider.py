"""Decider: when a step cache computes, and when it makes up. It keeps, and counts, and knows no host.

`CacheEngine` puts it into diffusers, `integrations/comfyui` into ComfyUI.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.caches.cache import NEVER, Cache, Parts, View
from dit_accel.caches.memory import Entry, Memory
from dit_accel.caches.off import Off
from dit_accel.caches.parts.measures import relative_l1, worst
from dit_accel.caches.schedule import Decisions, parse_schedule
from dit_accel.caches.trials import Trial
from dit_accel.report import Tally
from dit_accel.trajectory import Call, Trajectory


@dataclass
class Verdict:
    """What was decided about one forward, and what comes of it if it returns."""

    call: Call
    reuse: bool
    reason: str = ""  # why it is computed
    entry: Entry | None = None  # None: nothing of this forward is kept
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    expected: float = NEVER  # the error, where it was judged


class Decider:
    """The decisions of one transformer's step cache.

    Args:
        cache: what is kept, and when it serves; `Off` has forwards counted alone.
        trajectory: the clock; whoever constructs this has `begin` called at each new run.
        tally: what ran.
        role: which transformer of the pipeline this is.
    """

    def __init__(self, cache: Cache, trajectory: Trajectory, tally: Tally, role: str) -> None:
        self.cache, self.trajectory, self.tally, self.role = cache, trajectory, tally, role
        self.trials: list[Trial] = []
        self.decisions = Decisions()  # of the latest run
        self._plans = None if cache.schedule is None else parse_schedule(cache.schedule)
        self.memory = Memory(cache.store_device)
        self._shared: tuple[int, bool] | None = None  # what the first branch of a step decided

    def bytes_held(self) -> int:
        """Memory kept between forwards."""
        return self.memory.bytes_held()

    def decide(self, view: View) -> Verdict:
        """Whether the forward under way is computed, and why."""
        call, cache = view.call, self.cache
        why = self._why_apart(call)
        if why is not None:
            return Verdict(call, False, why)
        signature = self._signature(view)
        entry = self.memory.entry(call.branch, signature)
        if entry is not None and call.step == entry.step:
            return Verdict(call, False, "a second forward of the branch in one step")
        if entry is None or call.step - entry.step > 1:
            reason = "the branch's first step" if entry is None else "the branch was away"
            return Verdict(call, False, reason, Entry(signature))
        verdict = Verdict(call, False, "", entry, self._load(entry, view))
        if self._plans is None:
            verdict.expected = cache.judge(view, verdict.memory)
        limited = self._why_limited(call, entry)
        verdict.reason = limited or self._why_judged(verdict)
        if cache.shared and not cache.dry_run and self._plans is None:
            self._share(verdict, bool(limited))
        verdict.reuse = not verdict.reason
        if verdict.reuse and cache.dry_run:
            verdict.reuse, verdict.reason = False, "dry run"
        return verdict

    def _why_apart(self, call: Call) -> str | None:
        """Why this forward is computed and nothing of it kept, or None."""
        if isinstance(self.cache, Off):
            return f"the cache is off for {self.role}"
        steps = self.trajectory.n_steps()
        if steps is not None and steps < self.cache.min_steps:
            return f"fewer than {self.cache.min_steps} steps: too far apart to stand for one another"
        return "branch unknown" if call.branch is None else None

    def _why_limited(self, call: Call, entry: Entry) -> str:
        cache = self.cache
        if self._plans is not None:
            plan = self._plans.get(call.branch, self._plans.get(None))
            if plan is None:
                return "a branch that the schedule does not name"
            if call.step >= len(plan):
                return "beyond the schedule's end"
            return "the schedule" if plan[call.step] == "1" else ""
        if entry.computed < cache.warmup:
            return "warm-up"
        if call.noise > cache.compute_above:
            return f"noise level above {cache.compute_above:g}"
        if call.noise < cache.compute_below:
            return f"noise level below {cache.compute_below:g}"
        if cache.max_consecutive is not None and entry.consecutive >= cache.max_consecutive:
            return f"{cache.max_consecutive} steps in a row"
        if cache.max_reused is not None and entry.reused >= cache.max_reused:
            return f"{cache.max_reused} steps of the run"
        return ""

    def _why_judged(self, verdict: Verdict) -> str:
        if self._plans is not None or verdict.expected < self.cache.threshold:
            return ""
        return "nothing to judge by yet" if verdict.expected == NEVER else "above the threshold"

    def _share(self, verdict: Verdict, limited: bool) -> None:
        """The first branch of a step decides for all; another follows it unless it cannot."""
        step = verdict.call.step
        if self._shared is None or self._shared[0] != step:
            self._shared = step, not verdict.reason
        elif not self._shared[1]:
            verdict.reason = verdict.reason or "the step's other branch is computed"
        elif not limited and verdict.expected != NEVER:
            verdict.reason = ""

    def _signature(self, view: View) -> tuple:
        """What forwards must have in common to serve one another."""
        return tuple(view.x.shape), view.x.dtype, view.x.device

    def _load(self, entry: Entry, view: View) -> dict[str, Any]:
        """The memory of an entry, to work with."""
        return self.memory.load(entry, view.x.device)

    def _compare(self, view: View, parts: Parts, verdict: Verdict) -> tuple[Tensor, Tensor]:
        """What a dry run would have made up, and what it computed."""
        return self.cache.fill(view, verdict.memory)[0], parts[0]

    @torch.compiler.disable
    def settle(self, verdict: Verdict, view: View, parts: Parts | None) -> None:
        """A step was computed."""
        if verdict.entry is None:
            self.count(verdict.call, False, verdict.reason)
            return
        assert parts is not None
        if self.cache.dry_run and verdict.expected != NEVER:
            self._try(verdict, view, parts)
        self.commit(verdict, view, parts)

    def _try(self, verdict: Verdict, view: View, parts: Parts) -> None:
        call = verdict.call
        whole = self._compare(view, parts, verdict)
        measure = getattr(self.cache, "measure", None)
        figures = () if measure is None else tuple(measure(parts, verdict.memory).items())
        error = worst(relative_l1(*whole))
        self.trials.append(
            Trial(self.role, call.branch, call.step, call.noise, verdict.expected, error, figures)
        )

    @torch.compiler.disable
    def commit(self, verdict: Verdict, view: View, parts: Parts | None) -> None:
        """Keep what this forward leaves behind. `parts` is None where it was made up."""
        entry, call = dataclasses.replace(verdict.entry), verdict.call
        if parts is None:
            entry.reused, entry.consecutive = entry.reused + 1, entry.consecutive + 1
        else:
            self.cache.learn(view, parts, verdict.memory)
            entry.computed, entry.consecutive = entry.computed + 1, 0
        entry.step, entry.noise = call.step, call.noise
        self.memory.put(call.branch, entry, verdict.memory)
        self.count(call, parts is None, verdict.reason)

    def count(self, call: Call, reused: bool, reason: str) -> None:
        self.tally.note_forward(self.role, reused, reason)
        self.decisions.note(call.branch, call.step, not reused)

    def begin(self) -> None:
        """A new run, or one that broke off."""
        self.memory.clear()
        self._shared = None
        self.decisions.clear()
