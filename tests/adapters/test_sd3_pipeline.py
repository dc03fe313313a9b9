"""Whole Stable Diffusion 3 pipelines: guidance as rows of one batch, skipped layers, images in, copies and files."""

import copy

import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from joint_models import LITTLE, assert_runs_again_and_again, run
from sd3_models import MEDIUM

import dit_accel
from dit_accel.methods import load_method
from dit_accel.testing import byte_tokenizer, tiny_sd3_inputs, tiny_sd3_pipeline


def medium(**config):
    return tiny_sd3_pipeline(transformer={**MEDIUM, **config})


def prompts(*seeds):
    """Embeddings of a prompt for each seed, and of a negative one."""

    def randn(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    made = {
        "prompt_embeds": torch.cat([randn(1, 19, 24, seed=seed) for seed in seeds]),
        "pooled_prompt_embeds": torch.cat([randn(1, 20, seed=seed) for seed in seeds]),
    }
    return {**made, **{f"negative_{name}": -x.flip(-1) for name, x in made.items()}}


def call_of(*seeds, seed=0, **more):
    generator = [torch.Generator().manual_seed(seed + i) for i in range(max(1, len(seeds)))]
    size = {
        "height": 18,
        "width": 22,
        "num_inference_steps": 3,
        "output_type": "latent",
        "guidance_scale": 4.0,
    }
    return {**prompts(*(seeds or (7,))), **size, "generator": generator, **more}


def accelerate(pipe, method="pooled", **options):
    made = load_method(method, **LITTLE[method])
    return dit_accel.accelerate(
        pipe, None, method=made, **{"block": 16, "min_tokens": 0, "strict": True, **options}
    )


@pytest.mark.parametrize("method", LITTLE)
def test_a_pipeline_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = medium()

    def sample(rows=(), **more):
        return pipe(**call_of(*rows, **more)).images

    assert_runs_again_and_again(pipe, sample, method, 9, {"rows": (7, 8, 9)}, {"guidance_scale": 1.0})


def test_keeping_everything_is_the_stock_pipeline():
    pipe = medium(num_layers=3)
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    true = pipe(**call_of(7, 8, **skip)).images
    with accelerate(pipe):
        little = pipe(**call_of(7, 8, **skip)).images
    assert not torch.allclose(little, true, rtol=1e-2, atol=1e-3)
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0, strict=True) as handle:
        torch.testing.assert_close(pipe(**call_of(7, 8, **skip)).images, true, rtol=1e-3, atol=1e-4)
    assert handle.report().dense_calls == 0


