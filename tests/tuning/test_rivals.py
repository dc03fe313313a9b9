"""What a tuned preset is compared with: at no less time, as one would set it by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dit_accel.options import SparseOptions
from dit_accel.preset import load_preset
from dit_accel.tuning.predictor import HOLD, Predictor
from dit_accel.tuning.problem import Problem
from dit_accel.tuning.rivals import Rival, list_rivals

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw

KEEPS = (0.5, 0.35, 0.2)
STEPS, LAYERS = 8, 3
EXPECTED = [[None, 0.4, 0.2, 0.3, 0.1, 0.1, 0.05, 0.2]]


def rivals(
    problem: Problem, cost: float, base: str = "tiny-wan", expected=(), predictor: Predictor = HOLD
) -> dict[str, Rival]:
    options = SparseOptions(method="pooled", keep=0.2)
    found = list(list_rivals(problem, KEEPS, load_preset(base), options, cost, expected, predictor))
    named = {one.name: one for one in found}
    assert len(named) == len(found)
    return named


def problem() -> Problem:
    return draw(0, n=STEPS, layers=LAYERS, buckets=2, keeps=len(KEEPS))  # keeps save 0.2, 0.4 and 0.6 of a forward


def time_of(dense: int, keep: float) -> float:
    return 1 - {0.5: 0.2, 0.35: 0.4, 0.2: 0.6}[keep] * (STEPS - dense) / STEPS


@pytest.mark.parametrize("cost", [0.45, 0.55, 0.65, 0.7, 0.83])
def test_each_keep_has_as_few_dense_steps_as_take_no_less_time(cost: float) -> None:
    found = {name: one for name, one in rivals(problem(), cost).items() if name.startswith("keep")}
    assert 1 <= len(found) <= len(KEEPS)
    everywhere = 0
    for one in found.values():
        sparse = one.preset(load_preset("tiny-wan")).sparse
        first = sum(level > sparse.dense_above for level in problem().noise)
        where = f", the first {first} dense" if first else " everywhere"
        assert one.name == f"keep {sparse.keep:g}{where}"
        assert time_of(first, sparse.keep) >= cost - 1e-6
        assert first == 0 or time_of(first - 1, sparse.keep) < cost
        everywhere += first == 0
    assert everywhere == (cost <= 0.8)  # no keep takes as long as 0.83 by itself
    kept = {one.preset(load_preset("tiny-wan")).sparse.keep for one in found.values()}
    assert 0.2 in kept  # the smallest may always be brought to the time


def test_a_keep_that_saves_nothing_is_no_rival() -> None:
    slow = replace(problem(), saved=problem().saved * [1, -1, 1, 1])
    assert not any("0.5" in name for name in rivals(slow, 0.9))


def test_the_base_presets_own_sparse_attention_runs_as_it_is() -> None:
    assert not any(name.startswith("sparse") for name in rivals(problem(), 0.6))
    one = rivals(problem(), 0.6, "tiny-wan-fast")["sparse as tiny-wan-fast"]
    preset = one.preset(load_preset("tiny-wan"))
    assert preset.sparse == load_preset("tiny-wan-fast").sparse and preset.cache is None


def test_caches_are_on_however_few_the_steps() -> None:
    found = rivals(problem(), 0.6, "tiny-wan-fast", EXPECTED, Predictor(1, "noise"))
    cached = {name: one for name, one in found.items() if "cache" in name}
    assert list(cached) == [
        "keep 0.35 everywhere, latent cache",
        "sparse as tiny-wan-fast, latent cache",
        "dense, latent cache",
        "dense, latent cache of order 1 over noise",
    ]
    few = load_preset("tiny-wan").with_values({"generate.steps": STEPS}, "few")
    for one in cached.values():
        assert one.preset(few, 0.3).cache.min_steps == STEPS and one.preset(few, 0.3).cache.threshold == 0.3
        assert one.preset(load_preset("tiny-wan")).cache.min_steps == 10
    assert cached["dense, latent cache of order 1 over noise"].preset(few).cache.order == 1
    assert not any("cache" in name for name in rivals(problem(), 0.6, "tiny-wan-fast"))
