"""Tiny FLUX.2 models: one dual and two single blocks, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.seeded import build, seeded


def tiny_flux2_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `Flux2Transformer2DModel` of one dual and two single blocks, two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments; Klein has `guidance_embeds=False`.
    """
    from diffusers import Flux2Transformer2DModel

    own: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return build(Flux2Transformer2DModel, seed, **{**own, **config})


def tiny_flux2_inputs(
    transformer: nn.Module,
    grid: tuple[int, int] = (9, 11),
    *,
    references: tuple[tuple[int, int], ...] = (),
    text: int = 19,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer.

    Args:
        grid: rows and columns of image tokens.
        references: rows and columns of each reference image, whose tokens stand behind the image's.
        text: text tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def places(*axes: Tensor) -> Tensor:
        return torch.cartesian_prod(*axes)

    images = [
        places(torch.tensor([10 * i]), torch.arange(rows), torch.arange(columns), torch.arange(1))
        for i, (rows, columns) in enumerate((grid, *references))
    ]
    image_ids = torch.cat(images).expand(batch, -1, -1)
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, image_ids.shape[1], config.in_channels),
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": image_ids,
        "txt_ids": places(*[torch.arange(1)] * 3, torch.arange(text)).expand(batch, -1, -1),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def tiny_flux2_pipeline(variant: str = "Flux2Pipeline", *, seed: int = 0) -> Any:
    """A FLUX.2 pipeline without a text encoder: call it with `prompt_embeds`.

    Its autoencoder compresses by 4, so an image of 72 x 88 pixels is 9 x 11 tokens. The pipelines take no reference
    image with an edge below 64 pixels.

    Args:
        variant: the pipeline's class: `Flux2Pipeline`, `Flux2KleinPipeline` or `Flux2KleinKVPipeline`.
    """
    import diffusers

    with seeded(seed):
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4, 4), latent_channels=4, norm_num_groups=1, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
        ).eval()  # fmt: skip
    transformer = tiny_flux2_transformer(seed=seed + 1, guidance_embeds=variant == "Flux2Pipeline")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"text_encoder": None, "tokenizer": None}
    pipe = getattr(diffusers, variant)(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
