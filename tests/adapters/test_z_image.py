"""What the Z-Image adapter says about its tokens, held against the model itself. Image first, grids are odd."""

import pytest
import torch
from joint_models import FULL

import dit_accel
from dit_accel.adapters import find_adapter, z_image
from dit_accel.errors import FallbackError, LayoutError, UsageError
from dit_accel.methods import load_method
from dit_accel.testing import tiny_z_image_inputs, tiny_z_image_pipeline, tiny_z_image_transformer

# caption tokens of each row: all alike; filled up alike (no mask); padded; with and without
TEXTS = [(19,), (19, 19), (19, 30), (19, 40), (70, 5, 32)]


def run(transformer, inputs):
    """The images, `[B, C, F, H, W]`."""
    with torch.no_grad():
        return torch.stack(transformer(**inputs, return_dict=False)[0])


def accelerate(transformer, method="pooled", **options):
    """Strict sparse attention that reads everything, unless `keep` is given."""
    options = {"block": 16, "min_tokens": 0, "strict": True, **options}
    method = load_method(method, **FULL[method]) if "keep" not in options else method
    return dit_accel.accelerate(transformer, method=method, **options)


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("grid", [(9, 11), (8, 12), (5, 7)], ids=str)
def test_keeping_everything_is_stock_diffusers(grid, text):
    """99 tokens are filled up by 29, 96 by none, 35 by 29."""
    transformer = tiny_z_image_transformer()
    inputs = tiny_z_image_inputs(transformer, grid, text=text, batch=len(text))
    true = run(transformer, inputs)
    handle = accelerate(transformer)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    report = handle.report()
    assert report.sparse_calls == 3 and report.dense_calls == 0 and report.keep_achieved == 1
    handle.remove()
    assert torch.equal(run(transformer, inputs), true)


@pytest.mark.parametrize("method", FULL)
def test_keeping_everything_is_stock_diffusers_with_every_method(method):
    transformer = tiny_z_image_transformer()
    inputs = tiny_z_image_inputs(transformer, (9, 7), text=(19, 40), batch=2)
    true = run(transformer, inputs)
    handle = accelerate(transformer, method)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert handle.report().dense_calls == 0


def test_text_and_what_fills_up_reads_all_and_is_read_by_all():
    transformer = tiny_z_image_transformer()
    inputs = tiny_z_image_inputs(transformer, text=(19, 40), batch=2)
    true = run(transformer, inputs)
    engine = accelerate(transformer, keep=0.3)._engines[0]
    seen = []
    engine.observer = lambda call, layout, q, k, v, plan: seen.append((call, plan.to_token_mask()))
    assert float((run(transformer, inputs) - true).norm() / true.norm()) > 1e-2
    assert len(seen) == 6  # two groups of rows in three layers
    for call, mask in seen:
        valid = 29 + (32 if call.rows == (0,) else 64)
        assert call.segments[:2] == (("video", 0, 99), ("text", 99, 99 + valid))
        assert mask.shape[-1] == 99 + valid
        assert mask[..., 99:].all() and mask[..., 99:, :].all()
        assert 0.1 < mask[..., :99, :99].float().mean() < 0.8


def test_a_batch_row_is_the_same_in_other_company():
    transformer = tiny_z_image_transformer()
    accelerate(transformer, keep=0.3)
    pair, other = (tiny_z_image_inputs(transformer, text=(19, 40), batch=2, seed=seed) for seed in (0, 1))
    mixed = {name: [pair[name][0], other[name][1]] for name in ("x", "cap_feats")} | {"t": pair["t"]}
    first, second = run(transformer, pair), run(transformer, mixed)
    torch.testing.assert_close(second[:1], first[:1], rtol=1e-4, atol=1e-5)
    assert float((second[1:] - first[1:]).norm() / first[1:].norm()) > 1e-2
    alone = run(transformer, {name: rows[:1] for name, rows in pair.items()})
    torch.testing.assert_close(alone, first[:1], rtol=1e-4, atol=1e-5)


