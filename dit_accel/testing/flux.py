"""Tiny FLUX.1 models: one dual and two single blocks, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.image_vae import tiny_image_vae
from dit_accel.testing.seeded import build, seeded


def tiny_flux_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `FluxTransformer2DModel` of one dual and two single blocks, two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import FluxTransformer2DModel

    own: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    return build(FluxTransformer2DModel, seed, **{**own, **config})


def tiny_flux_inputs(
    transformer: nn.Module, grid: tuple[int, int] = (9, 11), *, text: int = 19, batch: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer: rows and columns of image tokens, and so many of text."""
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in grid))
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, len(places), config.in_channels),
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": places,
        "txt_ids": torch.zeros(text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def tiny_flux_pipeline(variant: str = "FluxPipeline", *, seed: int = 0) -> Any:
    """A FLUX.1 pipeline without text encoders: call it with `prompt_embeds` and `pooled_prompt_embeds`.

    Its autoencoder does not compress, so an image of 18 x 22 pixels is 9 x 11 tokens.

    Args:
        variant: the pipeline's class: `FluxPipeline`, `FluxKontextPipeline`, `FluxFillPipeline`, `FluxControlPipeline`
            or `FluxControlNetPipeline`.
    """
    import diffusers

    # Fill's tokens have the masked image and the mask beside the latents, Control's the control image.
    widths = {"FluxFillPipeline": 16 + 16 + 4, "FluxControlPipeline": 16 + 16}
    transformer = tiny_flux_transformer(seed=seed + 1, in_channels=widths.get(variant, 16), out_channels=16)
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    with seeded(seed):
        vae = tiny_image_vae()
        if variant == "FluxControlNetPipeline":
            parts["controlnet"] = _tiny_controlnet(transformer)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = getattr(diffusers, variant)(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tiny_controlnet(transformer: nn.Module) -> nn.Module:
    """A ControlNet that changes something: those of diffusers begin with zeros."""
    from diffusers import FluxControlNetModel

    controlnet = FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    zeros = (controlnet.controlnet_x_embedder, *controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks)
    for layer in zeros:
        nn.init.normal_(layer.weight, std=0.1)
    return controlnet.eval().requires_grad_(False)
