"""A sampler's run, as ComfyUI's KSampler node starts one."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from torch import Tensor

from dit_accel.caches.cache import Cache
from dit_accel.integrations.comfyui.patch import change_settings, patch_on
from dit_accel.integrations.comfyui.settings import cache_of, region_of, sparse_options
from dit_accel.options import SparseOptions
from dit_accel.region import Region
from dit_accel.report import Report

SMALL, LARGE = (3, 16, 20), (5, 18, 14)  # frames, rows, columns of latents; in tokens the large one is all odd


def sample(
    host: ModuleType, model: Any, family: str, size: tuple[int, int, int] = SMALL, *, steps: int = 6,
    together: bool = True, guidance: float = 4.0, prompts: tuple[Any, Any] | None = None, sampler: Any = "euler",
    pictures: int = 1, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Latents from a fixed seed.

    Args:
        together: whether there is memory for both prompts in one batch.
        mask: what is to be made `[1, 1, F, H, W]`; the rest is given.
    """
    positive, negative = prompts or (host.conditioning(family, 1), host.conditioning(family, 2))
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    latent = host.latents(family, size)["samples"].repeat_interleave(pictures, dim=0)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(guidance)
    with pytest.MonkeyPatch.context() as patch:
        if not together and hasattr(model.model, "memory_required"):  # the core asks
            patch.setattr(model.model, "memory_required", lambda *args, **kwargs: math.inf)
        elif not together:
            patch.setattr(comfy.samplers.CFGGuider, "one_batch", False)
        return guider.sample(
            comfy.sample.prepare_noise(latent, 3), latent, sampler,
            torch.linspace(1, 0, steps + 1), denoise_mask=mask, disable_pbar=True, seed=3,
        )  # fmt: skip


def sparse(method: str = "pooled", keep: float = 0.35, *, dense_first: float = 0.0, more: str = "") -> SparseOptions:
    """Options that make small models sparse."""
    return sparse_options(method, keep, dense_first, "", False, f"min_tokens = 0\nblock = 16\n{more}")


def cache(threshold: float, more: str = "") -> Cache:
    return cache_of("latent", threshold, f"min_steps = 0\n{more}")


def region(sample_ratio: float = 0.4, *, unit: str = "token", selector: str = "std", more: str = "") -> Region:
    """Options that leave tokens of small models out at all steps but the first and the last."""
    return region_of(selector, sample_ratio, unit, f"bucket = 8\nstart = 1\nerror_reset = []\n{more}")


def with_settings(model: Any, **parts: Any) -> Any:
    return change_settings(model, **parts)


def report_of(model: Any) -> Report:
    return patch_on(model).report
