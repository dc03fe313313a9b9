"""A tiny autoencoder of images, as FLUX.1, Stable Diffusion 3 and Z-Image have one."""

from __future__ import annotations

from torch import nn


def tiny_image_vae(*, halvings: int = 0) -> nn.Module:
    """An `AutoencoderKL` of four latent channels.

    Args:
        halvings: how often it halves a side; an image is as large as its latents if it never does.
    """
    from diffusers import AutoencoderKL

    blocks = 1 + halvings
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=1,
        shift_factor=0.1,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
