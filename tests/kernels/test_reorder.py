"""Reordering against a loop over rows, each head in its own order, at any strides and types; bit for bit."""

from __future__ import annotations

import pytest
import torch

import dit_accel.kernels.reorder.op  # noqa: F401
from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.reorder import put_rows, take_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LEADS = [(2, 3), (1, 3), (2, 1), (1, 1)]


def by_hand(x: torch.Tensor, order: torch.Tensor, *, put: bool) -> torch.Tensor:
    """Row by row."""
    batch, heads, _, dim = x.shape
    order = order.cpu().expand(batch, heads, -1)
    out = torch.zeros(batch, heads, order.shape[2], dim, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            for i, place in enumerate(order[b, h].tolist()):
                source, target = (i, place) if put else (place, i)
                out[b, h, target] = x[b, h, source].cpu()
    return out


def permutation(lead: tuple[int, int], rows: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.rand(*lead, rows, generator=generator).argsort(-1).to(device, torch.int32)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 12, 64, 72])
def test_rows_are_taken_and_put(impl: str, device: str, dim: int, dtype: torch.dtype):
    x = randn(2, 3, 77, dim).to(device, dtype)
    order = permutation((2, 3), 77, device)
    taken, placed = take_rows(x, order, impl=impl), put_rows(x, order, impl=impl)
    assert taken.is_contiguous() and placed.is_contiguous() and taken.dtype == placed.dtype == dtype
    assert torch.equal(taken.cpu(), by_hand(x, order, put=False))
    assert torch.equal(placed.cpu(), by_hand(x, order, put=True))
    assert torch.equal(put_rows(taken, order, impl=impl), x)


@pytest.mark.parametrize("rows", [1, 5, 64, 300])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_an_order_may_stand_for_many(impl: str, device: str, lead: tuple[int, int], rows: int):
    x, order = randn(2, 3, rows, 24).to(device), permutation(lead, rows, device)
    assert torch.equal(take_rows(x, order, impl=impl).cpu(), by_hand(x, order, put=False))
    assert torch.equal(put_rows(x, order, impl=impl).cpu(), by_hand(x, order, put=True))


def test_any_strides(impl: str, device: str):
    fused = randn(2, 70, 3, 2, 33).to(device)  # tokens before heads, as models have them
    x = fused[:, :, :, 1, 1:].transpose(1, 2)
    order = permutation((2, 3), 70, device)
    spread = torch.zeros(2, 3, 140, dtype=torch.int32, device=device)[..., ::2].copy_(order)
    assert torch.equal(take_rows(x, spread, impl=impl).cpu(), by_hand(x, order, put=False))
    assert torch.equal(put_rows(x, spread, impl=impl).cpu(), by_hand(x, order, put=True))


@pytest.mark.parametrize("count", [0, 3, 90])
def test_fewer_rows_or_more_may_be_taken(impl: str, device: str, count: int):
    x = randn(1, 2, 41, 16).to(device)
    order = (torch.arange(2 * count, device=device, dtype=torch.int32) * 7 % 41).view(1, 2, count)
    taken = take_rows(x, order, impl=impl)
    assert taken.shape == (1, 2, count, 16)
    assert torch.equal(taken.cpu(), by_hand(x, order, put=False))


def test_another_rows_nan_stays_there(impl: str, device: str):
    x, order = randn(2, 2, 30, 8).to(device), permutation((1, 1), 30, device)
    clean = take_rows(x, order, impl=impl)
    x[1] = torch.nan
    assert torch.equal(take_rows(x, order, impl=impl)[0], clean[0])


def test_a_head_too_long_for_the_kernel_runs_in_plain_torch(device: str):
    x, order = randn(1, 1, 9, 600).to(device), permutation((1, 1), 9, device)
    assert torch.equal(take_rows(x, order).cpu(), by_hand(x, order, put=False))
    with pytest.raises(KernelUnavailable, match="600|CUDA|triton"):
        take_rows(x, order, impl="triton")


def there_and_back(x: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    taken = take_rows(x, order)
    return taken, put_rows(taken * 2, order)


def test_both_are_nodes_of_one_graph():
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=False)
    x, order = randn(2, 3, 20, 8), permutation((1, 3), 20, "cpu")
    for found, expected in zip(compiled(x, order), there_and_back(x, order), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_are_sound(dtype: torch.dtype):
    x, order = randn(2, 20, 3, 8).to(dtype).transpose(1, 2), permutation((1, 3), 20, "cpu")
    for op in (torch.ops.dit_accel.take_rows, torch.ops.dit_accel.put_rows):
        torch.library.opcheck(op, (x, order, "reference"), test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused():
    x, order = randn(2, 3, 9, 4), permutation((2, 3), 9, "cpu")
    with pytest.raises(UsageError, match=r"\[B, H, S, D\]"):
        take_rows(x[0], order)
    with pytest.raises(UsageError, match="float32, float16"):
        take_rows(x.int(), order)
    with pytest.raises(UsageError, match="int32"):
        take_rows(x, order.long())
    with pytest.raises(UsageError, match="batch and heads"):
        take_rows(x, order[:, :2])
    with pytest.raises(UsageError, match="9 rows.*names 5"):
        put_rows(x, order[..., :5])
    with pytest.raises(UsageError, match="gradient"):
        take_rows(x.requires_grad_(), order)
    with pytest.raises(UnknownNameError, match="triton"):
        take_rows(x.detach(), order, impl="tritn")
