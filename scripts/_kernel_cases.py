"""What check_kernels.py and bench_kernels.py share: inputs, the tolerance rule, and the record's header."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.plan import BlockPlan


@dataclass(frozen=True)
class Case:
    """One call to be checked."""

    dtype: torch.dtype
    head: int  # head size
    shape: str  # name of the row below
    batch: int
    heads: int
    q_blocks: tuple[int, ...]  # tokens of each query block
    k_blocks: tuple[int, ...]
    plan: str  # random, empty rows, broadcast, full, none
    layout: str  # bshd, bhsd, or "bshd fused": slices of one [B, S, 3, H, D]

    @property
    def title(self) -> str:
        return f"{self.dtype} D={self.head} {self.shape}, plan {self.plan}, {self.layout}"


@dataclass(frozen=True)
class Verdict:
    """How one call did."""

    error: float  # relative error of out against float64
    share: float  # that error over the allowed one
    problem: str | None  # why it failed


def make(case: Case, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, BlockPlan]:
    """Inputs and plan of a case, a function of its fields and the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    n_q, n_k = sum(case.q_blocks), sum(case.k_blocks)

    def tensor(tokens: int) -> Tensor:
        b, h, d = case.batch, case.heads, case.head
        shape = (b, h, tokens, d) if case.layout == "bhsd" else (b, tokens, h, d)
        wide = torch.randn(*shape, generator=generator).to(device, case.dtype)
        # Neighbours in memory that must not be read: NaN there would show.
        return (
            torch.stack([wide, wide * torch.nan, wide], 2)[:, :, 0] if case.layout == "bshd fused" else wide
        )

    lead = (1, 1) if case.plan == "broadcast" else (case.batch, case.heads)
    mask = torch.rand(*lead, len(case.q_blocks), len(case.k_blocks), generator=generator) < 0.4
    if case.plan == "full":
        mask[:] = True
    if case.plan == "none":
        mask[:] = False
    if case.plan == "empty rows":
        mask[:, -1, 0] = False
        mask[:, 0, -1] = False
    starts = [[0, *accumulate(blocks)] for blocks in (case.q_blocks, case.k_blocks)]
    return tensor(n_q), tensor(n_k), tensor(n_k), BlockPlan.from_mask(mask.to(device), *starts)


def judge(run: Callable, case: Case, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Verdict:
    """Run one case on poisoned memory and compare with float64.

    Allowed: twice the error of the reference run in the same type, which is what that type costs anyone.
    """
    layout = case.layout.split()[0]
    with poisoned_memory():
        out, lse = run(q, k, v, plan, layout=layout)
    exact, exact_lse = block_sparse(q.double(), k.double(), v.double(), plan, layout=layout, impl="reference")
    plain, plain_lse = block_sparse(q, k, v, plan, layout=layout, impl="reference")
    if (
        out.shape != q.shape
        or out.dtype != q.dtype
        or lse.shape != exact_lse.shape
        or lse.dtype != torch.float32
    ):
        return Verdict(0.0, 0.0, f"gave {out.dtype} {tuple(out.shape)}, {lse.dtype} {tuple(lse.shape)}")
    if not bool(out.isfinite().all()) or bool(lse.isnan().any()):
        return Verdict(0.0, 0.0, "not finite")
    if not torch.equal(lse.isneginf(), exact_lse.isneginf()):
        return Verdict(0.0, 0.0, "lse is not -inf exactly where a row is empty")
    size = float(exact.norm())
    error, unit = float((out.double() - exact).norm()), torch.finfo(case.dtype).eps
    allowed = 2 * float((plain.double() - exact).norm()) + 4 * torch.finfo(torch.float32).eps * size
    worst, worst_allowed = float((out - exact).abs().max()), 4 * float((plain - exact).abs().max()) + unit
    gap = float((lse - exact_lse).nan_to_num(0.0).abs().max())
    gap_allowed = 2 * float((plain_lse - exact_lse).nan_to_num(0.0).abs().max()) + 1e-5
    problem = None
    if error > allowed:
        problem = f"relative error {error / size:.2e}, allowed {allowed / size:.2e}"
    elif worst > worst_allowed:
        problem = f"largest error {worst:.2e}, allowed {worst_allowed:.2e}"
    elif gap > gap_allowed:
        problem = f"lse is off by {gap:.2e}, allowed {gap_allowed:.2e}"
    return Verdict(error / size if size else error, error / allowed if allowed else 0.0, problem)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and `torch.empty_like` return with NaN, so that an unwritten output cannot pass."""

    def poison(create: Callable) -> Callable:
        def create_poisoned(*args, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return create_poisoned

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
    ):
        yield


def environment() -> dict[str, str | None]:
    """Where a record was made."""
    versions = {"torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "python": platform.python_version(),
        **versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "command": " ".join(["python", *sys.argv]),
    }


def write_record(path: str, record: dict) -> None:
    """Write the record with its environment as JSON."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"environment": environment(), **record}, indent=1) + "\n")
