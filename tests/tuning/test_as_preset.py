"""Allocations in the words of presets: what is written is what runs."""

from __future__ import annotations

import itertools

import numpy as np

from dit_accel.methods import load_method
from dit_accel.options import SparseOptions
from dit_accel.planner import Planner
from dit_accel.preset import load_preset
from dit_accel.report import Tally
from dit_accel.trajectory import Call, Trajectory
from dit_accel.tuning.as_preset import load, tables_of, to_toml
from dit_accel.tuning.problem import Allocation

NOISE = [0.99, 0.95, 0.9, 0.7, 0.5, 0.2]
BUCKET = [0, 0, 1, 1, 2, 2]
KEEPS = (0.5, 0.2)
SPARSE = SparseOptions.from_mapping({"keep": 0.2, "neighbours": 1, "order": "tiles", "tile": (2, 4, 4)})


def written(allocation: Allocation):
    base = load_preset("tiny-wan")
    return load(to_toml("mine", tables_of(base, SPARSE, allocation, KEEPS, NOISE, BUCKET)), "mine", "here")


def test_every_layer_and_step_gets_its_keep() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        keeps = tuple(map(tuple, rng.integers(0, 3, (4, 3)).tolist()))
        if not any(map(any, keeps)):
            continue
        preset = written(Allocation((True,) * 6, keeps))
        assert preset.cache is None and preset.generate == load_preset("tiny-wan").generate
        assert preset.sparse.tile == (2, 4, 4) and preset.sparse.method_options == {"neighbours": 1}
        method = load_method("pooled", keep=preset.sparse.keep, neighbours=1)
        planner = Planner(preset.sparse, method, Trajectory(), Tally(), 4)
        for layer, step in itertools.product(range(4), range(6)):
            call = Call(1, "cond", step, NOISE[step], (2, 4, 4), (("video", 0, 32),), "transformer", 4, layer)
            place = keeps[layer][BUCKET[step]]
            assert planner.is_dense(call) == (place == 0)
            if place:
                assert planner.method_at(call).keep == KEEPS[place - 1]


def test_what_agrees_is_said_once() -> None:
    assert written(Allocation((True,) * 6, ((2, 2, 2),) * 4)).sparse.rules == ()
    preset = written(Allocation((True,) * 6, ((0, 0, 2),) * 4))
    (rule,) = preset.sparse.rules
    assert rule.dense and rule.layers is None and rule.above == 0.6 and rule.below is None


def test_steps_and_nothing_sparse() -> None:
    computed = (True, True, False, True, False, False)
    preset = written(Allocation(computed, ((0, 0, 0),) * 4))
    assert preset.sparse is None
    assert (preset.cache.name, preset.cache.schedule, preset.cache.min_steps) == ("latent", "110100", 6)
    assert written(Allocation((True,) * 6, ((0, 0, 0),) * 4)).is_stock


def test_texts_survive_toml() -> None:
    base = load_preset("tiny-wan").with_values({"generate.negative_prompt": 'a "b"\\ \x7f \x01 \U0001f600'}, "cli")
    text = to_toml("mine", tables_of(base, SPARSE, Allocation((True,) * 6, ((1, 1, 1),) * 4), KEEPS, NOISE, BUCKET))
    assert load(text, "mine", "here").generate == base.generate
