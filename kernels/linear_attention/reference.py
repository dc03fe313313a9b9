"""The steps of linear attention in plain torch, on blocks padded to the longest.

Sums are float32 (float64 for float64 input). What a tensor core would multiply is rounded to the type `operands` first,
so that a run in low precision errs as the kernels may.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_states(
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    operands: torch.dtype,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What each key block adds to linear attention: `S_j = phi(K_j)^T V_j` and `z_j = sum phi(K_j)`.

    Args:
        k, v: `[B, H, S, D]`.
        starts: int32 `[B|1, H|1, N + 1]`; a block without tokens gives 0.
        longest: no block is longer.
        feature: phi, a name of `api.FEATURES`.
        operands: what products multiply.
        stored: type of the first result.

    Returns:
        `[B, H, N, D, D]` of type `stored`, `[B, H, N, D]` float32 (float64 for float64 input).
    """
    keys, values, inside = _blocks((k, v), starts, longest)
    keys = _phi(keys, feature) * inside
    return (_rounded(keys, operands).mT @ _rounded(values, operands)).to(stored), keys.sum(-2)


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
    """`phi(q) H / (eps + phi(q) z)` with the state H and sum z of each row's query block; 0 where that divides by 0.

    Args:
        q: `[B, H, S, D]`.
        states: `[B, H, N, D, D]`, of type `operands`.
        sums: `[B, H, N, D]`.
        starts: int32 `[B|1, H|1, N + 1]`.
        weight: `[H|1, D, D]`, of type `operands`: rows are multiplied by its transpose. None: they are not.
        bias: `[H|1, D]`, added to the rows. None: nothing is.
        out: `[B, H, S, D]`, overwritten.
        add: whether what `out` has is added.
    """
    rows, _ = _blocks((q,), starts, longest)
    rows = _phi(rows, feature)
    wide = rows.dtype
    result = _rounded(rows, operands) @ states.to(wide) * _inverse(rows, sums, eps)[..., None]
    if weight is not None:
        result = _rounded(result, operands) @ weight.to(wide).mT[:, None]
    if bias is not None:
        result = result + bias.to(wide)[:, None, None]
    result = _tokens(result, starts, q.shape[2])
    out.copy_(result + out.to(wide) if add else result)


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
    """The gradient of `read_states` without weight and bias. `grad` is that of its result.

    With a = phi(q), d = eps + a z and n = grad / d: `dH = a^T n`, `t = n H^T`, `dd = -(a . t) / d`, `da = t + dd z` and
    `dz = sum dd a`. (grad . out = n . aH = a . t, so the output is not needed.)

    Args:
        grad: `[B, H, S, D]`, as d_q: that of q, overwritten. The others as there.
        stored: type of the first result.

    Returns:
        The gradients of the states, `[B, H, N, D, D]`, and of the sums, `[B, H, N, D]`.
    """
    x, grad, inside = _blocks((q, grad), starts, longest)
    rows = _phi(x, feature) * inside
    inverse = _inverse(rows, sums, eps)[..., None]
    grad = grad * inverse
    through = _rounded(grad, operands) @ states.to(x.dtype).mT
    share = -(rows * through).sum(-1, keepdim=True) * inverse
    d_rows = through + share * sums[..., None, :]
    d_states = _rounded(rows, operands).mT @ _rounded(grad, operands)
    d_rows = _phi_backward(d_rows, x, rows, feature)
    d_q.copy_(_tokens(d_rows, starts, q.shape[2]))
    return d_states.to(stored), (share * rows).sum(-2)


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
    """The gradients of `block_states`: `dV = phi(K) dS` and `dphi(K) = V dS^T + dz`.

    Args:
        d_states: `[B, H, N, D, D]`, of type `operands`.
        d_sums: `[B, H, N, D]`.
        d_k, d_v: as k and v, overwritten.
    """
    x, values, inside = _blocks((k, v), starts, longest)
    keys = _phi(x, feature) * inside
    d_states = d_states.to(x.dtype)
    d_values = _rounded(keys, operands) @ d_states
    d_keys = _rounded(values, operands) @ d_states.mT + d_sums[..., None, :]
    d_keys = _phi_backward(d_keys, x, keys, feature)
    d_k.copy_(_tokens(d_keys, starts, k.shape[2]))
    d_v.copy_(_tokens(d_values, starts, k.shape[2]))


def _phi(x: Tensor, feature: str) -> Tensor:
    match feature:
        case "softmax":
            return x.softmax(-1)
        case "elu":
            return F.elu(x) + 1
        case "relu":
            return x.relu()


def _phi_backward(grad: Tensor, x: Tensor, y: Tensor, feature: str) -> Tensor:
    """The gradient of x from that of `y = phi(x)`."""
    match feature:
        case "softmax":
            return y * (grad - (y * grad).sum(-1, keepdim=True))
        case "elu":
            return grad * y.clamp(max=1)
        case "relu":
            return grad * (x > 0)


def _inverse(rows: Tensor, sums: Tensor, eps: float) -> Tensor:
    """`1 / (eps + rows . sums)`, `[B, H, N, L]`; 0 where that would be 1 / 0."""
    total = (rows @ sums[..., None])[..., 0] + eps
    return torch.where(total == 0, 0, 1 / total.masked_fill(total == 0, 1))


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def _blocks(given: tuple[Tensor, ...], starts: Tensor, longest: int) -> tuple[Tensor, ...]:
    """Each of `[B, H, S, D]` by block, `[B, H, N, L, D]` in float32 or float64, 0 behind a block's end; and where its
    tokens are, `[B|1, H|1, N, L, 1]`."""
    token = starts[..., :-1, None] + torch.arange(longest, dtype=torch.int32, device=starts.device)
    inside = (token < starts[..., 1:, None])[..., None]
    found = []
    for x in given:
        batch, heads, tokens, dim = x.shape
        place = token.clamp(max=tokens - 1).long().flatten(2)
        if place.shape[:2] == (1, 1):
            taken = x.index_select(2, place[0, 0])
        else:
            taken = x.gather(2, place.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, dim))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        found.append(taken.to(wide).unflatten(2, token.shape[2:]).masked_fill(~inside, 0))
    return *found, inside


def _tokens(x: Tensor, starts: Tensor, tokens: int) -> Tensor:
    """`[B, H, N, L, D]` of blocks back to `[B, H, S, D]`."""
    batch, heads, _, longest, dim = x.shape
    token = torch.arange(tokens, dtype=torch.int32, device=x.device).expand(*starts.shape[:2], -1)
    block = torch.searchsorted(starts[..., 1:].contiguous(), token.contiguous(), right=True)
    place = block * longest + token - starts[..., :-1].gather(2, block)
    x = x.flatten(2, 3)
    if place.shape[:2] == (1, 1):
        return x.index_select(2, place[0, 0])
    return x.gather(2, place.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, dim))
