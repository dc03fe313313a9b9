"""Rendered clips as latents of tiny-wan's autoencoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from tiny_models.clips import Coder
from torch import Tensor


def make_coder(vae: AutoencoderKLWan, device: str) -> Coder:
    """The autoencoder and the normalisation that `WanPipeline` undoes."""
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )

    def encode(clip: Tensor) -> Tensor:
        return (vae.encode(clip).latent_dist.mode().float() - mean) / std

    return Coder(encode, vae.config.z_dim, factor=4, period=2)
