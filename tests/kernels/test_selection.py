"""Block selection against a plain loop, ties, forced blocks and both budgets included."""

from __future__ import annotations

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.selection import select_blocks


def by_hand(scores, forced, least, top_p, shares) -> list[list[int]]:
    """The chosen blocks of every row, one at a time."""
    rows = []
    n_q = scores.shape[2]
    for number, row in enumerate(scores.flatten(0, 2).tolist()):
        must = set() if forced is None else set(forced[number % n_q].nonzero().flatten().tolist())
        order = sorted(range(len(row)), key=lambda j: (j not in must, -row[j], j))
        count = max(least, len(must))
        if top_p is not None:
            share = shares.flatten(0, 2)[number].double()
            mass, needed = 0.0, 0
            while mass < top_p and needed < len(row):
                mass += float(share[order[needed]])
                needed += 1
            count = max(count, needed)
        rows.append(sorted(order[:count]))
    return rows


def chosen(counts: torch.Tensor, indices: torch.Tensor) -> list[list[int]]:
    pairs = zip(counts.flatten().tolist(), indices.flatten(0, 2).tolist(), strict=True)
    return [row[:count] for count, row in pairs]


@pytest.mark.parametrize("forcing", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("least", [1, 4, 23])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_the_best_blocks_are_chosen(impl: str, device: str, ties: bool, least: int, forcing: bool):
    generator = torch.Generator().manual_seed(least)
    scores = torch.randn(2, 2, 5, 23, generator=generator)
    if ties:
        scores = scores.round()
        scores[0, 0, 0] = torch.tensor([0.0, -0.0]).repeat(12)[:23]
        scores[0, 0, 1] = -torch.inf
    forced = torch.rand(5, 23, generator=generator) < 0.2 if forcing else None
    counts, indices = select_blocks(
        scores.to(device), None if forced is None else forced.to(device), least, impl=impl
    )
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.shape[3] == (23 if forcing else least)
    assert chosen(counts, indices) == by_hand(scores, forced, least, None, None)
    behind = torch.arange(indices.shape[3], device=device) >= counts[..., None]
    assert (indices[behind] == 22).all()


@pytest.mark.parametrize("least", [-3, 1, 4, 99])
@pytest.mark.parametrize("top_p", [None, 0.3])
def test_budgets_on_the_device_are_read_there(impl: str, device: str, least: int, top_p: float | None):
    """As the same numbers from the host, but the lists are as wide as the key blocks; out of range is brought in."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 5, 23, generator=generator)
    shares = None if top_p is None else scores.softmax(-1).to(device)
    there = torch.tensor(least, dtype=torch.int32, device=device)
    mass = None if top_p is None else torch.tensor(top_p, device=device)
    counts, indices = select_blocks(scores.to(device), None, there, mass, shares, impl=impl)
    expected = select_blocks(scores.to(device), None, min(max(least, 1), 23), top_p, shares, impl=impl)
    assert indices.shape[3] == 23
    assert torch.equal(counts, expected[0]) and chosen(counts, indices) == chosen(*expected)


def test_budgets_on_the_device_are_checked():
    scores = torch.randn(1, 1, 2, 4)
    for budgets in (
        (torch.tensor(2.0), None),
        (torch.ones(2, dtype=torch.int32), None),
        (1, torch.tensor(1)),
    ):
        with pytest.raises(UsageError, match="as a tensor is one"):
            select_blocks(scores, None, *budgets, scores if budgets[1] is not None else None)


@pytest.mark.parametrize("forcing", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_the_mass_is_reached(impl: str, device: str, top_p: float, forcing: bool):
    """Eighths add up exactly, so that no order of summing can change the answer."""
    generator = torch.Generator().manual_seed(int(top_p * 100))
    scores = torch.randn(1, 3, 4, 17, generator=generator)
    shares = torch.randint(0, 3, scores.shape, generator=generator).float() / 8
    forced = torch.rand(4, 17, generator=generator) < 0.2 if forcing else None
    counts, indices = select_blocks(
        scores.to(device),
        None if forced is None else forced.to(device),
        2,
        top_p,
        shares.to(device),
        impl=impl,
    )
    assert chosen(counts, indices) == by_hand(scores, forced, 2, top_p, shares)


@pytest.mark.parametrize("there", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("forcing", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("above", [-9.0, 0.5, 9.0])
def test_all_blocks_above_a_score_are_chosen(
    impl: str, device: str, above: float, forcing: bool, there: bool
):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 3, 4, 17, generator=generator)
    forced = torch.rand(4, 17, generator=generator) < 0.2 if forcing else None
    wanted = scores >= above
    wanted |= forced if forcing else False
    rows = by_hand(scores, forced, 2, None, None)
    for row, more in zip(rows, wanted.flatten(0, 2), strict=True):
        if more.sum() > len(row):
            row[:] = more.nonzero().flatten().tolist()
    counts, indices = select_blocks(
        scores.to(device),
        None if forced is None else forced.to(device),
        2,
        above=torch.tensor(above, device=device) if there else above,
        impl=impl,
    )
    assert chosen(counts, indices) == rows and indices.shape[3] == 17


def test_mass_that_is_never_reached_takes_everything(impl: str, device: str):
    scores = torch.randn(1, 1, 2, 9, generator=torch.Generator().manual_seed(0)).to(device)
    counts, indices = select_blocks(scores, None, 1, 1.0, torch.full_like(scores, 0.01), impl=impl)
    assert chosen(counts, indices) == [list(range(9))] * 2


@pytest.mark.parametrize("n_keys", [1, 16, 300])
def test_rows_of_any_length(impl: str, device: str, n_keys: int):
    scores = torch.randn(1, 1, 3, n_keys, generator=torch.Generator().manual_seed(n_keys))
    least = max(1, n_keys // 3)
    counts, indices = select_blocks(scores.to(device), None, least, impl=impl)
    assert chosen(counts, indices) == by_hand(scores, None, least, None, None)


def test_what_does_not_fit_is_refused():
    scores = torch.randn(1, 1, 2, 8)
    with pytest.raises(UsageError, match="float32"):
        select_blocks(scores.half(), None, 2)
    with pytest.raises(UsageError, match="1 to 8"):
        select_blocks(scores, None, 9)
    with pytest.raises(UsageError, match="forced"):
        select_blocks(scores, torch.zeros(2, 7, dtype=torch.bool), 2)
    with pytest.raises(UsageError, match="top_p and shares"):
        select_blocks(scores, None, 2, 0.5)
    with pytest.raises(UnknownNameError, match="triton"):
        select_blocks(scores, None, 2, impl="tritn")
    with pytest.raises(KernelUnavailable, match="4096|CUDA|triton"):
        select_blocks(torch.randn(1, 1, 1, 5000), None, 2, impl="triton")
