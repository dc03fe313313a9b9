"""What the MiniMax-H3 adapter says about its packed sequence, held against the model itself. Odd grids, video last."""

import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference, MiniMaxH3VideoReference
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3Ref2VAPrepareLayoutStep
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from joint_models import FULL, ORDERS, sparse

import dit_accel
from dit_accel.adapters import find_adapter, minimax_h3
from dit_accel.errors import FallbackError, LayoutError
from dit_accel.methods import load_method
from dit_accel.testing import tiny_minimax_h3_inputs, tiny_minimax_h3_transformer

LAYOUT = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
# what may be reordered
REORDERED = {"text": {}, "key frames": {"keyframes": ("first", "last")}, "no sound": {"audio": 0}}


def run(transformer, inputs):
    """Video and sound side by side, `[B, all numbers]`."""
    with torch.no_grad():
        return torch.cat([x.flatten(1) for x in transformer(**inputs, return_dict=False)], 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", REORDERED.values(), ids=REORDERED)
def test_keeping_everything_is_stock_diffusers_in_every_order(kind, order, batch):
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer, batch=batch, **kind)
    true = run(transformer, inputs)
    processor = sparse(transformer, order=order)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    report = processor.report
    assert report.sparse_calls == 2 and report.dense_calls == 0 and report.keep_achieved == 1
    assert report.cross_attention_calls == 1 and set(report.token_orders) == {order}, "the refiner's is left alone"


@pytest.mark.parametrize("method", FULL)
def test_keeping_everything_is_stock_diffusers_with_every_method(method):
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer, (3, 5, 6), keyframes=("first",), text=1, batch=2)
    true = run(transformer, inputs)
    processor = sparse(transformer, method)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert processor.report.dense_calls == 0


@pytest.mark.parametrize("part", ["rope", "proj_in", "proj_out"])
def test_tokens_really_are_reordered(part):
    """Without one of the hooks the result is wrong, so the parity test can tell."""
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer)
    true = run(transformer, inputs)
    sparse(transformer, order="tiles")
    getattr(transformer, part)._forward_hooks.clear()
    assert float((run(transformer, inputs) - true).norm() / true.norm()) > 1e-3  # parity: 1e-7


def test_all_before_the_video_reads_all_and_is_read_by_all():
    """Text 19, one key frame of 35, sound 8: 62 rows before the video's 105."""
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer, keyframes=("last",))
    engine = sparse(transformer, keep=0.3).engine
    seen = []
    engine.observer = lambda call, layout, q, k, v, plan: seen.append((call, plan.to_token_mask()))
    run(transformer, inputs)
    assert [call.layer for call, _ in seen] == [0, 1]
    for call, mask in seen:
        assert call.segments == (("text", 0, 62), ("video", 62, 167))
        assert mask[..., :62].all() and mask[..., :62, :].all()
        assert 0.1 < mask[..., 62:, 62:].float().mean() < 0.8


def test_references_with_their_sound_count_as_text():
    """A video of 2 x 4 x 4 tokens with 6 of sound, and an image of 3 x 5, packed by the pipeline's own block."""
    transformer = tiny_minimax_h3_transformer()
    references = [MiniMaxH3VideoReference(None, audio=torch.zeros(1, 1)), MiniMaxH3ImageReference(None)]
    latents = [torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 4, 1, 6, 10)]
    packed = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(19, dtype=torch.long), references, latents, [torch.zeros(6, 6)], 3, 10, 14, 4, (1, 2, 2), 2, 2, 0
    )
    inputs = tiny_minimax_h3_inputs(transformer)
    inputs |= dict(zip(LAYOUT, packed, strict=False))
    numbers = torch.Generator().manual_seed(1)
    for name, rows in (("hidden_states", 105 + 32 + 15), ("audio_hidden_states", 8 + 6)):
        inputs[name] = torch.randn(1, rows, inputs[name].shape[-1], generator=numbers)
    inputs["timestep_indices"] = torch.ones(len(packed[1]), dtype=torch.long)
    inputs["timestep_indices"][19:-113] = 0  # references are cleaner than the sound and the video behind them
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    facts = minimax_h3.read(transformer, inputs)
    assert facts.grid == (3, 5, 7) and facts.text == 19 + 32 + 6 + 15 + 8
    assert processor.report.dense_calls == 0 and list(processor.report.token_orders) == ["tiles"]


def test_a_batch_row_is_the_same_in_other_company():
    transformer = tiny_minimax_h3_transformer()
    sparse(transformer, keep=0.3)
    pair, other = (tiny_minimax_h3_inputs(transformer, batch=2, seed=seed) for seed in (0, 1))
    own = ("hidden_states", "audio_hidden_states", "encoder_hidden_states")
    mixed = {k: torch.cat([pair[k][:1], other[k][1:]]) if k in own else pair[k] for k in pair}
    first, second = run(transformer, pair), run(transformer, mixed)
    torch.testing.assert_close(second[:1], first[:1], rtol=1e-4, atol=1e-5)
    assert float((second[1:] - first[1:]).norm() / first[1:].norm()) > 1e-2


