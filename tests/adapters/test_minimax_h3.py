"""What the MiniMax-H3 adapter says about its packed sequence, held against the model itself. Odd grids, video last."""

import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference, MiniMaxH3VideoReference
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3Ref2VAPrepareLayoutStep
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from joint_models import (
    LITTLE,
    assert_runs_again_and_again,
    assert_text_is_whole,
    assert_the_models_order,
    sparse,
)
from joint_models import run_with_sound as run

import dit_accel
from dit_accel.adapters import find_adapter, minimax_h3
from dit_accel.errors import FallbackError, LayoutError
from dit_accel.testing import tiny_minimax_h3_inputs, tiny_minimax_h3_transformer

LAYOUT = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")


def test_all_before_the_video_reads_all_and_is_read_by_all():
    """Text 19, one key frame of 35, sound 8: 62 rows before the video's 105."""
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer, keyframes=("last",))
    assert_text_is_whole(transformer, inputs, "pooled", 62, 167, layers=2)


def test_references_with_their_sound_count_as_text():
    """A video of 2 x 4 x 4 tokens with 6 of sound, and an image of 3 x 5, packed by the pipeline's own block."""
    transformer = tiny_minimax_h3_transformer()
    references = [MiniMaxH3VideoReference(None, audio=torch.zeros(1, 1)), MiniMaxH3ImageReference(None)]
    latents = [torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 4, 1, 6, 10)]
    packed = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(19, dtype=torch.long),
        references,
        latents,
        [torch.zeros(6, 6)],
        3,
        10,
        14,
        4,
        (1, 2, 2),
        2,
        2,
        0,
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


def test_rows_with_times_of_their_own_keep_the_models_order():
    transformer = tiny_minimax_h3_transformer()
    inputs = tiny_minimax_h3_inputs(transformer)
    inputs["timestep_indices"][-105:-70] = 0  # the first frame is clean
    assert_the_models_order(transformer, inputs, "the video's rows are modulated one by one", run=run)


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


def samples(pipe, seed=0, **kind):
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


@pytest.mark.parametrize("method", LITTLE)
def test_a_loop_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = loop_of(tiny_minimax_h3_transformer())

    def sample(**more):
        return samples(pipe, **{"keyframes": ("first",), **more})

    assert_runs_again_and_again(pipe, sample, method, 6, {"seed": 1, "keyframes": ()})


def test_each_step_of_a_loop_is_counted():
    pipe = loop_of(tiny_minimax_h3_transformer())
    with dit_accel.accelerate(pipe, None, keep=0.4, block=16, min_tokens=0) as handle:
        samples(pipe)
    assert list(handle.report().keep_per_step) == [0, 1, 2]


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
