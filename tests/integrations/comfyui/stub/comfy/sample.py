"""What nodes prepare a sampler with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prepare_noise(latent_image: Tensor, seed: int) -> Tensor:
    return torch.randn(latent_image.shape, generator=torch.Generator().manual_seed(seed))


def fix_empty_latent_channels(model: Any, latent_image: Tensor) -> Tensor:
    return latent_image