@pytest.mark.parametrize("method", LITTLE)
def test_rows_of_a_batch_know_nothing_of_one_another(method):
    """Conditional and unconditional are rows too: the first image is the same beside another second prompt."""
    pipe = medium()
    with accelerate(pipe, method):
        pair = pipe(**call_of(7, 8)).images
        other = pipe(**call_of(7, 9)).images
    torch.testing.assert_close(other[0], pair[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[1], pair[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", LITTLE)
def test_skip_layer_guidance_is_a_branch_of_the_same_run(method):
    pipe = medium(num_layers=3)
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    true = pipe(**call_of(**skip)).images
    seen = []
    with accelerate(pipe, method) as handle:
        handle.observe(lambda call, layout, q, *_: seen.append((call.branch, call.step, call.layer, len(q))))
        first = pipe(**call_of(**skip)).images
        report = handle.report()
        plain = pipe(**call_of()).images
        assert torch.equal(pipe(**call_of(**skip)).images, first)
    assert report.runs == 1 and not report.stateless
    whole = [("#0", step, layer, 2) for step in range(3) for layer in range(4)]
    without = [("#1", step, layer, 1) for step in (1, 2) for layer in (0, 1, 3)]
    assert sorted(seen[: report.sparse_calls]) == sorted(whole + without)
    assert not torch.equal(plain, first) and torch.equal(pipe(**call_of(**skip)).images, true)


def test_several_images_of_one_prompt():
    """From words, as diffusers repeats no embeddings that are given; each image is the one it is alone."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe, tokenizer = medium(), byte_tokenizer()
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=12, projection_dim=10, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    encoder = CLIPTextModelWithProjection(config).eval()
    pipe.register_modules(
        text_encoder=encoder, text_encoder_2=encoder, tokenizer=tokenizer, tokenizer_2=tokenizer
    )
    words = {name: value for name, value in call_of(7, 8).items() if "embeds" not in name}
    words |= {"prompt": "a red star moves left", "negative_prompt": "blurry"}
    with accelerate(pipe, "lite") as handle:
        pair = pipe(**words, num_images_per_prompt=2).images
        alone = pipe(**{**words, "generator": torch.Generator().manual_seed(0)}).images
    assert len(pair) == 2 and not torch.allclose(pair[1], pair[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(alone[0], pair[0], rtol=1e-4, atol=1e-5)
    assert handle.report().sparse_calls == 18 and handle.report().dense_calls == 0


def test_an_aborted_run_leaves_no_trace():
    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    pipe = medium()
    with accelerate(pipe, "lite"):
        first = pipe(**call_of()).images
        with pytest.raises(KeyboardInterrupt):
            pipe(**call_of(8, callback_on_step_end=stop))
        assert torch.equal(pipe(**call_of()).images, first)


def test_image_to_image():
    pipe = StableDiffusion3Img2ImgPipeline(**tiny_sd3_pipeline(transformer=MEDIUM).components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 18, 22, generator=torch.Generator().manual_seed(2))

    def sample():
        return pipe(**call_of(image=image, strength=0.6)).images  # two of three steps

    true = sample()
    with accelerate(pipe, "lite") as handle:
        first = sample()
        assert torch.equal(sample(), first) and not torch.equal(first, true)
        report = handle.report()
    assert report.runs == 2 and set(report.keep_per_step) == {0, 1} and report.dense_calls == 0
    assert torch.equal(sample(), true)


def test_a_real_controlnet():
    """Its own transformer is not ours and runs as it did."""
    pipe = medium()
    control = SD3ControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_extra_conditioning_channels=0
    )
    torch.nn.init.normal_(
        control.controlnet_blocks[0].weight, 0, 0.3
    )  # made as zeros, which would change nothing
    pipe = StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=control.eval())
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(2))
    call = {"control_image": image, "height": 24, "width": 32}  # this pipeline wants multiples of 8
    true = pipe(**call_of(**call)).images
    plain = pipe(**call_of(**call, controlnet_conditioning_scale=0.0)).images
    assert float((true - plain).norm() / plain.norm()) > 1e-2
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0, strict=True) as handle:
        torch.testing.assert_close(pipe(**call_of(**call)).images, true, rtol=1e-3, atol=1e-4)
    report = handle.report()
    assert report.sparse_calls == 9 and list(report.token_orders) == [
        "raster: a ControlNet adds its tokens in the model's order"
    ]


def test_perturbed_guidance_puts_its_processors_in_our_place_and_that_is_counted():
    parts = tiny_sd3_pipeline().components
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    pipe = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    pipe.set_progress_bar_config(disable=True)
    true = pipe(**call_of(pag_scale=2.0)).images
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0) as handle:
        torch.testing.assert_close(pipe(**call_of(pag_scale=2.0)).images, true, rtol=1e-3, atol=1e-4)
        pipe(**call_of(pag_scale=0.0))
        report = handle.report()
    assert report.sparse_calls == 3 + 6
    assert dict(report.fallbacks) == {"its processor was replaced after installation": 3}
    assert torch.equal(pipe(**call_of(pag_scale=2.0)).images, true)


def test_saved_while_sparse_it_loads_as_stock(tmp_path):
    pipe = medium()
    true = pipe(**call_of()).images
    with accelerate(pipe):
        pipe.save_pretrained(tmp_path)
    missing = {name: part for name, part in pipe.components.items() if part is None}
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **missing)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(**call_of()).images, true)
    with accelerate(loaded) as handle:
        loaded(**call_of())
    assert handle.report().sparse_calls == 9


def test_a_copy_is_sparse_on_its_own():
    pipe = medium()
    inputs = tiny_sd3_inputs(pipe.transformer)
    true = run(pipe.transformer, inputs)
    with accelerate(pipe, "lite") as handle:
        first = run(pipe.transformer, inputs)
        copied = copy.deepcopy(pipe.transformer)
        counted = handle.report().sparse_calls
        assert torch.equal(run(copied, inputs), first) and handle.report().sparse_calls == counted
    assert torch.equal(run(pipe.transformer, inputs), true)
    processor = copied.transformer_blocks[0].attn.processor
    assert processor.report.sparse_calls == 3
    processor.remove()
    assert torch.equal(run(copied, inputs), true)


def test_pixels_come_out():
    pipe = medium()
    with accelerate(pipe):
        (image,) = pipe(**call_of(output_type="pil")).images
    assert image.size == (22, 18)
