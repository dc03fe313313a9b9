"""diffusers' own caches beside us: results equal those of stock with the same cache, and leave with it."""

import functools

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig

STEPS = 5


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=0.6)


def pyramid(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: float(pipe.current_timestep),
    )


def faster(pipe):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 950),  # in the first step it has nothing to skip to, and fails
        current_timestep_callback=lambda: float(pipe.current_timestep),
        is_guidance_distilled=True,
    )


def mag(pipe):
    return MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, retention_ratio=0.2)


def taylor(pipe):
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*blocks\.\d+\.attn\d?"],  # its own patterns know no block of Wan
    )


CACHES = [first_block, pyramid, faster, mag, taylor]


@pytest.fixture(params=CACHES, ids=lambda cache: cache.__name__)
def cache(request):
    return request.param


def run(pipeline, pipe, **changes):
    # One branch: some of these caches keep one state for both, and are about nothing when these alternate.
    return pipeline.run(pipe, guidance=False, num_inference_steps=STEPS, **changes)


@functools.cache
def cached_truth(pipeline, cache):
    """Stock without the cache, and with it."""
    pipe = pipeline.make()
    plain = run(pipeline, pipe)
    pipe.transformer.enable_cache(cache(pipe))
    return plain, run(pipeline, pipe)


def test_beside_a_cache(pipeline, cache, when):
    plain, true = cached_truth(pipeline, cache)
    pipe = pipeline.make()
    if when == "before":
        pipe.transformer.enable_cache(cache(pipe))
    with pipeline.accelerate(pipe) as handle:
        if when == "after":  # what was learnt without the cache is no harm
            torch.testing.assert_close(run(pipeline, pipe), plain, rtol=1e-4, atol=1e-4)
            handle.report(clear=True)
            pipe.transformer.enable_cache(cache(pipe))
        for _ in range(2):
            torch.testing.assert_close(run(pipeline, pipe), true, rtol=1e-4, atol=1e-4)
        report = handle.report(clear=True)
        every = 2 * STEPS * len([s for s in handle._engines[0].seating.seats if s.layer is not None])
        assert 0 < report.sparse_calls < every and report.dense_calls == 0, "the cache skips some of them"
        pipe.transformer.disable_cache()
        torch.testing.assert_close(run(pipeline, pipe), plain, rtol=1e-4, atol=1e-4)
        assert handle.report().sparse_calls == every // 2
    torch.testing.assert_close(run(pipeline, pipe), plain, rtol=1e-5, atol=1e-6)
    assert not hooks_left(pipe.transformer)


@pytest.mark.parametrize("cache", [first_block, pyramid, taylor], ids=lambda cache: cache.__name__)
def test_removed_before_the_cache_is(pipeline, cache):
    _, true = cached_truth(pipeline, cache)
    pipe = pipeline.make()
    with pipeline.accelerate(pipe, 0.3):
        pipe.transformer.enable_cache(cache(pipe))
        run(pipeline, pipe)
    torch.testing.assert_close(run(pipeline, pipe), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"dense_above": 0.7}, {"dense_below": 0.8}], ids=str)
def test_what_a_cache_keeps_has_the_same_order_in_dense_steps(pipeline, cache, options):
    """Tokens kept in a dense step are used in a sparse one, and the other way round."""
    _, true = cached_truth(pipeline, cache)
    pipe = pipeline.make()
    pipe.transformer.enable_cache(cache(pipe))
    with pipeline.accelerate(pipe, order="tiles", **options) as handle:
        torch.testing.assert_close(run(pipeline, pipe), true, rtol=1e-4, atol=1e-4)
        report = handle.report()
        assert report.sparse_calls > 0 and report.dense_calls > 0 and report.fallbacks == {}


def hooks_left(transformer):
    return [
        name
        for module in transformer.modules()
        if hasattr(module, "_diffusers_hook")
        for name in module._diffusers_hook.hooks
    ]
