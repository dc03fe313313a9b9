"""The parts of tiny-wan as stock diffusers classes, and how they are put together."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tiny_models import text
from tiny_models.shards import load_shards
from tiny_models.text import TEXT_DIM
from transformers import PreTrainedTokenizerFast

LATENT_CHANNELS = 16
PROMPT_LENGTH = 512  # what WanPipeline pads prompt embeddings to by default
FLOW_SHIFT = 5.0


def make_vae(
    base_dim: int = 24, latents_mean: list[float] | None = None, latents_std: list[float] | None = None
):
    """A Wan VAE with 4x spatial and 2x temporal compression; both factors are config values that nothing derives."""
    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
    )


def make_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    return text.make_tokenizer(PROMPT_LENGTH)


def make_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    )


def make_pipeline(tokenizer, text_encoder, transformer, vae) -> WanPipeline:
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=make_scheduler(),
    )


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE of a run (`vae.json` and shards), or of a pipeline folder; fp32, frozen."""
    if (folder / "vae").is_dir():
        shipped = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)
        # A fresh one: what was loaded remembers the path it came from, and would ship that in its config.
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder / "vae"))
        vae.load_state_dict(shipped.state_dict())
    else:
        record = json.loads((folder / "vae.json").read_text())
        vae = make_vae(record["base_dim"], record["latents_mean"], record["latents_std"])
        vae.load_state_dict(load_shards(folder, "vae"))
    return vae.eval().requires_grad_(False)
