"""Whole FLUX.1 pipelines beside text to image: they equal stock when everything is kept, or say why they are dense."""

import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel.testing import tiny_flux_pipeline

# diffusers' ControlNet imports its rotary embedding from where it no longer is
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
HEIGHT, WIDTH = 18, 22


def picture(height=HEIGHT, width=WIDTH):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def mask():
    return Image.fromarray((torch.arange(WIDTH).repeat(HEIGHT, 1) > 9).numpy())


# what each needs beside a prompt, and the order of its tokens
VARIANTS = {
    "FluxFillPipeline": (lambda: {"image": picture(), "mask_image": mask()}, "tiles"),
    "FluxControlPipeline": (lambda: {"control_image": picture()}, "tiles"),
    "FluxControlNetPipeline": (
        lambda: {"control_image": picture()},
        "raster: a ControlNet adds its tokens in the model's order",
    ),
}


def call_of(**more):
    numbers = torch.Generator().manual_seed(7)
    prompts = {
        "prompt_embeds": torch.randn(1, 19, 32, generator=numbers),
        "pooled_prompt_embeds": torch.randn(1, 24, generator=numbers),
    }
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "latent"}
    return {**prompts, **size, "generator": torch.Generator().manual_seed(0), **more}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pipeline_that_keeps_everything_is_the_stock_one(variant):
    pipe, (more, order) = tiny_flux_pipeline(variant), VARIANTS[variant]
    true = pipe(**call_of(**more())).images
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0, strict=True) as handle:
        found = pipe(**call_of(**more())).images
        report = handle.report(clear=True)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    assert report.sparse_calls == 9 and report.dense_calls == 0 and set(report.token_orders) == {order}
    with dit_accel.accelerate(pipe, None, keep=0.3, block=16, min_tokens=0):
        assert float((pipe(**call_of(**more())).images - true).norm() / true.norm()) > 1e-4, "sparse attention acts"
    assert torch.equal(pipe(**call_of(**more())).images, true)


def test_a_controlnet_matters():
    """Else its test above would show nothing."""
    pipe = tiny_flux_pipeline("FluxControlNetPipeline")
    images = [pipe(**call_of(control_image=picture(), controlnet_conditioning_scale=x)).images for x in (0.0, 1.0)]
    assert float((images[1] - images[0]).norm() / images[0].norm()) > 1e-3


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (16, 20)], ids=["a second frame", "a line"])
def test_kontext_with_an_image(size):
    pipe = tiny_flux_pipeline("FluxKontextPipeline")
    call = {"max_area": HEIGHT * WIDTH, "_auto_resize": False, "image": picture(*size)}
    true = pipe(**call_of(**call)).images
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0, strict=True) as handle:
        torch.testing.assert_close(pipe(**call_of(**call)).images, true, rtol=1e-4, atol=1e-5)
        (order,) = handle.report().token_orders
    assert order == "tiles" if size == (HEIGHT, WIDTH) else "another size" in order
    with dit_accel.accelerate(pipe, None, keep=0.4, block=16, min_tokens=0, strict=True) as handle:
        assert not torch.equal(pipe(**call_of(**call)).images, true)
        assert handle.report().sparse_calls == 9
