"""Quantised attention against its emulation and float64; `check_kernels.py` runs them on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from _kernel_cases import Case, make, poisoned_memory

from dit_accel.kernels.block_sparse import block_sparse, why_not
from dit_accel.kernels.block_sparse.reference import block_sparse_quantised
from dit_accel.kernels.quantize import MODES, quantize_blocks
from dit_accel.plan import BlockPlan

SHAPES = {
    "even": dict(batch=2, heads=3, q_blocks=(128,) * 9, k_blocks=(128,) * 17),
    "ragged": dict(batch=1, heads=4, q_blocks=(128, 77, 128, 40), k_blocks=(128, 96, 128, 1)),
    "zero-length": dict(batch=2, heads=2, q_blocks=(64, 0, 33, 128, 0), k_blocks=(0, 17, 128, 0, 64, 0)),
    "many tiles": dict(batch=2, heads=4, q_blocks=(128,) * 70, k_blocks=(128, 128, 60)),
    "long": dict(batch=1, heads=2, q_blocks=(128,) * 3, k_blocks=(128,) * 600),
}
# Relative error against float64 on normal inputs. fp8 comes to 0.056 with heads of 128 and to 0.058 with heads of 64.
ALLOWED = {"int8_fp8": 0.045, "fp8": 0.058, "int8": 0.016}
ALLOWED_64 = {**ALLOWED, "fp8": 0.059}


def check_quantised(device: str) -> Iterator[tuple[str, str | None]]:
    """A title and what is wrong (None: nothing) for each case; nothing where the kernel cannot run."""
    runs = [("hopper", mode) for mode in MODES] + [("triton", "int8")]
    grid = itertools.product(
        runs, (64, 128), SHAPES, ("random", "empty rows", "full"), ("plain", "biased", "mean")
    )
    for number, ((impl, mode), head, shape, plan_kind, kind) in enumerate(grid):
        case = Case(
            dtype=torch.bfloat16, head=head, shape=shape, plan=plan_kind, layout="bhsd", **SHAPES[shape]
        )
        q, k, v, plan = make(case, device, seed=number)
        if why_not(impl, q, k, v, plan, mode) is not None:
            continue
        if kind == "biased":  # keys that share a direction, peaked rows
            k, q = k + 4 * k[:, :, :1], 3 * q
        elif kind == "mean":  # values of one sign add up: what an accumulator of few bits loses shows
            v = v + 1
        yield f"{impl} {mode} {case.title}, {kind}", _check(impl, mode, q, k, v, plan, kind)


def _check(
    impl: str, mode: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, kind: str
) -> str | None:
    scale = q.shape[3] ** -0.5
    with poisoned_memory():
        out, lse = block_sparse(q, k, v, plan, layout="bhsd", impl=impl, precision=mode)
    copies = quantize_blocks(q, k, v, plan, mode, impl="reference")
    emulated, emulated_lse = block_sparse_quantised(copies, plan, scale, q)
    exact, exact_lse = block_sparse(q.double(), k.double(), v.double(), plan, layout="bhsd", impl="reference")
    if not bool(out.isfinite().all()) or not torch.equal(lse.isneginf(), emulated_lse.isneginf()):
        return "not finite, or lse is not -inf exactly where a row is empty"
    size = float(exact.norm())
    error, unavoidable = (float((x.double() - exact).norm()) for x in (out, emulated))
    lse_error, lse_unavoidable = (float((x - exact_lse).nan_to_num(0.0).norm()) for x in (lse, emulated_lse))
    if error > 1.05 * unavoidable + 1e-6 * size:
        return f"relative error {error / size:.4f}, emulated {unavoidable / size:.4f}"
    allowed = (ALLOWED_64 if q.shape[3] == 64 else ALLOWED)[mode]
    if kind == "plain" and error > allowed * size:
        return f"relative error {error / size:.4f}, allowed {allowed}"
    if lse_error > 1.05 * lse_unavoidable + 1e-5 * exact_lse.numel() ** 0.5:
        return f"error of lse {lse_error:.2e}, emulated {lse_unavoidable:.2e}"
    return None
