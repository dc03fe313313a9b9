"""The parts of tiny-flux and tiny-sd3 as stock diffusers and transformers classes.

An image of 256 x 256 pixels is 64 x 64 tokens: the autoencoder halves it once and the transformers take 2 x 2 latents.
Four latent channels are a third of the pixels' values. With sixteen, the latents would hold more values than the
pixels, and 64 of a token's 128 channels would carry noise from end to end.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from tiny_models import students
from tiny_models.shards import load_shards
from tiny_models.text import CAPTION_TOKENS, TEXT_DIM
from transformers import CLIPTextModel, CLIPTextModelWithProjection

LATENT_CHANNELS = 4
FACTOR = 2  # pixels a latent, along a side
FLOW_SHIFT = 3.0
LARGEST = 256  # pixels; what sd3's table of positions is made for
_POOLED = 64  # width of a CLIP encoder; two of them side by side are as wide as TEXT_DIM


def make_vae() -> AutoencoderKL:
    """Two levels, no attention. Latents have mean 0 and deviation 1 by themselves (see `vae.normalise_latents`)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=LARGEST,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a run's shards or of a pipeline folder; fp32, frozen."""
    vae = make_vae()
    if (folder / "vae").is_dir():
        shipped = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
        vae.load_state_dict(shipped.state_dict())
    else:
        vae.load_state_dict(load_shards(folder, "vae"))
    return vae.eval().requires_grad_(False)


def make_flux_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=_POOLED,
        axes_dims_rope=(8, 28, 28),
    )


def make_sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LARGEST // FACTOR,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=128,
        pooled_projection_dim=2 * _POOLED,
        # The table is stored with the weights: at 96 x 96 it would be a third of the file.
        pos_embed_max_size=LARGEST // FACTOR // 2,
        qk_norm="rms_norm",
    )


def make_clip(vocabulary: int, *, projected: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    return students.make_clip(vocabulary, _POOLED, CAPTION_TOKENS, projected=projected)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