def test_tokens_keep_the_models_order_and_the_report_says_why():
    transformer = tiny_z_image_transformer()
    inputs = tiny_z_image_inputs(transformer)
    true = run(transformer, inputs)
    handle = accelerate(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert list(handle.report().token_orders) == ["raster: no hook reaches Z-Image's rotary table"]


def several_sizes(transformer):
    small, large = (tiny_z_image_inputs(transformer, grid) for grid in ((5, 7), (9, 11)))
    return {name: small[name] + large[name] for name in ("x", "cap_feats")} | {"t": torch.full((2,), 0.5)}


def omni(transformer):
    """A picture that is given and one that is made, a caption before each and one behind."""
    given, made = (tiny_z_image_inputs(transformer, grid) for grid in ((5, 7), (9, 11)))
    captions = [*given["cap_feats"], *made["cap_feats"], *given["cap_feats"]]
    return {
        "x": [[*given["x"], *made["x"]]], "t": made["t"], "cap_feats": [captions], "siglip_feats": [None],
        "image_noise_mask": [[0, 1]],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (several_sizes, "images of several sizes in one batch"),
        (omni, "Omni's captions and images stand in turn"),
    ],
)
def test_what_is_no_row_of_image_and_caption_runs_dense_and_says_so(make, why):
    transformer = tiny_z_image_transformer()
    inputs = make(transformer)
    with torch.no_grad():
        true = transformer(**inputs, return_dict=False)[0]
        handle = accelerate(transformer, strict=False)
        out = transformer(**inputs, return_dict=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(out, true, strict=True))
    report = handle.report()
    assert report.sparse_calls == 0 and dict(report.fallbacks) == {why: 3}
    accelerate(transformer)
    with pytest.raises(FallbackError, match="would run dense"), torch.no_grad():
        transformer(**inputs)


def test_half_a_patch_is_refused():
    transformer = tiny_z_image_transformer()
    inputs = tiny_z_image_inputs(transformer)
    inputs["x"] = [inputs["x"][0][..., :-1]]
    accelerate(transformer)
    with pytest.raises(LayoutError, match="whole patches of 1x2x2"):
        run(transformer, inputs)


def test_time_runs_upwards():
    transformer = tiny_z_image_transformer()
    inputs = z_image.plain(tiny_z_image_inputs(transformer, text=(19, 40), batch=2))
    facts = find_adapter(transformer).read(transformer, {**inputs, "t": torch.tensor([0.2, 0.2])})
    assert facts.timestep == pytest.approx(800)
    assert facts.grid == (1, 9, 11) and facts.text == 29 + 64 and facts.text_valid == (29 + 32, 29 + 64)


# -- step caches


def sample(pipe, *, seed=0, steps=12, batch=1, **call):
    def caption(length, seed):
        return [torch.randn(length, 24, generator=torch.Generator().manual_seed(seed)) for _ in range(batch)]

    noise = [torch.Generator().manual_seed(seed + row) for row in range(batch)]
    arguments = {"height": 18, "width": 22, "guidance_scale": 1.5, "output_type": "latent", **call}
    return pipe(
        prompt=None, prompt_embeds=caption(19, seed), negative_prompt_embeds=caption(40, 9),
        num_inference_steps=steps, generator=noise, **arguments,
    ).images  # fmt: skip


@pytest.mark.parametrize("cache", ["easy", "latent"])
def test_whole_steps_are_reused(cache):
    pipe = tiny_z_image_pipeline()
    stock = sample(pipe)
    with dit_accel.accelerate(pipe, cache={"name": cache, "threshold": 0}) as handle:
        assert torch.equal(sample(pipe), stock)
        assert handle.report().forwards == {"computed": 12}
    handle = dit_accel.accelerate(pipe, cache={"name": cache, "threshold": 1e9, "max_consecutive": 1})
    alone = sample(pipe)
    assert handle.decisions() == {"transformer": "110101010101"}
    assert 1e-4 < float((alone - stock).norm() / stock.norm()) < 0.5
    assert len(sample(pipe, seed=3, batch=2)) == 2
    assert torch.equal(sample(pipe), alone)
    sample(pipe, height=14)
    assert torch.equal(sample(pipe), alone)
    engine = handle._caches[0]
    most = engine.declare((2, 4, 1, 18, 22), 0, 0, 4)
    assert 0 < handle.report().bytes_held <= most
    handle.remove()
    assert torch.equal(sample(pipe), stock) and "forward" not in pipe.transformer.__dict__


