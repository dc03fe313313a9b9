"""Measures and extrapolation, against what they say."""

from __future__ import annotations

import pytest
import torch

from dit_accel.caches.mag import Cache as Mag
from dit_accel.caches.mag import ratios_of
from dit_accel.caches.parts.extrapolate import extrapolate
from dit_accel.caches.parts.measures import relative_l1, worst
from dit_accel.caches.schedule import Decisions, parse_schedule
from dit_accel.caches.trials import Trial, threshold_for
from dit_accel.errors import UsageError


def test_the_worst_of_a_batch_counts():
    reference = torch.ones(3, 4, 5)
    errors = relative_l1(reference + torch.tensor([0.0, 0.5, 0.25]).view(3, 1, 1), reference)
    torch.testing.assert_close(errors, torch.tensor([0.0, 0.5, 0.25]))
    assert worst(errors) == 0.5


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_are_continued_exactly_over_uneven_steps(order):
    levels = [0.97, 0.9, 0.7, 0.66]
    factors = torch.randn(order + 1, 6)

    def at(noise: float) -> torch.Tensor:
        return sum(factor * noise**i for i, factor in enumerate(factors))

    seen = [(noise, at(noise)) for noise in levels]
    torch.testing.assert_close(extrapolate(seen, 0.5, order), at(0.5), rtol=1e-4, atol=1e-4)


def test_few_or_equal_samples_lower_the_order():
    one, two = torch.ones(2), torch.full((2,), 3.0)
    assert torch.equal(extrapolate([(0.9, one)], 0.5, 2), one)
    assert torch.equal(extrapolate([(0.9, one), (0.9, two)], 0.5, 1), two)


def test_decisions_are_text_that_is_read_again():
    decisions = Decisions()
    assert decisions.text() == ""
    for step, computed in enumerate([True, False, True]):
        decisions.note("cond", step, computed)
        decisions.note("uncond", step, computed)
    assert decisions.text() == "101" and parse_schedule("101") == {None: "101"}
    decisions.note("cond, skip 7", 3, True)  # a branch of some steps only
    decisions.note("cond", 3, False)
    assert decisions.text() == "cond=1010; uncond=1011; cond, skip 7=1111"
    assert parse_schedule(decisions.text()) == {"cond": "1010", "uncond": "1011", "cond, skip 7": "1111"}
    decisions.note("cond", 3, True)  # the second forward of a branch in one step
    assert decisions.text() == "1011"
    decisions.clear()
    assert decisions.text() == ""


def test_a_prediction_is_no_alias_of_what_is_kept():
    kept = torch.ones(2)
    extrapolate([(0.9, kept)], 0.5, 0).add_(1)
    assert torch.equal(kept, torch.ones(2))


def trial(expected: float, error: float, step: int = 1, **figures: float) -> Trial:
    return Trial("transformer", "cond", step, 0.5, expected, error, tuple(figures.items()))


def test_the_threshold_for_an_error():
    trials = [trial(0.1, 0.01), trial(0.2, 0.02), trial(0.3, 0.2), trial(0.4, 0.03)]
    found = threshold_for(trials, 0.05)
    assert [t.error for t in trials if t.expected < found] == [0.01, 0.02]
    assert threshold_for(trials, 0.001) == 0
    found = threshold_for(trials, 1)
    assert all(t.expected < found for t in trials)


def test_ratios_come_from_trials_and_steps_are_matched():
    ratios = ratios_of([trial(0, 0, 1, ratio=0.9), trial(0, 0, 1, ratio=0.7), trial(0, 0, 2, ratio=0.5)])
    assert ratios == pytest.approx((1.0, 0.8, 0.5))
    cache = Mag(ratios=(1.0, 0.8, 0.5), steps=5)
    assert [cache._ratio(step) for step in range(5)] == [1.0, 1.0, 0.8, 0.5, 0.5]
    assert Mag(ratios=(1.0, 0.8))._ratio(2) == float("inf")
    with pytest.raises(UsageError, match="no ratios"):
        ratios_of([trial(0, 0)])
