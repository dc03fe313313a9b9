"""The best that is set by hand is one that takes about as long."""

from __future__ import annotations

import pytest

from dit_accel.preset import load_preset
from dit_accel.tuning.results import Tried
from dit_accel.tuning.runs import Likeness
from dit_accel.tuning.write import EQUAL, best_hand_set


def tried(name: str, cost: float, psnr: float) -> Tried:
    """One clip's run: of fewer steps, or of something that is not stock."""
    preset = load_preset("tiny-wan" if name.endswith("5 steps") else "tiny-wan-fast")
    return Tried(name, preset, cost, (Likeness(psnr, None, 1.0, 1.0, None),), (None,))


@pytest.mark.parametrize(
    ("cost", "found"),
    [
        (0.3, "dense, latent cache"),
        (0.3 + EQUAL, "dense, latent cache"),
        (0.31 + EQUAL, "keep 0.2 everywhere"),
        (1.4, "keep 0.2 everywhere"),
    ],
)
def test_what_takes_longer_is_not_the_best_however_like_dense_it_is(cost: float, found: str) -> None:
    slow, other = tried("dense, latent cache", cost, 40.0), tried("keep 0.2 everywhere", 0.32, 25.0)
    best = best_hand_set(tried("tuned, try 1", 0.3, 30.0), [slow, other])
    assert best is not None and best.name == found


def test_fewer_steps_are_not_set_by_hand_and_there_may_be_nothing() -> None:
    chosen = tried("tuned, try 1", 0.3, 30.0)
    others = [tried("5 steps", 0.31, 50.0), tried("keep 0.1 everywhere", 0.9, 50.0)]
    assert best_hand_set(chosen, others) is None
    assert best_hand_set(chosen, []) is None


def test_a_rival_may_be_called_as_it_likes() -> None:
    name = "keep 0.1, the first 2 dense, a plan every 4 steps"
    assert best_hand_set(tried("tuned, try 1", 0.3, 30.0), [tried(name, 0.31, 20.0)]).name == name
