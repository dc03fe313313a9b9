"""What a cache holds is what it declares, wherever it holds it."""

from __future__ import annotations

import pytest
import torch
from stepping import ALWAYS, Model, accelerate

from dit_accel.testing import (
    peak_bytes,
    tiny_wan_transformer,
)

FULL_MEMORIES = [
    {**ALWAYS, "max_consecutive": 1},
    {"name": "latent", "min_steps": 0, "threshold": 1e9, "order": 2, "warmup": 3},
    {"name": "first_block", "threshold": 1e9, "min_steps": 0},
    {"name": "first_block", "threshold": 1e9, "min_steps": 0, "order": 2, "warmup": 3},
    {"name": "tea", "threshold": 0.0, "min_steps": 0, "model": "wan21-14b"},
    {"name": "taylor", "min_steps": 0, "order": 2, "warmup": 9},
    {"name": "tokens", "min_steps": 0, "interval": 2, "selector": "staleness"},
]


def test_memory_is_what_was_declared():
    for cache in FULL_MEMORIES:
        model = Model(batch=2)
        handle = accelerate(model, cache)
        most = 0
        for time in (900, 800, 700, 600, 500):
            for branch in ("cond", "uncond"):
                out = model(branch, time)
            most = max(most, handle.report().bytes_held)
        engine = handle._caches[0]
        assert most == 2 * engine.declare(tuple(out.shape), 2 * 40, 0, 4), cache
        handle.remove()
        assert engine.bytes_held() == 0


@pytest.mark.parametrize("name", ["easy", "first_block", "tokens"])
def test_peak_memory_is_denses_and_what_is_declared(name):
    model = Model()
    model.transformer = tiny_wan_transformer(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024)
    model.resize(1, (5, 12, 12))
    times = (900, 800, 700)

    def run() -> None:
        for time in times:
            model("cond", time)

    run()
    dense, _ = peak_bytes(run)
    more = {"schedule": "101", "mlp_ratio": 0.3} if name == "tokens" else {"threshold": 0}
    handle = accelerate(model, {"name": name, "min_steps": 0, **more})
    run()
    cached, _ = peak_bytes(run)
    declared = handle._caches[0].declare(tuple(model("cond", 100).shape), 720, 0, 4)
    hidden = 720 * 256 * 4
    # tokens at the gate stay while the blocks behind it run, and new memory stands beside the old until it is put
    # (but for "tokens", which has one layer's at a time beside it)
    working = {"easy": declared, "first_block": declared + hidden, "tokens": 2 * hidden}[name]
    assert cached <= (dense + declared + working) * 1.02


@pytest.mark.parametrize(
    "given", [ALWAYS, {"name": "tokens", "schedule": "110", "max_stale": 2, "min_steps": 0}]
)
def test_memory_may_be_kept_on_the_cpu(given):
    model = Model()
    handle = accelerate(model, {**given, "store_device": "cpu"})
    outs = [model("cond", time) for time in (900, 800, 700)]
    handle.remove()
    accelerate(model, given)
    for out, time in zip(outs, (900, 800, 700), strict=True):
        assert torch.equal(out, model("cond", time))
