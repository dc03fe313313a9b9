"""Block means against float64, at any strides, block lengths and types."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.pooling import block_deviations, block_directions, block_means

BLOCKS = {
    "one": (5,),
    "ragged": (128, 128, 77),
    "unequal": (96, 0, 128, 1, 33),
    "tiny": (3,) * 9,
}


def exact(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """float64, block by block."""
    batch, _, heads, dim = x.shape
    starts = starts.expand(batch, heads, -1).cpu()
    out = torch.zeros(batch, heads, starts.shape[2] - 1, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i, (low, high) in enumerate(zip(starts[b, h], starts[b, h, 1:], strict=False)):
                if high > low:
                    out[b, h, i] = x[b, low:high, h].cpu().double().mean(0)
    return out


def starts_of(blocks: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.tensor([0, *accumulate(blocks)], dtype=torch.int32, device=device)[None, None]


@pytest.mark.parametrize("dim", [16, 64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_means_equal_float64(impl: str, device: str, blocks: tuple[int, ...], dtype: torch.dtype, dim: int):
    generator = torch.Generator().manual_seed(dim + len(blocks))
    x = torch.randn(2, sum(blocks), 3, dim, generator=generator).to(device, dtype)
    starts = starts_of(blocks, device)
    means = block_means(x, starts, max(blocks), impl=impl)
    assert means.shape == (2, 3, len(blocks), dim) and means.dtype == torch.float32
    # fp32 sums of the very values given: the input's own rounding is not the mean's error.
    torch.testing.assert_close(means.cpu().double(), exact(x, starts), rtol=1e-5, atol=2e-6)


def test_strided_input_and_blocks_of_each_head(impl: str, device: str):
    fused = torch.randn(2, 70, 3, 2, 32, generator=torch.Generator().manual_seed(1)).to(device)
    x = fused[:, :, 1]  # the key of a fused projection: [B, S, H, D] with strides of its own
    starts = torch.stack([starts_of((30, 40), device)[0, 0], starts_of((1, 69), device)[0, 0]])[None]
    means = block_means(x, starts, 69, impl=impl)
    torch.testing.assert_close(means.cpu().double(), exact(x, starts), rtol=1e-5, atol=2e-6)


def test_another_rows_nan_stays_there(impl: str, device: str):
    x = torch.randn(2, 50, 2, 16, generator=torch.Generator().manual_seed(2)).to(device)
    starts = starts_of((20, 30), device)
    clean = block_means(x, starts, 30, impl=impl)
    x[1] = torch.nan
    x[0, :, 1] = torch.nan
    assert torch.equal(block_means(x, starts, 30, impl=impl)[0, 0], clean[0, 0])


def test_many_heads_of_low_precision(device: str):
    x = torch.randn(1, 40, 19, 8, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    starts = starts_of((16, 24), device)
    torch.testing.assert_close(
        block_means(x, starts, 24, impl="reference").cpu().double(), exact(x, starts), rtol=1e-5, atol=2e-6
    )


def test_float64_stays_float64():
    x = torch.randn(1, 9, 1, 4, dtype=torch.float64)
    means = block_means(x, starts_of((4, 5), "cpu"), 5)
    torch.testing.assert_close(means, exact(x, starts_of((4, 5), "cpu")), rtol=0, atol=1e-15)


def test_what_does_not_fit_is_refused():
    x, starts = torch.randn(2, 9, 3, 4), starts_of((4, 5), "cpu")
    with pytest.raises(UsageError, match="floating"):
        block_means(x[0], starts, 5)
    with pytest.raises(UsageError, match="int32"):
        block_means(x, starts.long(), 5)
    with pytest.raises(UsageError, match="batch and heads"):
        block_means(x, starts.expand(1, 2, -1), 5)
    with pytest.raises(UnknownNameError, match="triton"):
        block_means(x, starts, 5, impl="tritn")
    with pytest.raises(KernelUnavailable, match="float64|CUDA|triton"):
        block_means(x.double(), starts, 5, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [BLOCKS["ragged"], BLOCKS["unequal"]], ids=["ragged", "unequal"])
def test_deviations_and_directions_by_their_formulas(impl: str, device: str, blocks, dtype: torch.dtype):
    """Block by block in float64; the squared mean direction is the mean of the block's cosine matrix."""
    x = torch.randn(2, sum(blocks), 3, 24, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x[:, 2] = 0  # a token without a direction
    starts = starts_of(blocks, device)
    means = block_means(x, starts, max(blocks), impl=impl)
    spread = block_deviations(x, starts, max(blocks), means, impl=impl)
    center = x.double().mean(1).float()[:, :, None]
    plain = block_directions(x, starts, max(blocks), impl=impl)
    around = block_directions(x, starts, max(blocks), center, impl=impl)
    for i, (low, high) in enumerate(pairwise([0, *accumulate(blocks)])):
        part = x[:, low:high].double().cpu()
        if high == low:
            assert not spread[:, :, i].any() and not around[:, :, i].any()
            continue
        true = (part - part.mean(1, keepdim=True)).abs().mean(1)
        torch.testing.assert_close(spread[:, :, i].cpu().double(), true, rtol=1e-5, atol=1e-5)
        for found, shift in ((plain, 0.0), (around, center[:, None, :, 0].double().cpu())):
            unit = torch.nn.functional.normalize(part - shift, dim=-1)
            cosines = torch.einsum("bihd,bjhd->bhij", unit, unit).mean((-1, -2))
            torch.testing.assert_close(
                found[:, :, i].square().sum(-1).cpu().double(), cosines, rtol=1e-4, atol=1e-5
            )
    with pytest.raises(UsageError, match=r"means must be \(2, 3,"):
        block_deviations(x, starts, max(blocks), means[:1])
    with pytest.raises(UsageError, match=r"center must be \[B, H, 1, D\]"):
        block_directions(x, starts, max(blocks), center[:, :, 0])
