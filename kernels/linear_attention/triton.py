"""Launches the steps of linear attention in Triton: one program for a block of tokens of a head (sm_80 and newer).

The feature map is taken where rows are loaded, so that neither phi(q) nor phi(k) is ever written. A state, `D x D`, is
summed in registers in float32 over all rows of its block, in one program: no atomics, and always the same order.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

from .backward_kernels import read_backward_kernel, states_backward_kernel
from .forward_kernels import read_kernel, states_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = (16, 32, 64, 128)
NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Config:
    """A compiled shape of a kernel."""

    rows: int  # tokens of a block at once
    warps: int
    stages: int
    steps: int = (
        1  # of so many tokens by one program of "read" and "states_backward", which keeps its state meanwhile
    )


# Of 16-bit types, by kernel and whether a head has 128 numbers; smaller heads are as those of 64.
FASTEST = {
    ("states", False): Config(64, 4, 3),
    ("states", True): Config(32, 4, 3),
    ("read", False): Config(64, 4, 1),
    ("read", True): Config(32, 4, 1, steps=4),
    ("read_backward", False): Config(32, 4, 2),
    ("read_backward", True): Config(32, 8, 3),
    ("states_backward", False): Config(64, 4, 2, steps=2),
    ("states_backward", True): Config(32, 4, 1, steps=4),
}


def config_for(kernel: str, head: int, operands: torch.dtype) -> Config:
    """The one configuration of a kernel ("states", "read", "read_backward", "states_backward"): of those whose
    sums stay in registers the fastest."""
    wide = head == 128
    if operands == torch.float32:  # products on the scalar units, which take one operand whole
        return Config(16, 16 if wide and kernel in ("read", "states_backward") else 8, 1)
    return FASTEST[kernel, wide]


def why_not(q: Tensor) -> str | None:
    """Why these kernels cannot run, or None. q: `[B, H, S, D]`."""
    if q.device.type != "cuda" and not interpreting():
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if q.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in HEADS:
        return f"head size {q.shape[3]} is none of {', '.join(map(str, HEADS))}."
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} is older than sm_80."
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1 before this module is imported)."""
    return not isinstance(states_kernel, triton.JITFunction)


def block_states(
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    operands: torch.dtype,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream. Arguments and results as in `reference.block_states`."""
    batch, heads, _, dim = k.shape
    blocks = starts.shape[2] - 1
    states = torch.empty(batch, heads, blocks, dim, dim, dtype=stored, device=k.device)
    sums = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=k.device)
    config = config_for("states", dim, operands)
    with _on(k):
        states_kernel[(blocks, heads, batch)](
            *(k, v, starts, states, sums),
            *(*k.stride(), *v.stride(), *lead_strides(starts), heads, blocks),
            STEPS=max(1, triton.cdiv(longest, config.rows)),
            **_shared(config, dim, feature, operands),
        )
    return states, sums


def read_states(
    q: Tensor,
    states: Tensor,
    sums: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    eps: float,
    operands: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """Launch on the current stream. Arguments as in `reference.read_states`."""
    batch, heads, _, dim = q.shape
    blocks = starts.shape[2] - 1
    config = config_for("read", dim, operands)
    parts, steps = _share_out(config, longest)
    bias = None if bias is None else bias.float().contiguous()
    states, sums = _dense_blocks(states), _dense_blocks(sums)
    with _on(q):
        read_kernel[(blocks * parts, heads, batch)](
            *(
                q,
                states,
                sums,
                starts,
                states if weight is None else weight,
                sums if bias is None else bias,
                out,
            ),
            *(*q.stride(), *out.stride(), *states.stride()[:3], *sums.stride()[:3], *lead_strides(starts)),
            *(0 if x is None or len(x) == 1 else x.stride(0) for x in (weight, bias)),
            *(parts, eps),
            STEPS=steps,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            ADD=add,
            **_shared(config, dim, feature, operands),
        )


def read_states_backward(
    q: Tensor,
    grad: Tensor,
    states: Tensor,
    sums: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    eps: float,
    operands: torch.dtype,
    stored: torch.dtype,
    d_q: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream. Arguments and results as in `reference.read_states_backward`."""
    batch, heads, _, dim = q.shape
    blocks = starts.shape[2] - 1
    states, sums = _dense_blocks(states), _dense_blocks(sums)
    d_states = torch.empty(batch, heads, blocks, dim, dim, dtype=stored, device=q.device)
    d_sums = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=q.device)
    config = config_for("read_backward", dim, operands)
    with _on(q):
        read_backward_kernel[(blocks, heads, batch)](
            *(q, grad, states, sums, starts, d_q, d_states, d_sums),
            *(*q.stride(), *grad.stride(), *d_q.stride(), *states.stride()[:3], *sums.stride()[:3]),
            *(*lead_strides(starts), heads, blocks, eps),
            STEPS=max(1, triton.cdiv(longest, config.rows)),
            **_shared(config, dim, feature, operands),
        )
    return d_states, d_sums


def block_states_backward(
    k: Tensor,
    v: Tensor,
    d_states: Tensor,
    d_sums: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    operands: torch.dtype,
    d_k: Tensor,
    d_v: Tensor,
) -> None:
    """Launch on the current stream. Arguments as in `reference.block_states_backward`."""
    batch, heads, _, dim = k.shape
    blocks = starts.shape[2] - 1
    d_states, d_sums = _dense_blocks(d_states), _dense_blocks(d_sums)
    config = config_for("states_backward", dim, operands)
    parts, steps = _share_out(config, longest)
    with _on(k):
        states_backward_kernel[(blocks * parts, heads, batch)](
            *(k, v, d_states, d_sums, starts, d_k, d_v),
            *(*k.stride(), *v.stride(), *d_k.stride(), *d_v.stride()),
            *(*d_states.stride()[:3], *d_sums.stride()[:3], *lead_strides(starts), parts),
            STEPS=steps,
            **_shared(config, dim, feature, operands),
        )


def _share_out(config: Config, longest: int) -> tuple[int, int]:
    """Programs for a block, and tiles of rows for each: no more than a block of `longest` tokens has."""
    tiles = max(1, triton.cdiv(longest, config.rows))
    steps = min(config.steps, tiles)
    return triton.cdiv(tiles, steps), steps


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _dense_blocks(x: Tensor) -> Tensor:
    """`[B, H, N, ...]` whose last dimensions lie in a row; blocks that are one in memory stay one."""
    inner = x[0, 0, 0]
    if inner.is_contiguous():
        return x
    return x[:, :, :1].contiguous().expand_as(x) if x.stride(2) == 0 else x.contiguous()


def _shared(config: Config, dim: int, feature: str, operands: torch.dtype) -> dict:
    return dict(
        FEATURE=feature,
        DIM=dim,
        ROWS=config.rows,
        OPERANDS=NAMES[operands],
        INTERPRETED=interpreting(),
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
    )
