"""What a run of a pipeline may do: callbacks, batches, several results for a prompt, guidance, interruption."""

import pytest
import torch


@pytest.mark.parametrize("guidance", [False, True])
def test_guidance_and_a_negative_prompt_of_another_length(pipeline, guidance):
    pipeline.compare(guidance=guidance)


def test_a_batch(pipeline):
    pipeline.compare(batch=2)


def test_several_results_for_a_prompt(pipeline):
    pipeline.compare(**{pipeline.several: 2})


@pytest.mark.of("wan")  # the others do not repeat embeddings that they were given
def test_several_results_for_each_prompt_of_a_batch(pipeline):
    pipeline.compare(batch=2, **{pipeline.several: 2})


def test_a_batch_row_does_not_see_the_others(pipeline):
    """Row by row the plans are the row's own: what is first in a batch is the same in other company."""
    pipe = pipeline.make()
    with pipeline.accelerate(pipe, 0.3):
        noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        both = pipeline.run(pipe, batch=2, generator=noise)
        alone = pipeline.run(pipe, batch=1, generator=[torch.Generator().manual_seed(0)])
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)


def test_a_callback_changes_the_latents(pipeline):
    def callback(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.9 + 0.1 * torch.flip(tensors["latents"], [-1])}

    pipeline.compare(callback_on_step_end=callback)


def test_a_callback_changes_the_prompt(pipeline):
    def callback(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 0.5} if step == 0 else {}

    pipeline.compare(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.of("wan")  # the others read their guidance scale once
def test_guidance_ends_in_mid_run(pipeline):
    """As with a guidance interval: two branches in the first steps, then one. Wan's may be switched off in a run."""

    def callback(pipe, step, timestep, tensors):
        if step == 0:
            pipe._guidance_scale = 1.0
        return {}

    pipeline.compare(callback_on_step_end=callback)
    pipe = pipeline.make()
    with pipeline.accelerate(pipe, 0.3) as handle:
        first = pipeline.run(pipe, callback_on_step_end=callback)
        assert handle.report(clear=True).sparse_calls == (2 + 1 + 1) * 2, "layers 2"
        pipeline.run(pipe)
        assert torch.equal(pipeline.run(pipe, callback_on_step_end=callback), first)


def test_interrupted(pipeline):
    """The run ends early without an exception; the next one knows nothing of it."""

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 0
        return {}

    pipe = pipeline.make()
    true = pipeline.run(pipe, callback_on_step_end=callback)
    with pipeline.accelerate(pipe) as handle:
        torch.testing.assert_close(
            pipeline.run(pipe, callback_on_step_end=callback), true, rtol=1e-4, atol=1e-4
        )
        one_step = handle.report(clear=True).sparse_calls
    with pipeline.accelerate(pipe, 0.3, method="svg2") as handle:
        fresh = pipeline.run(pipe)
        pipeline.run(pipe, callback_on_step_end=callback)
        assert torch.equal(pipeline.run(pipe), fresh)
        report = handle.report()
    assert report.runs == 3 and report.sparse_calls == one_step * (3 + 1 + 3) and report.dense_calls == 0


def test_an_exception_in_a_callback(pipeline):
    def callback(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    pipe = pipeline.make()
    with pipeline.accelerate(pipe, 0.3, method="svg2"):
        fresh = pipeline.run(pipe)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(pipe, callback_on_step_end=callback)
        assert torch.equal(pipeline.run(pipe), fresh)


@pytest.mark.parametrize("strength", [0.4, 0.7, 1.0])
def test_image_to_image(strength):
    """FluxImg2ImgPipeline starts somewhere in the schedule and opens no cache context."""
    import dit_accel
    from dit_accel.testing import tiny_flux_pipeline

    pipe = img2img(tiny_flux_pipeline())
    true = run_img2img(pipe, strength)
    steps = 5 - int(5 - 5 * strength)
    for keep in (1.0, 0.3):
        with dit_accel.accelerate(pipe, None, keep=keep, block=16, min_tokens=0, strict=True) as handle:
            first, again = run_img2img(pipe, strength), run_img2img(pipe, strength)
            report = handle.report()
        assert torch.equal(first, again) and report.runs == 2
        assert report.sparse_calls == 2 * 3 * steps and report.dense_calls == 0
        assert set(report.keep_per_step) == set(range(steps)), "steps count from the first one that runs"
        if keep == 1:
            torch.testing.assert_close(first, true, rtol=1e-4, atol=1e-4)
        else:
            assert float((first - true).norm() / true.norm()) > 1e-3


def img2img(pipe):
    from diffusers import FluxImg2ImgPipeline

    pipe = FluxImg2ImgPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_img2img(pipe, strength):
    generator = torch.Generator().manual_seed(7)
    return pipe(
        image=torch.rand(1, 3, 18, 22, generator=generator),
        prompt_embeds=torch.randn(1, 19, 32, generator=generator),
        pooled_prompt_embeds=torch.randn(1, 24, generator=generator),
        strength=strength,
        height=18,
        width=22,
        num_inference_steps=5,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