def test_rows_with_times_of_their_own_keep_the_models_order():
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer)
    inputs["timestep_indices"][-105:-70] = 0  # the first frame is clean
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert list(processor.report.token_orders) == ["raster: the video's rows are modulated one by one"]


def test_a_sequence_that_ends_with_something_else_runs_dense_and_says_so():
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer)
    for name in ("position_ids", "token_tags", "timestep_indices"):
        inputs[name] = inputs[name].roll(-19, 0)  # the text stands last
    for name in ("video_indices", "audio_indices", "text_indices"):
        inputs[name] = (inputs[name] - 19) % len(inputs["token_tags"])
    true = run(transformer, inputs)
    processor = sparse(transformer, strict=False)
    torch.testing.assert_close(run(transformer, inputs), true)
    why = "the packed sequence does not end with whole frames of video"
    assert processor.report.sparse_calls == 0 and dict(processor.report.fallbacks) == {why: 2}
    sparse(transformer)
    with pytest.raises(FallbackError, match="whole frames"):
        run(transformer, inputs)


def test_facts_and_attentions():
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer, keyframes=("first",))
    facts = minimax_h3.read(transformer, inputs)
    assert facts.grid == (3, 5, 7) and facts.text == 62 and facts.text_first
    assert facts.timestep == pytest.approx(600), "time .4 of 1 is noise of .6"
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is minimax_h3
    paths = {f"{path}.processor" for path, _ in minimax_h3.self_attentions(transformer)}
    others = set(transformer.attn_processors) - paths
    assert len(paths) == 2 and all("refiner" in path for path in others)
    for wrong in ({"position_ids": None}, {"video_indices": inputs["video_indices"][:5]}):
        with pytest.raises(LayoutError, match=r"\[140\]"):
            minimax_h3.read(transformer, {**inputs, **wrong})


def loop_of(transformer):
    """The pipeline's denoising loop; its encoders and decoders stay away."""
    pipe = MiniMaxH3DenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=transformer, scheduler=MiniMaxH3Scheduler(), audio_scheduler=MiniMaxH3Scheduler(shift=3.0)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, seed=0, **kind):
    """Latents of a run of three steps."""
    inputs = tiny_minimax_h3_inputs(pipe.transformer, seed=seed, **kind)
    for scheduler in (pipe.scheduler, pipe.audio_scheduler):
        scheduler.set_timesteps(4)
    times = pipe.scheduler.timesteps
    state = pipe(
        latents=inputs["hidden_states"][0].clone(),
        audio_latents=inputs["audio_hidden_states"][0].clone(),
        prompt_embeds=inputs["encoder_hidden_states"],
        row_timestep_plan=[(torch.stack([torch.tensor(0.95), t]), inputs["timestep_indices"]) for t in times],
        timesteps=times,
        audio_timesteps=pipe.audio_scheduler.timesteps,
        num_condition_video_rows=len(kind.get("keyframes", ())) * 35,
        denoiser_input_fields={name: inputs[name] for name in LAYOUT},
    )
    return state.get("latents")


@pytest.mark.parametrize("method", ["pooled", "lite", "svg2"])
def test_a_loop_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = loop_of(tiny_minimax_h3_transformer())
    stocks = dict(pipe.transformer.attn_processors)
    true = sample(pipe, keyframes=("first",))
    options = {"threshold": -0.5} if method == "lite" else {"keep": 0.4}
    with dit_accel.accelerate(pipe, None, method=load_method(method, **options), block=16, min_tokens=0) as handle:
        first = sample(pipe, keyframes=("first",))
        sample(pipe, seed=1)
        again = sample(pipe, keyframes=("first",))
        report = handle.report()
    assert torch.equal(first, again) and not torch.equal(first, true)
    assert report.runs == 3 and report.sparse_calls == 18 and report.dense_calls == 0 and not report.stateless
    assert list(report.keep_per_step) == [0, 1, 2]
    assert all(pipe.transformer.attn_processors[path] is stock for path, stock in stocks.items())
    assert torch.equal(sample(pipe, keyframes=("first",)), true)


def test_a_step_cache_computes_every_forward_and_says_why():
    """A forward that was made up would have no sound. Times rise from noise, 0, to 1."""
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer)
    handle = dit_accel.accelerate(transformer, cache={"name": "easy", "threshold": 1e9, "min_steps": 0})
    for noisy in (0.4, 0.5, 0.6):
        inputs["timestep"] = torch.tensor([0.95, noisy])
        out = run(transformer, inputs)
    report = handle.report()
    assert report.forwards == {"computed": 3}
    assert report.computed_reasons == {"the model gives sound beside the video": 3}
    handle.remove()
    assert torch.equal(run(transformer, inputs), out)
