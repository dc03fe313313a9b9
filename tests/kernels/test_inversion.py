"""Plans read by columns, against their masks; and columns cut into work items."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UnknownNameError
from dit_accel.kernels.inversion import invert_plan
from dit_accel.kernels.inversion.inverse import SHORTEST, bounds, most_chunks
from dit_accel.plan import BlockPlan, uniform_starts


def make(lead, n_q: int, n_k: int, share: float, device: str, sinks: tuple[int, ...] = ()) -> BlockPlan:
    """A random plan of blocks of two tokens; every query block reads the sinks."""
    mask = torch.rand(*lead, n_q, n_k, generator=torch.Generator().manual_seed(n_q * 100 + n_k)) < share
    mask[..., sinks] = True
    return BlockPlan.from_mask(mask.to(device), uniform_starts(2 * n_q, 2), uniform_starts(2 * n_k, 2))


PLANS = {
    "one block": ((1, 1), 1, 1, 1.0, ()),
    "no entry": ((1, 2), 20, 40, 0.0, ()),
    "every entry": ((2, 1), 20, 33, 1.0, ()),
    "few entries": ((2, 3), 17, 70, 0.1, ()),
    "sinks": ((1, 2), 150, 40, 0.03, (0, 7, 39)),
    "more columns than rows": ((1, 1), 3, 200, 0.4, (1,)),
    "many rows": ((1, 1), 300, 5, 0.2, (4,)),
}


@pytest.mark.parametrize("name", PLANS)
def test_columns_are_those_of_the_mask(impl: str, device: str, name: str):
    lead, n_q, n_k, share, sinks = PLANS[name]
    plan = make(lead, n_q, n_k, share, device, sinks)
    found = invert_plan(plan, impl=impl)
    assert found.counts.shape == (*lead, n_k) and found.lists.shape == (*lead, n_k, n_q)
    assert {x.dtype for x in (found.counts, found.lists, found.items)} == {torch.int32}
    columns = plan.to_mask().transpose(2, 3).reshape(-1, n_k, n_q)
    for head, counts, lists in zip(
        columns, found.counts.flatten(0, 1), found.lists.flatten(0, 1), strict=True
    ):
        for column, count, entries in zip(head, counts.tolist(), lists.tolist(), strict=True):
            assert entries[:count] == column.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", PLANS)
def test_items_cover_every_column_once(impl: str, device: str, name: str):
    """Each entry in one item; cut columns first, their chunks in order and none too long; no more than was promised."""
    lead, n_q, n_k, share, sinks = PLANS[name]
    found = invert_plan(make(lead, n_q, n_k, share, device, sinks), impl=impl)
    most, slots = bounds(n_q, n_k)
    assert found.slots == slots and found.items.shape == (*lead, most, 4)
    for counts, items in zip(
        found.counts.flatten(0, 1).tolist(), found.items.flatten(0, 1).tolist(), strict=True
    ):
        longest = max(SHORTEST, -(-sum(counts) // most_chunks(n_k)))
        work = [item for item in items if item[0] >= 0]
        assert items == work + [[-1, 0, 0, 0]] * (most - len(work))
        pieces: dict[int, list] = {}
        for key, first, length, parts in work:
            pieces.setdefault(key, []).append((first, length))
            assert length <= longest and (parts > 1) == (counts[key] > longest)
        assert sorted(pieces) == list(range(n_k))
        for key, runs in pieces.items():
            assert [first for first, _ in runs] == [sum(n for _, n in runs[:i]) for i in range(len(runs))]
            assert sum(n for _, n in runs) == counts[key] and (len(runs) == 1 or all(n for _, n in runs))
        cut = [item for item in work if item[3] > 1]
        assert work[: len(cut)] == cut and len(cut) <= slots
        assert [item[0] for item in cut] == sorted(item[0] for item in cut)
        assert all(parts == len(pieces[key]) for key, _, _, parts in work)


def test_a_sink_is_cut(impl: str, device: str):
    """Read by every query block, 20 times the mean: no item is much longer than others."""
    found = invert_plan(make((1, 1), 150, 40, 0.03, device, (0,)), impl=impl)
    chunks = found.items[0, 0, :, 3].max().item()
    assert found.counts[0, 0, 0] == 150 and chunks >= 5
    assert found.items[0, 0, :, 2].max() <= 30


def test_bounds_hold_for_the_worst_columns():
    """As many columns as possible just above the longest chunk."""
    for n_q, n_k in ((9, 16), (16, 200), (64, 64), (1000, 300)):
        most, slots = bounds(n_q, n_k)
        for tall in range(n_k + 1):
            for height in {min(n_q, SHORTEST + 1), n_q // 2, n_q}:
                total = tall * height
                longest = max(SHORTEST, -(-total // most_chunks(n_k)))
                parts = max(1, -(-height // longest))
                assert (tall * parts if parts > 1 else 0) <= slots and n_k - tall + tall * parts <= most


def test_what_stands_behind_counts_is_not_read(impl: str, device: str):
    plan = make((1, 1), 40, 20, 0.3, device, (3,))
    slot = torch.arange(20, device=device)
    dirty = torch.where(slot < plan.counts[..., None], plan.indices, 2**30)
    found, expected = (invert_plan(x, impl=impl) for x in (replace(plan, indices=dirty), plan))
    assert torch.equal(found.counts, expected.counts) and torch.equal(found.items, expected.items)


def test_implementations_agree(impl: str, device: str):
    plan = make((2, 2), 130, 70, 0.2, device, (5, 69))
    found, expected = (invert_plan(plan, impl=name) for name in (impl, "reference"))
    assert torch.equal(found.counts, expected.counts) and torch.equal(found.items, expected.items)
    listed = torch.arange(130, device=device) < found.counts[..., None]
    assert torch.equal(found.lists[listed], expected.lists[listed])


def test_a_named_choice_runs_or_raises():
    plan = BlockPlan.full([0, 4], [0, 4])
    with pytest.raises(UnknownNameError, match="triton"):
        invert_plan(plan, impl="tritn")
    try:
        assert invert_plan(plan, impl="triton").counts.tolist() == [[[1]]]  # where it is interpreted
    except KernelUnavailable as refused:
        assert "triton" in str(refused)
