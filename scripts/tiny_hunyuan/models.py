"""The parts of tiny-hunyuan as stock diffusers and transformers classes.

61 frames of 128 x 128 pixels are a grid of 16 x 16 x 16 = 4,096 tokens: the autoencoder compresses 4x in time and, as
tiny-wan's, 4x in space, and the transformer takes 2 x 2 latents. With HunyuanVideo's own 8x in space, such a grid would
take 256 x 256 pixels, or patches of one latent, which no HunyuanVideo has. Eight latent channels are a 24th of the
values of the pixels and leave three quarters of a token's 128 channels for other things than noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from tiny_models import students
from tiny_models.shards import load_shards
from transformers import CLIPTextModel, LlamaConfig, LlamaModel

LATENT_CHANNELS = 8
FACTOR = 4  # pixels a latent, along a side
PERIOD = 4  # frames a latent; the class's decoder knows no other
TILE = 17  # frames that the stock autoencoder encodes and decodes at once
FLOW_SHIFT = (
    5.0  # as tiny-wan's, whose grid is as large; HunyuanVideo's own is 7, for grids 29 times as large
)
TEXT_WIDTH = 96
SKIPPED = 2  # the pipeline reads Llama before its last two layers; those are there and do nothing
CLIP_TOKENS = 77  # what the pipeline pads CLIP's ids to
_POOLED = 32
_HEADS = 2


def make_vae() -> AutoencoderKLHunyuanVideo:
    """Three levels, no attention. Latents have mean 0 and deviation 1 by themselves: the scaling factor is 1."""
    levels = 3
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        spatial_compression_ratio=FACTOR,
        temporal_compression_ratio=PERIOD,
        scaling_factor=1.0,
    )


def load_vae(folder: Path) -> AutoencoderKLHunyuanVideo:
    """The VAE of a run's shards or of a pipeline folder; fp32, frozen."""
    vae = make_vae()
    if (folder / "vae").is_dir():
        shipped = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae", dtype=torch.float32)
        vae.load_state_dict(shipped.state_dict())
    else:
        vae.load_state_dict(load_shards(folder, "vae"))
    return vae.eval().requires_grad_(False)


def make_transformer() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=_HEADS,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2,
        guidance_embeds=True,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=_POOLED,
        rope_axes_dim=(16, 24, 24),
    )


def make_llama(vocabulary: int) -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2 + SKIPPED,
            num_attention_heads=TEXT_WIDTH // 32,
            num_key_value_heads=1,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
            use_cache=False,
        )
    )


def make_clip(vocabulary: int) -> CLIPTextModel:
    return students.make_clip(vocabulary, _POOLED, CLIP_TOKENS, projected=False)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
