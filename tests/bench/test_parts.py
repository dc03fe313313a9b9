"""Clocks around the parts of a run, torch's dense kernels, and fewer steps at equal time."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from dit_accel import accelerate
from dit_accel.bench.dense_kernels import rank_kernels, using
from dit_accel.bench.equal_time import at_cost, compare_at_equal_time, neighbours, steps_in
from dit_accel.bench.profile import Seen, break_down, profile
from dit_accel.bench.results import Breakdown, MadeClip, Memory, Quality, Variant
from dit_accel.errors import DitAccelError
from dit_accel.preset import Preset, load_preset
from dit_accel.testing import tiny_wan_pipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps: int = 2) -> torch.Tensor:
    return pipe(
        "x", num_frames=5, height=64, width=64, num_inference_steps=steps, output_type="pt",
        generator=torch.Generator("cpu").manual_seed(1),
    ).frames  # fmt: skip


def fast() -> Preset:
    return load_preset("wan21-fast").with_values(
        {"sparse.block": 16, "sparse.min_tokens": 0, "sparse.dense_above": 1.0, "sparse.dense_layers": ()}, "test"
    )


@pytest.mark.parametrize("preset", [None, fast()], ids=["dense", "sparse"])
def test_parts_of_a_run(pipe, preset, one_thread) -> None:
    stock = generate(pipe)
    processors = dict(pipe.transformer.attn_processors)
    made = []
    seen = profile(pipe, preset, lambda: made.append(generate(pipe)))
    assert torch.equal(made[0], stock) == (preset is None), "the dense run with clocks is diffusers to the bit"
    assert seen.grid == (2, 4, 4) and seen.attended == 32 and seen.shape[1] == 32
    assert seen.forwards == 4  # two steps, two branches
    assert 0 < seen.attention < seen.transformer < seen.whole
    assert 0 < seen.text_encoder and 0 < seen.vae_decode
    assert seen.text_encoder + seen.transformer + seen.vae_decode <= seen.whole
    # and nothing of it is left
    assert pipe.transformer.attn_processors == processors
    assert "decode" not in vars(pipe.vae)
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks


def test_a_slower_part_shows_where_it_is(pipe, one_thread) -> None:
    decode = pipe.vae.decode

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return decode(*args, **kwargs)

    pipe.vae.decode = slow
    try:
        seen = profile(pipe, None, lambda: generate(pipe))
        assert vars(pipe.vae)["decode"] is slow
    finally:
        del pipe.vae.decode
    assert seen.vae_decode > 0.3


def test_nothing_to_measure(pipe) -> None:
    with pytest.raises(DitAccelError, match="no self-attention of WanPipeline ran"):
        profile(pipe, None, lambda: None)


def test_a_handle_tells_its_engines_and_they_are_as_made(pipe, one_thread) -> None:
    with accelerate(pipe, fast()) as handle:
        (engine,) = handle.engines
        generate(pipe)
        assert "attend" not in vars(engine)
        assert handle.report().sparse_calls == 2 * 2 * len(pipe.transformer.blocks)


def test_the_parts_add_up() -> None:
    seen = Seen(10.0, 1.0, 6.0, 4.0, 2.0, 4, (1, 32, 2, 8), (2, 4, 4), 32)
    parts = break_down(seen, 5.0)
    assert parts == Breakdown(0.5, 2.0, 1.0, 1.0, 0.5, 10.0)
    assert parts.total == 5.0 and parts.attention_share == 0.4


def test_torchs_kernels_are_ranked_and_chosen(one_thread) -> None:
    shape = (1, 512, 2, 32)
    ranked = rank_kernels(shape, torch.float32, torch.device("cpu"))
    assert set(ranked) == {"flash_attention", "math"}, "what a CPU has"
    assert list(ranked.values()) == sorted(ranked.values()) and min(ranked.values()) > 0
    q = torch.randn(1, 2, 512, 32)

    def chosen() -> str:
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name

    for order, expected in ((("math", "flash_attention"), "MATH"), (("flash_attention", "math"), "FLASH_ATTENTION")):
        with using(order):
            assert chosen() == expected
    before = chosen()
    with using(()):
        assert chosen() == before


def test_scores_that_would_not_fit_are_not_written_out() -> None:
    assert list(rank_kernels((1, 17000, 1, 1), torch.float32, torch.device("cpu"))) == ["flash_attention"]


def test_steps_in_the_same_time() -> None:
    parts = Breakdown(1.0, 4.0, 3.0, 1.0, 1.0, 12.0)  # two of ten seconds do not depend on the steps
    assert steps_in(6.0, 10.0, parts, 8) == 4.0
    assert steps_in(10.0, 10.0, parts, 8) == 8.0
    assert steps_in(12.0, 20.0, parts, 8) == 4.0  # a median run of twice the time
    assert [neighbours(steps, 8) for steps in (4.0, 4.3, 7.6, 0.2, -3.0)] == [(4, 4), (4, 5), (7, 7), (1, 1), (1, 1)]


def test_psnr_at_equal_time() -> None:
    fewer = {4: variant(4, 20.0), 5: variant(5, 24.0)}
    preset = replace(variant(8, 30.0), name="fast")
    rival = compare_at_equal_time(preset, 4.25, fewer)
    assert rival.psnr_db == pytest.approx(21.0) and rival.preset_psnr_db == 30.0
    assert (rival.below, rival.above, rival.steps) == ("4 steps", "5 steps", 4.25)
    assert compare_at_equal_time(preset, 5.0, fewer).psnr_db == 24.0
    assert compare_at_equal_time(preset, 6.0, fewer) is None
    assert compare_at_equal_time(preset, 7.7, {7: variant(7, 25.0)}).psnr_db == 25.0  # no more steps than all but one
    assert compare_at_equal_time(preset, 4.5, {4: fewer[4], 5: variant(5, None)}).psnr_db is None
    assert at_cost([(4.0, 20.0), (5.0, 24.0)], 4.5) == 22.0


def variant(steps: int, psnr: float | None) -> Variant:
    quality = Quality(psnr is None, psnr, 0.9, 0, psnr, (psnr,), 1.0, 0.0, None, "not run")
    clip = MadeClip(0, (), (), None, quality)
    none = Memory(None, None, "a CPU")
    name = f"{steps} steps"
    return Variant(name, "fewer steps", "", None, steps, 0.0, (), 1.0, (1.0, 1.0), None, none, None, (clip,))
