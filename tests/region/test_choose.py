"""Which tokens are computed, against references that walk the tokens one by one."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.adapters import patches
from dit_accel.errors import UsageError
from dit_accel.region import Region
from dit_accel.region.choose import change, choose, choose_masked, draw, measure, read_mask
from dit_accel.region.steps import count_active, whole_steps


def by_hand(measured: list[float], left_out: list[int], count: int, high_ratio: float, starvation: float) -> list[int]:
    """The rule for one row, in words of plain Python: first the high end loses its share, then the low one."""
    dropped = len(measured) - count
    high = round(dropped * high_ratio)
    rest = list(range(len(measured)))
    rest.sort(key=lambda i: (-measured[i] * math.exp(-starvation * left_out[i]), i))
    rest = sorted(rest[high:])
    rest.sort(key=lambda i: (measured[i] * math.exp(starvation * left_out[i]), i))
    return sorted(rest[dropped - high :])


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("starvation", [0.0, 0.1, 2.0])
def test_the_choice_is_the_rule_and_rows_do_not_meet(high_ratio, starvation):
    measured, left_out = torch.rand(3, 41) + 0.01, torch.randint(0, 5, (3, 41))
    index = choose(measured, left_out, 17, high_ratio, starvation)
    for row in range(3):
        arguments = measured[row].double().tolist(), left_out[row].tolist()
        assert index[row].tolist() == by_hand(*arguments, 17, high_ratio, starvation)
        alone = choose(measured[row : row + 1], left_out[row : row + 1], 17, high_ratio, starvation)
        assert torch.equal(alone[0], index[row])


@pytest.mark.parametrize("high_ratio", [0.0, 0.5, 1.0])
def test_no_token_starves_at_either_end(high_ratio):
    """With a measure that never changes, starvation alone must bring every token back."""

    def longest_wait(starvation: float) -> int:
        measured = torch.linspace(1, 2, 40)[None]
        left_out, longest = torch.zeros(1, 40, dtype=torch.int32), 0
        for _ in range(30):
            index = choose(measured, left_out, 20, high_ratio, starvation)
            left_out = (left_out + 1).scatter(1, index, 0)
            longest = max(longest, int(left_out.max()))
        return longest

    assert longest_wait(0.0) == 30 and longest_wait(0.3) <= 4


def test_ties_and_zeros_go_by_index():
    assert choose(torch.zeros(1, 6), torch.zeros(1, 6), 3, 0.0, 0.1).tolist() == [[3, 4, 5]]
    assert choose(torch.zeros(1, 6), torch.zeros(1, 6), 3, 1.0, 0.1).tolist() == [[3, 4, 5]]
    many_steps = choose(torch.ones(1, 6), torch.tensor([[0, 0, 0, 900, 900, 900]]), 3, 0.0, 1.0)
    assert many_steps.tolist() == [[3, 4, 5]]  # e^900 is no number


def test_a_mask_comes_first_and_the_rest_takes_turns():
    mask = torch.tensor([[False, True, False, False, True, False]])
    left_out = torch.zeros(1, 6, dtype=torch.int32)
    seen = []
    for _ in range(4):
        index = choose_masked(mask, left_out, 3)
        seen.append(index[0].tolist())
        left_out = (left_out + 1).scatter(1, index, 0)
    assert seen == [[0, 1, 4], [1, 2, 4], [1, 3, 4], [1, 4, 5]]
    # more foreground than may be computed: it takes turns too
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert choose_masked(everything, torch.tensor([[0, 2, 1, 3]]), 2).tolist() == [[1, 3]]


def test_measures_are_of_channels_and_their_mean_is_of_places():
    cells = torch.randn(2, 5, 4, 16)
    std, norm = torch.zeros(2, 5), torch.zeros(2, 5)
    for b in range(2):
        for s in range(5):
            places = [place.tolist() for place in cells[b, s]]
            means = [sum(place) / 16 for place in places]
            spread = zip(places, means, strict=True)
            std[b, s] = sum(math.sqrt(sum((x - mean) ** 2 for x in place) / 16) for place, mean in spread) / 4
            norm[b, s] = sum(math.sqrt(sum(x * x for x in place)) for place in places) / 4
    torch.testing.assert_close(measure(cells, "std"), std)
    torch.testing.assert_close(measure(cells, "l2"), norm)
    assert measure(cells.bfloat16(), "std").dtype == torch.float32


def test_the_lot_is_the_same_for_a_step_and_another_for_the_next():
    assert torch.equal(draw(50, 1, 3), draw(50, 1, 3))
    assert not torch.equal(draw(50, 1, 3), draw(50, 1, 4)) and not torch.equal(draw(50, 1, 3), draw(50, 2, 3))


@pytest.mark.parametrize(("grid", "patch"), [((3, 2, 5), (1, 2, 2)), ((1, 3, 4), (2, 2)), ((2, 1, 3), (2, 1, 3))])
def test_latents_by_tokens_and_back(grid, patch):
    sizes = [n * p for n, p in zip(grid[-len(patch) :], patch, strict=True)]
    latents = torch.randn(2, 4, *sizes)
    cells = patches.split(latents, grid, patch)
    tokens = torch.arange(math.prod(grid[-len(patch) :])).expand(2, -1)
    owner = patches.spread(tokens, grid, patch)
    assert owner.shape == (2, 1, *sizes)
    for token in tokens[0].tolist():
        where = owner[0, 0] == token
        inside = latents[1][:, where]  # [C, P], places in raster order
        assert torch.equal(cells[1, token], inside.T)
        first = torch.nonzero(where)[0] // torch.tensor(patch)
        assert token == sum(int(x) * math.prod(grid[-len(patch) :][i + 1 :]) for i, x in enumerate(first))
    assert patches.split(latents[:, :, 1:], grid, patch) is None


def test_masks_are_of_the_grid():
    mask = torch.zeros(2, 3, 4)
    mask[1, 2, 3] = 5
    assert read_mask(mask, (2, 3, 4), 2).nonzero().tolist() == [[0, 23], [1, 23]]
    assert read_mask(torch.stack([mask, 1 - mask]), (2, 3, 4), 2)[1].sum() == 24
    with pytest.raises(UsageError, match=r"mask has shape \(6, 4\), and this run has \(2, 3, 4\)"):
        read_mask(torch.zeros(6, 4), (2, 3, 4), 1)


@pytest.mark.parametrize(
    ("ratio", "bucket", "tokens", "expected"),
    [(0.5, 64, 32760, 16384), (0.5, 64, 180, 128), (0.1, 64, 640, 64), (0.1, 64, 60, 60), (1.0, 64, 100, 100),
     (0.01, 8, 80, 8), (0.7, 10, 100, 70)],
)  # fmt: skip
def test_counts_are_whole_buckets(ratio, bucket, tokens, expected):
    assert count_active(Region(sample_ratio=ratio, bucket=bucket), tokens) == expected


def test_steps_that_compute_everything():
    assert list(whole_steps(Region(start=4, error_reset=(12, 22)), 28)) == [0, 1, 2, 3, 12, 22, 27]
    assert list(whole_steps(Region(start=0.25, error_reset=(0.5,)), 8)) == [0, 1, 4, 7]
    assert list(whole_steps(Region(start=0, error_reset=()), 5)) == [0, 4]
    # a reset beyond the end, and a start beyond it
    assert list(whole_steps(Region(start=2, error_reset=(12,)), 4)) == [0, 1, 3]
    assert list(whole_steps(Region(start=9), 4)) == [0, 1, 2, 3]
    assert whole_steps(Region(start=1, error_reset=(4,)), 5)[4] == "error reset"


def test_change_is_by_step_and_by_place():
    before, now = torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 3)
    now[0, 0, :, 0] = 6.0  # every place of the first token by 6
    now[0, 1, 0, 1:] = torch.tensor([3.0, 4.0])  # one place of the second by 5
    assert change(now, before, torch.tensor([[3, 1]])).tolist() == [[2.0, 1.25]]
