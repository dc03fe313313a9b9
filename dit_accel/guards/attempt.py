"""Guards: one call of sparse or linear attention, tried, with dense attention in its place where that fails."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.guards.drift import Drift
from dit_accel.guards.memory import first_words, is_out_of_memory

if TYPE_CHECKING:
    from dit_accel.options import SparseOptions
    from dit_accel.planner import Planner
    from dit_accel.report import Tally
    from dit_accel.trajectory import Call, Trajectory

logger = logging.getLogger("dit_accel")

# Why a call is dense after all.
NOT_FINITE = "sparse attention gave numbers that are not finite"
OUT_OF_MEMORY = "out of memory in the sparse path"
# What is said, and changes nothing.
INPUTS = "attention was given numbers that are not finite: the model or its input is at fault, not the sparse path"
DENSE_TOO = "dense attention of the same inputs is not finite either: their dtype or the model is at fault"
NOT_COMPARED = "not compared with dense attention, for which memory ran out"
CAPTURED = "not looked at, a CUDA graph was being captured"

Dense = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Attended:
    """What one call came to."""

    out: Tensor  # [B, S, H, D]
    title: str  # of the executor
    read: Tensor | None = None  # pairs of tokens that were read, 0-d; None: linear attention alone
    present: int = 0  # pairs that there are


class Guards:
    """What looks after one transformer's sparse calls.

    A kind of call is a layer with a shape, dtype and device. The first call of each kind and executor in a run is
    looked at, which waits for the device; where a kind has failed, it is dense for the rest of the run.

    Args:
        options: what was asked for.
        planner: has the plans.
        trajectory: whose runs bound all memory.

    Raises:
        UsageError: a drift guard, and nothing that it could do.
    """

    def __init__(self, options: SparseOptions, planner: Planner, trajectory: Trajectory) -> None:
        self._planner = planner
        self._drift = None if options.drift_every is None else Drift(options, planner)
        self.clear()
        trajectory.on_new_run(self.clear)

    def clear(self) -> None:
        """Forget what was seen and what failed: a new run."""
        self._seen: set[tuple] = set()
        self._off: dict[tuple, str] = {}  # kinds that are dense by now, and why
        self._said: set[str] = set()

    def attempt(
        self, compute: Callable[[], Attended], dense: Dense, qkv: tuple[Tensor, ...], now: Call, tally: Tally
    ) -> Attended | str:
        """Compute one call if its kind has not failed yet, and look at what comes out.

        Args:
            compute: attends.
            dense: attends densely with some of the queries, `[B, rows, H, D]`; its answer is only looked at.
            qkv: of the call, `[B, S, H, D]` each.
            now: which call this is.
            tally: counts what the guards do.

        Returns:
            What came out; or why the call is to be dense.
        """
        query = qkv[0]
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            tally.guards[CAPTURED] += 1  # nothing may wait for the device, and replays come past here no more
            return compute()
        kind = (now.layer, tuple(query.shape), query.dtype, query.device)
        if kind in self._off:
            return self._off[kind]
        done = _unless_out_of_memory(compute)
        failure = done if isinstance(done, str) else self._look(done, dense, qkv, kind, tally)
        if failure is not None:
            why, _, more = failure.partition("\n")
            self._off[kind] = why
            self._planner.forget(now)
            self._say(f"{why}: dense instead, in layer {now.layer} from step {now.step} on{more}")
            return why
        if self._drift is not None:
            try:
                self._drift.watch(done.out, dense, query, now, tally)
            except Exception as error:  # a look that was not needed shall not end the run
                if not is_out_of_memory(error):
                    raise
                tally.guards[NOT_COMPARED] += 1
        return done

    def _look(
        self, done: Attended, dense: Dense, qkv: tuple[Tensor, ...], kind: tuple, tally: Tally
    ) -> str | None:
        """Whether the first call of a kind and executor failed."""
        if (kind, done.title) in self._seen:
            return None
        self._seen.add((kind, done.title))
        if is_finite(done.out):
            return None
        blameless = INPUTS if not all(map(is_finite, qkv)) else None
        if blameless is None and not is_finite(dense(qkv[0])):
            blameless = DENSE_TOO
        if blameless is None:
            return f"{NOT_FINITE}\n ({done.title}, {list(qkv[0].shape)} in {qkv[0].dtype})"
        tally.guards[blameless] += 1
        self._say(f"{blameless} (layer {kind[0]})")
        return None

    def _say(self, what: str) -> None:
        """Warn, once a run for each of the reasons there are."""
        reason = what.partition(":")[0]
        if reason not in self._said:
            self._said.add(reason)
            logger.warning(what)

    def __deepcopy__(self, memo: dict) -> Guards:
        """For a copied transformer: nothing seen yet."""
        new = memo[id(self)] = object.__new__(type(self))
        new._planner = copy.deepcopy(self._planner, memo)
        new._drift = copy.deepcopy(self._drift, memo)
        new.clear()
        return new


def is_finite(x: Tensor) -> bool:
    """Whether every number is finite; waits for the device. No copy is made where they are."""
    # a sum carries every NaN and infinity, and may itself be too large only where numbers are absurd
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def _unless_out_of_memory(compute: Callable[[], Attended]) -> Attended | str:
    """What comes out; why not, where memory ran out. By then the failed call has let go of its own."""
    try:
        return compute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return f"{OUT_OF_MEMORY}\n ({first_words(error)})"