def test_a_reused_step_is_what_it_says_by_hand():
    transformer = tiny_z_image_transformer()
    inputs = tiny_z_image_inputs(transformer, text=(19, 40), batch=2)

    def step(t):
        given = {**inputs, "x": [x * (1.5 - t) for x in inputs["x"]], "t": torch.full((2,), t)}
        with torch.no_grad():
            out = transformer(**given)
        assert isinstance(out.sample, list) and len(out.sample) == 2
        return torch.stack(given["x"]), torch.stack(out.sample)

    dit_accel.accelerate(transformer, cache={"name": "easy", "schedule": "110", "min_steps": 0})
    _, (x, out), (x_now, made) = (step(t) for t in (0.1, 0.2, 0.3))
    torch.testing.assert_close(made, x_now + (out - x), rtol=0, atol=1e-6)


def test_guidance_that_ends_early_begins_anew():
    """The batch has half the rows from then on: nothing of the larger one is reused."""
    pipe = tiny_z_image_pipeline()
    handle = dit_accel.accelerate(pipe, cache={"name": "latent", "threshold": 1e9})
    alone = sample(pipe, cfg_truncation=0.5)
    assert handle.report().computed_reasons["the branch's first step"] == 2
    assert torch.equal(sample(pipe, cfg_truncation=0.5), alone)


@pytest.mark.parametrize("at_step", range(7))
def test_a_run_after_an_exception_is_as_fresh(at_step):
    pipe = tiny_z_image_pipeline()
    dit_accel.accelerate(pipe, cache={"name": "easy", "threshold": 1e9, "max_consecutive": 1})
    fresh = sample(pipe)

    def stop(pipe, step, time, given):
        if step == at_step:
            raise KeyboardInterrupt
        return given

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, seed=1, callback_on_step_end=stop)
    assert torch.equal(sample(pipe), fresh)


def test_sparse_attention_stands_beside_a_cache():
    pipe = tiny_z_image_pipeline()
    cache = {"name": "easy", "schedule": "110101010101"}
    handle = dit_accel.accelerate(pipe, cache=cache, keep=0.3, min_tokens=0, block=16, strict=True)
    sample(pipe)
    report = handle.report()
    assert report.forwards == {"computed": 7, "reused": 5} and report.sparse_calls == 7 * 3


@pytest.mark.parametrize(("make", "reason"), [(several_sizes, "images of several sizes in one batch"), (omni, None)])
def test_forwards_of_other_forms(make, reason):
    """Omni's image that is made is cached; images of several sizes are not, with a reason."""
    transformer = tiny_z_image_transformer()
    inputs = make(transformer)
    handle = dit_accel.accelerate(transformer, cache={"name": "easy", "threshold": 1e9, "min_steps": 0})
    with torch.no_grad():
        shapes = [
            [tuple(x.shape) for x in transformer(**{**inputs, "t": torch.full_like(inputs["t"], t)})[0]]
            for t in (0.1, 0.2, 0.3)
        ]
    assert shapes[0] == shapes[1] == shapes[2]
    report = handle.report()
    if reason is None:
        assert report.forwards == {"computed": 2, "reused": 1}
    else:
        assert report.forwards == {"computed": 3} and report.computed_reasons == {reason: 3}


def test_caches_of_blocks_are_refused():
    transformer = tiny_z_image_transformer()
    with pytest.raises(UsageError, match="easy or latent"):
        dit_accel.accelerate(transformer, cache="first_block")
    assert "_diffusers_hook" not in transformer.__dict__
