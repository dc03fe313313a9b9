"""Choosing the Triton kernel's configuration by trying: every candidate is checked before it is timed.

A configuration that compiles and runs may still be wrong (Triton 3.6 returned NaN with some), so none is timed whose
result is not right, and one that fails in any way is noted and passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.errors import KernelUnavailable, UsageError
from dit_accel.plan import BlockPlan

from .api import Layout, block_sparse
from .triton import Config, capability_of, config_for, padded_head

SAMPLE = 4  # query blocks at either end of a head that are compared with the reference


@dataclass(frozen=True)
class Trial:
    """How one configuration did."""

    config: Config
    milliseconds: float | None  # None where it was not timed
    problem: str | None  # why not


@dataclass(frozen=True)
class Tuning:
    """The fastest right configuration, and all that were tried, the fastest first."""

    config: Config
    trials: tuple[Trial, ...]


def candidates(head: int, dtype: torch.dtype, shared: int, capability: int | None = None) -> list[Config]:
    """Configurations worth trying, the standing one first.

    Args:
        head: head size.
        shared: bytes of shared memory that a program may have.
        capability: of the chip, such as 90.
    """
    standing = config_for(head, dtype, capability)
    if dtype == torch.float32:
        others = [Config(m, n, w, 1) for m in (16, 32, 64) for n in (32, 64) for w in (4, 8)]
    else:
        others = [
            Config(m, n, w, s)
            for m, n, w in ((128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 32, 4), (64, 64, 4), (64, 32, 4))
            for s in ((1, 2, 3) if padded_head(head) > 128 else (2, 3, 4))
        ]
    itemsize, width = dtype.itemsize, padded_head(head)
    fits = [c for c in others if (c.block_m + 2 * c.stages * c.block_n) * width * itemsize <= shared]
    return list(dict.fromkeys([standing, *fits]))


def tune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    layout: Layout = "bshd",
    configs: Iterable[Config] | None = None,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Tuning:
    """Find the fastest configuration of the Triton kernel for calls like this one, to be passed to `block_sparse`.

    It waits for the device and compiles every candidate: seconds to a minute.

    Args:
        q, k, v, plan, scale, layout: as in `block_sparse`.
        configs: what to try; None takes `candidates`.
        timer: gives the milliseconds of a call; None takes the median of `triton.testing.do_bench`.

    Raises:
        UsageError: a CUDA graph is being captured.
        KernelUnavailable: the kernel cannot run the call, or no candidate is right.
    """
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError("A CUDA graph is being captured: tune before that, and capture with the result.")
    if configs is None:
        shared = 99 * 1024
        if q.is_cuda:
            shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
        configs = candidates(q.shape[3], q.dtype, shared, capability_of(q.device))
    by_head = [x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v)]
    judge = _Judge(*by_head, plan, scale)
    trials = [_try(config, by_head, plan, scale, judge, timer or _median) for config in configs]
    trials.sort(key=lambda trial: (trial.milliseconds is None, trial.milliseconds))
    if not trials or trials[0].milliseconds is None:
        told = "; ".join(sorted({str(trial.problem) for trial in trials}))
        raise KernelUnavailable(
            f"No configuration of the Triton kernel is right here: {told or 'none given'}"
        )
    return Tuning(trials[0].config, tuple(trials))


def _try(config: Config, qkv: list[Tensor], plan: BlockPlan, scale, judge: _Judge, timer: Callable) -> Trial:
    def run() -> Tensor:
        return block_sparse(*qkv, plan, scale=scale, layout="bhsd", impl="triton", config=config)[0]

    try:
        # The allocator hands out what was freed last: a result that nobody wrote is NaN, not a former candidate's.
        torch.full_like(qkv[0], torch.nan)
        problem = judge(run())
        return Trial(config, None if problem else float(timer(run)), problem)
    except Exception as error:  # a compiler can fail in any way; the others must be tried all the same
        if type(error).__name__ == "KernelUnavailable":
            raise
        lines = str(error).strip().splitlines()
        return Trial(config, None, f"{type(error).__name__}: {lines[0] if lines else 'no message'}")


class _Judge:
    """Compares a result's first and last query blocks with the reference in float64.

    Allowed is twice the error of the reference run in the inputs' own type.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None) -> None:
        self.parts = []
        ends = sorted({0, max(0, plan.n_q - SAMPLE)})
        for first in ends:
            last = min(plan.n_q, first + SAMPLE)
            starts = plan.q_starts[:1, :1, first : last + 1]
            low, high = (int(x) for x in starts[0, 0, [0, -1]])
            if low == high:
                continue
            part = replace(
                plan,
                counts=plan.counts[:1, :1, first:last],
                indices=plan.indices[:1, :1, first:last],
                q_starts=starts - low,
                k_starts=plan.k_starts[:1, :1],
                n_q_tokens=high - low,
                even_q=False,
                key_means=None,
            )
            inputs = q[:1, :1, low:high], k[:1, :1], v[:1, :1]
            known = dict(scale=scale, layout="bhsd", impl="reference")
            exact = block_sparse(*(x.double() for x in inputs), part, **known)[0]
            plain = block_sparse(*inputs, part, **known)[0]
            unit = torch.finfo(torch.float32).eps
            allowed = 2 * (plain.double() - exact).norm() + 8 * unit * exact.norm()
            self.parts.append((low, high, exact, float(allowed)))

    def __call__(self, out: Tensor) -> str | None:
        if not bool(out.isfinite().all()):
            return "the result is not finite"
        for low, high, exact, allowed in self.parts:
            error = float((out[:1, :1, low:high].double() - exact).norm())
            if not error <= allowed:
                return f"the result is wrong: error {error:.1e}, allowed {allowed:.1e}"
        return None


def _median(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")
