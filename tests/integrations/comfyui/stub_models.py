"""Small random models on the stand-in for ComfyUI's core, as `core_models` makes them of the core's own classes."""

from __future__ import annotations

from typing import Any

import comfy.models
import torch
from comfy.model_patcher import ModelPatcher

_CLASSES = {"wan": "WanModel", "hunyuan": "HunyuanVideo", "flux": "Flux", "sd3": "OpenAISignatureMMDITWrapper"}
FAMILIES = tuple(_CLASSES)
BY_FRAME = "wan22"  # a family whose frames may have noise levels of their own
_CLASSES[BY_FRAME] = "WanModel"
VIDEO = ("wan", "hunyuan", BY_FRAME)


def build(family: str) -> Any:
    """A ModelPatcher of a small random model. Two builds of a family are equal."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = comfy.models.BaseModel(getattr(comfy.models, _CLASSES[family])())
    return ModelPatcher(model.requires_grad_(False))


def conditioning(family: str, seed: int = 1, tokens: int = 7, **more: Any) -> list[Any]:
    """A prompt's embeddings, as a text encode node gives them."""
    return [[torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed)), more]]


def latents(family: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Empty latents of so many frames, rows and columns."""
    return {"samples": torch.zeros((1, 4, *size) if family in VIDEO else (1, 4, *size[1:]))}
