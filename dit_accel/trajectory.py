"""The one clock: which run, branch, step and noise level a transformer call belongs to.

Sparse methods and caches read the same `Call`. A pipeline tells little of this, so the clock gathers it from
what every pipeline must pass: the timestep, the conditioning and, where the pipeline opens one, the cache
context. It never counts calls: pipelines differ in how many they make per step.

A new run is recognised at its start, by any of
- the scheduler's `set_timesteps`, where the pipeline is known (it leaves a new `timesteps` tensor behind;
equal
  ones are no signal, the tensor object is);
- a forward that never returned (an exception, Ctrl-C);
- the cache context going back to an earlier step, or to step 0 again;
- a rising noise level (an equal one is no signal: bf16 timesteps tie);
- another latent shape;
- new conditioning in a branch that had another;
- `begin()`, and the pipeline resetting its stateful hooks at its end.

A host that says when a run begins and which step a forward belongs to (ComfyUI) is believed: then none of these but
`begin()` and a forward that never returned starts a run.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# A pipeline that makes new conditioning tensors for every call would otherwise grow the table without end.
MAX_NAMELESS_BRANCHES = 8

Segments = tuple[tuple[str, int, int], ...]  # kinds of tokens as (name, first, after the last)


@dataclass(frozen=True)
class Call:
    """What one attention call is part of. Read-only; `layer` is None outside an attention call."""

    run: int  # counts runs from 1
    branch: str | None  # "cond", "uncond", ... as the pipeline says; "#0", ... by conditioning; else unknown
    step: int  # denoising step within the run, from 0
    noise: float  # timestep / training timesteps, 0 to 1
    grid: tuple[int, int, int]  # frames, rows, columns, in tokens
    segments: Segments  # kinds of tokens
    role: str  # which transformer of the pipeline
    n_layers: int
    layer: int | None = None
    first_head: int = 0  # the model's number of the first head seen here; heads may be shared out over processes
    rows: tuple[int, ...] | None = None  # batch rows seen here; None: all of them

    def at(self, layer: int, first_head: int = 0) -> Call:
        """This call, seen from the self-attention of one layer and from some head on."""
        return dataclasses.replace(self, layer=layer, first_head=first_head)


@dataclass(frozen=True)
class Facts:
    """What an adapter reads from the arguments of one transformer forward."""

    timestep: float  # the largest one, in the scheduler's units
    grid: tuple[int, int, int]
    shape: tuple[int, ...]  # of the latents
    condition: Tensor | None  # text embeddings; None if this model has none
    # what the tokens are if they are no one grid, in words; `grid` is then (1, 1, tokens), a line
    loose: str | None = None
    text: int = 0  # text tokens that take part in self-attention, padding included
    text_first: bool = False  # whether they stand before the others
    # of each batch row, how many of these are no padding, which stands behind them; None: all, and there is no mask
    text_valid: tuple[int, ...] | None = None
    first_frame_apart: bool = False  # whether the model tells the first frame's tokens by their place, the first ones
    # set where a step adds a forward that computes less than the others (skip-layer guidance): a branch of its own,
    # though its conditioning may be another's
    variant: str = ""


@dataclass(frozen=True)
class Context:
    """What the pipeline said through `cache_context`, if it did."""

    name: str | None = None
    step: int | None = None


class Trajectory:
    """Follows the transformers of one pipeline through its runs.

    Two experts of one pipeline are two roles on one trajectory. Owners of per-run state subscribe with
    `on_new_run`; they are called before the first forward of each run.

    Args:
        pipe: the pipeline, where there is one.
        train_timesteps: noise levels the model was trained with, unless its scheduler says.
        told_steps: how many steps a run has, where the host says when one begins.
    """

    def __init__(self, pipe: Any = None, train_timesteps: int = 1000, *, told_steps: int | None = None) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._train_timesteps, self._told_steps = train_timesteps, told_steps
        self._timesteps: object = None
        self._listeners: list[Callable[[], None]] = []
        self._counters: list[Callable[[], None]] = []
        self.run = 0
        self._over = True  # the next forward starts a new run
        self._forget()

    def on_new_run(self, listener: Callable[[], None]) -> None:
        """Have what was learnt dropped: at each new run, and where a branch gets another prompt in mid-run."""
        self._listeners.append(listener)

    def on_run_start(self, counter: Callable[[], None]) -> None:
        """Have new runs counted, and nothing else."""
        self._counters.append(counter)

    def begin(self) -> None:
        """Declare that the next forward starts a new run."""
        self._over = True

    def enter(self, role: str, facts: Facts, context: Context, n_layers: int) -> Call:
        """Note the start of a transformer forward and say what it is part of."""
        noise = facts.timestep / self._steps_of_training()
        identity = _identity(facts.condition)
        if facts.variant:
            identity = (*(identity or ()), facts.variant)
            if context.name is not None:
                context = dataclasses.replace(context, name=f"{context.name}, {facts.variant}")
        if self._starts_a_run(role, noise, facts.shape, context, identity, bool(facts.variant)):
            self.run += 1
            self._forget()
            for listener in (*self._listeners, *self._counters):
                listener()
        self._over = False
        self._timesteps = self._timesteps_now()
        self._open.add(role)
        self._shapes[role] = facts.shape
        branch = self._branch(context, identity, facts.condition)
        step = self._step_of(context, noise)
        self._noise, self._step = noise, step
        if branch is not None:
            self._branch_steps[branch] = step
        return Call(
            run=self.run,
            branch=branch,
            step=step,
            noise=noise,
            grid=facts.grid,
            segments=segments_of(facts, facts.text if facts.text_valid is None else max(facts.text_valid)),
            role=role,
            n_layers=n_layers,
        )

    def n_steps(self) -> int | None:
        """How many steps the scheduler was set to; None where neither pipeline nor host says."""
        if self._told_steps is not None:
            return self._told_steps
        timesteps = self._timesteps_now()
        return None if timesteps is None else len(timesteps)

    def leave(self, role: str) -> None:
        """Note that the forward returned. One that never does makes the next forward start a new run."""
        self._open.discard(role)

    def _forget(self) -> None:
        self._noise: float | None = None
        self._step = 0
        self._first_index: int | None = None  # the scheduler's number for this run's first step
        self._open: set[str] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        # conditioning of each branch; holding the tensor keeps its address from being reused
        self._branches: dict[str, tuple[tuple, Tensor | None]] = {}
        self._branch_steps: dict[str, int] = {}

    def _starts_a_run(
        self,
        role: str,
        noise: float,
        shape: tuple[int, ...],
        context: Context,
        identity: tuple | None,
        is_variant: bool,
    ) -> bool:
        if self._over or self._open or self._timesteps_now() is not self._timesteps:
            return True
        if self._told_steps is not None:
            return False  # the host would have said so
        if self._noise is not None and noise > self._noise:
            return True
        if self._shapes.get(role, shape) != shape:
            return True
        if self._scheduler() is not None:
            return False  # the scheduler would have said so
        if context.step is not None:
            last = self._branch_steps.get(context.name or "", -1)
            return context.step < last or context.step == last == 0
        if context.name is not None:
            known = self._branches.get(context.name)
            return known is not None and known[0] != identity
        if is_variant:
            return False  # it comes behind the forwards of its step
        # No context: a conditioning tensor never seen may be the second branch of the first step, not later.
        unseen = identity is not None and all(identity != known for known, _ in self._branches.values())
        return unseen and self._noise is not None and (noise < self._noise or self._step > 0)

    def _branch(self, context: Context, identity: tuple | None, condition: Tensor | None) -> str | None:
        if context.name is not None:
            known = self._branches.get(context.name)
            if known is not None and known[0] != (identity or ()):
                # New conditioning in mid-run (a callback may swap the prompt): whatever was learnt about this
                # branch is about another prompt.
                for listener in self._listeners:
                    listener()
            self._branches[context.name] = (identity or (), condition)
            return context.name
        if identity is None:
            return None
        for name, (known, _) in self._branches.items():
            if known == identity:
                return name
        if len(self._branches) >= MAX_NAMELESS_BRANCHES:
            return None
        name = f"#{len(self._branches)}"
        self._branches[name] = (identity, condition)
        return name

    def _step_of(self, context: Context, noise: float) -> int:
        if context.step is not None:
            return context.step
        scheduler = self._scheduler()
        if scheduler is not None and hasattr(scheduler, "step_index"):
            # None until the scheduler has made its first step. Then it counts in the whole schedule, of which
            # video-to-video runs only the end.
            index = scheduler.step_index
            if index is None:
                return 0
            if self._first_index is None:
                self._first_index = index if self._noise is None else index - 1
            return index - self._first_index
        if self._noise is None:
            return 0
        return self._step + (noise < self._noise)

    def _scheduler(self) -> Any:
        pipe = None if self._pipe is None else self._pipe()
        return getattr(pipe, "scheduler", None)

    def _timesteps_now(self) -> object:
        return getattr(self._scheduler(), "timesteps", None)

    def _steps_of_training(self) -> int:
        config = getattr(self._scheduler(), "config", None)
        return getattr(config, "num_train_timesteps", None) or self._train_timesteps

    def __deepcopy__(self, memo: dict) -> Trajectory:
        """A copied pipeline starts with a clock of its own that has seen nothing."""
        pipe = None if self._pipe is None else memo.get(id(self._pipe()))
        new = type(self)(pipe, self._train_timesteps, told_steps=self._told_steps)
        memo[id(self)] = new
        new._listeners = [copy.deepcopy(listener, memo) for listener in self._listeners]
        new._counters = [copy.deepcopy(counter, memo) for counter in self._counters]
        return new


class StateTable:
    """What a method remembers between steps, kept as `[role, branch, layer, rows]` and dropped at each new run.

    Args:
        trajectory: whose runs bound the memory.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._entries: dict[tuple, tuple[tuple[int, ...], Any]] = {}
        trajectory.on_new_run(self.clear)

    def get(self, call: Call, shape: tuple[int, ...], init: Callable[[], Any]) -> Any:
        """The state of one attention, made by `init` at first use or when the shape of its queries
        changed."""
        assert call.branch is not None and call.layer is not None
        key = (call.role, call.branch, call.layer, call.rows)
        held = self._entries.get(key)
        if held is None or held[0] != shape:
            held = self._entries[key] = (shape, init())
        return held[1]

    def discard(self, call: Call) -> None:
        """Drop the states of one attention, of whichever branch."""
        for key in [key for key in self._entries if (key[0], key[2]) == (call.role, call.layer)]:
            del self._entries[key]

    def clear(self) -> None:
        self._entries.clear()

    def bytes_held(self) -> int:
        return sum(_bytes_in(state) for _, state in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"StateTable({len(self)} entries, {self.bytes_held()} bytes)"

    def __deepcopy__(self, memo: dict) -> StateTable:
        new = memo[id(self)] = object.__new__(type(self))
        new._entries = {}
        return new


def segments_of(facts: Facts, valid: int) -> Segments:
    """What the tokens of a batch row are of whose text so many are no padding."""
    video, text = [("video", math.prod(facts.grid))], [("text", valid), ("pad", facts.text - valid)]
    kinds = text + video if facts.text_first else video + text
    segments, first = [], 0
    for kind, tokens in kinds:
        if tokens:
            segments.append((kind, first, first + tokens))
        first += tokens
    return tuple(segments)


def _identity(condition: Tensor | None) -> tuple | None:
    """Which memory a tensor is: two views of one buffer differ, two objects of one view do not."""
    if condition is None:
        return None
    return (condition.untyped_storage().data_ptr(), condition.storage_offset(), tuple(condition.shape))


def _bytes_in(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if dataclasses.is_dataclass(state):
        return sum(_bytes_in(getattr(state, f.name)) for f in dataclasses.fields(state))
    if isinstance(state, dict):
        return sum(map(_bytes_in, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(_bytes_in, state))
    return 0
