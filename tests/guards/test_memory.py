"""Memory that runs out in what a cache or region sampling keeps: the run ends, the next one is as fresh."""

import pytest
import torch

from dit_accel.caches.memory import Memory
from dit_accel.guards.memory import explain, first_words, is_out_of_memory
from dit_accel.region.engine import RegionEngine
from dit_accel.testing import tiny_wan_pipeline

STEPS = 5
CACHE = {"cache": {"name": "easy", "schedule": "10101", "min_steps": 0}}
REGION = {"region": {"sample_ratio": 0.5, "bucket": 4, "start": 1, "error_reset": ()}}
STORES = {"cache": (CACHE, Memory, "put"), "region": (REGION, RegionEngine, "store")}
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")


@pytest.mark.parametrize("time", [1, 2, 4])
@pytest.mark.parametrize("what", STORES)
def test_the_next_run_is_as_fresh(what, time, pipe, sample, accelerate, monkeypatch):
    """Under the same handle, whichever store it was; a branch may have kept its step already."""
    options, cls, name = STORES[what]
    store, calls = getattr(cls, name), [0]

    def run_out(*args):
        calls[0] += 1
        if calls[0] == time:
            raise MEMORY
        return store(*args)

    with accelerate(pipe, **options, predict_every=2) as handle:
        fresh = sample(pipe, steps=STEPS)
        report = handle.report(clear=True)
        monkeypatch.setattr(cls, name, run_out)
        with pytest.raises(torch.OutOfMemoryError):  # torch's own, which hosts may know what to do with
            sample(pipe, steps=STEPS, seed=1)
        assert calls == [time] and handle.report(clear=True).fallbacks == {}
        monkeypatch.undo()
        assert torch.equal(sample(pipe, steps=STEPS), fresh)
        again = handle.report()
        assert again.forwards == report.forwards and again.regions == report.regions and again.plans == report.plans


def test_needs_are_what_was_declared_and_held(sample, accelerate):
    pipe = tiny_wan_pipeline()
    with accelerate(pipe, **CACHE) as handle:
        assert handle.needs() == {}  # nothing is known yet
        sample(pipe, steps=STEPS)
        latents = (1, 16, 2, 12, 14)
        declared = handle._caches[0].declare(latents, 84, 0, 4)
        needs = handle.needs()
        assert needs.pop("step cache 'easy' of transformer, for each branch") == declared > 0
        assert needs.keys() <= {"sparse attention"}
    with accelerate(pipe, **REGION) as handle:
        sample(pipe, steps=STEPS)
        kept = 84 * 64 * 4 + 2 * 2 * 84 * 24 * 4  # velocities; keys and values of two layers
        assert handle.needs()["region sampling of transformer, for each branch"] == kept


def test_the_line():
    needs = {"step cache 'easy' of transformer, for each branch": 2**29, "sparse attention": 3 * 2**30}
    assert str(explain(MEMORY, needs, "Try fewer frames.")) == (
        "CUDA out of memory. Tried to allocate 20.00 GiB. Wanted beside the model's own: 0.5 GiB by step cache 'easy' "
        "of transformer, for each branch, 3 GiB by sparse attention. Try fewer frames."
    )
    assert first_words(MemoryError()) == "out of memory" and explain(MEMORY, {}, "Try.").exit_code == 1


def test_what_is_out_of_memory():
    """torch says it in three ways."""
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value) and is_out_of_memory(MEMORY) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(KeyboardInterrupt())
