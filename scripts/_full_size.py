"""Transformers in the sizes that are published, to be built with random weights: for timing, never for quality.

Their configurations are those of `dit_accel.estimate`. Weights are drawn on the device in the dtype they run in,
without a copy in main memory, so that a model needs there what it needs in a pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.estimate.full_size import CASES, DEPTHS, FullSize

__all__ = ["CASES", "DEPTHS", "FullSize", "at_noise", "build_transformer", "make_inputs"]
TRAIN_TIMESTEPS = 1000


def build_transformer(case: FullSize, device: torch.device, dtype: torch.dtype, *, whole: bool) -> nn.Module:
    """The transformer with random weights.

    Args:
        whole: with all its layers; otherwise with as few as the case says.
    """
    import diffusers

    config = {**case.config, **({} if whole else case.shallow)}
    cls = getattr(diffusers, case.transformer)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            transformer = cls(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    # As loading from a repository does: some parts stay in float32.
    kept = set(cls._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer


def make_inputs(
    case: FullSize, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of one forward on a grid of so many tokens; the timestep is `at_noise`'s to add."""
    generator = torch.Generator(device).manual_seed(0)
    config, batch = case.config, case.batch

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    width = next(
        config[name] for name in ("text_dim", "text_embed_dim", "joint_attention_dim") if name in config
    )
    inputs: dict[str, Any] = {"encoder_hidden_states": randn(batch, case.text, width), "return_dict": False}
    if "pooled_projection_dim" in config:
        inputs["pooled_projections"] = randn(batch, config["pooled_projection_dim"])
    if case.valid is not None:
        valid = torch.arange(case.text, device=device) < case.valid
        inputs["encoder_attention_mask"] = valid.long().expand(batch, -1)
    if config.get("guidance_embeds"):
        scale = 3.5 if case.packs else 6.0 * TRAIN_TIMESTEPS
        inputs["guidance"] = torch.full((batch,), scale, device=device, dtype=dtype)
    _, rows, columns = grid
    if case.packs:
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
        inputs["img_ids"] = places.to(device)
        inputs["txt_ids"] = torch.zeros(case.text, 3, device=device)
        inputs["hidden_states"] = randn(batch, rows * columns, config["in_channels"])
        return inputs
    sizes = [tokens * edge for tokens, edge in zip(grid, case.patch, strict=True)]
    image = case.transformer == "SD3Transformer2DModel"
    inputs["hidden_states"] = randn(batch, config["in_channels"], *(sizes[1:] if image else sizes))
    return inputs


def at_noise(case: FullSize, inputs: dict[str, Any], noise: float) -> dict[str, Any]:
    """The same arguments at a noise level from 0 to 1."""
    hidden = inputs["hidden_states"]
    scale = 1 if case.packs else TRAIN_TIMESTEPS
    return {**inputs, "timestep": torch.full((case.batch,), noise * scale, device=hidden.device)}
