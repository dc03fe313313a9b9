"""Transformers in the sizes that are published, to be built with random weights: for timing, never for quality.

The configurations are those of the models' own `transformer/config.json`, written out. Weights are drawn on the device
in the dtype they run in, without a copy in main memory, so that a model needs there what it needs in a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

# lists of blocks in a transformer, and what a config calls their length
DEPTHS = {
    "blocks": "num_layers",
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
}
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class FullSize:
    """One forward of one published model."""

    name: str
    model: str  # hub id of the model whose config this is
    transformer: str  # its class in diffusers
    config: Mapping[str, Any]
    width: int  # pixels
    height: int  # pixels
    text: int  # text tokens a forward is given, padding included
    frames: int = 1
    spatial: int = 8  # compression of the autoencoder
    temporal: int = 4
    valid: int | None = None  # how many of them are no padding, where the model masks it; none: it does not
    batch: int = 1
    presets: tuple[str, ...] = ()  # those made for this model and size
    shallow: Mapping[str, int] = field(default_factory=dict)  # fewer layers, of which the time is scaled
    tiny: Mapping[str, Any] = field(default_factory=dict)  # what makes it run on a CPU in a moment

    @property
    def packs(self) -> bool:
        """Whether the pipeline, not the transformer, makes tokens of the latents."""
        return self.transformer == "FluxTransformer2DModel"

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        if self.packs:
            return 1, 2, 2
        size = self.config["patch_size"]
        return tuple(size) if isinstance(size, tuple) else (self.config.get("patch_size_t", 1), size, size)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns, in tokens."""
        latents = (
            (self.frames - 1) // self.temporal + 1,
            self.height // self.spatial,
            self.width // self.spatial,
        )
        return tuple(size // patch for size, patch in zip(latents, self.patch, strict=True))

    @property
    def layers(self) -> dict[str, int]:
        """Blocks of the published model, by the config's name for them."""
        return {name: self.config[name] for name in dict.fromkeys(DEPTHS.values()) if name in self.config}

    def made_tiny(self) -> FullSize:
        """The same code on a model and a grid for a CPU."""
        config = {**self.config, **self.tiny, **dict.fromkeys(self.layers, 2)}
        _, high, wide = self.patch
        size = dict(
            frames=min(self.frames, 1 + 2 * self.temporal),
            height=12 * high * self.spatial,
            width=10 * wide * self.spatial,
        )
        valid = None if self.valid is None else 7
        return replace(
            self, config=config, text=16, valid=valid, shallow=dict.fromkeys(self.shallow, 1), **size
        )


_SMALL_HEADS = dict(num_attention_heads=2, attention_head_dim=16)


def _wan(
    name: str,
    model: str,
    size: dict[str, int],
    presets: tuple[str, ...],
    shallow: dict[str, int] | None = None,
    **config: int,
) -> FullSize:
    """Wan 2.1's text to video, of one of its numbers of weights."""
    shared = dict(
        patch_size=(1, 2, 2), attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    )  # fmt: skip
    return FullSize(
        name=name,
        model=f"Wan-AI/{model}-Diffusers",
        transformer="WanTransformer3DModel",
        config={**shared, **config},
        **size,
        frames=81,
        text=512,
        presets=presets,
        shallow=shallow or {},
        tiny=dict(num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32),
    )


def _flux(side: int) -> FullSize:
    """FLUX.1 dev, with square images of so many pixels."""
    return FullSize(
        name=f"flux-{side}",
        model="black-forest-labs/FLUX.1-dev",
        transformer="FluxTransformer2DModel",
        config=dict(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        width=side,
        height=side,
        temporal=1,
        text=512,
        presets=("flux-fast", "flux-balanced"),
        tiny={
            **_SMALL_HEADS,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
    )


_HUNYUAN = FullSize(
    name="hunyuanvideo-720p",
    model="hunyuanvideo-community/HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    config=dict(
        in_channels=16,
        out_channels=16,
        num_attention_heads=24,
        attention_head_dim=128,
        num_layers=20,
        num_single_layers=40,
        num_refiner_layers=2,
        mlp_ratio=4.0,
        patch_size=2,
        patch_size_t=1,
        qk_norm="rms_norm",
        guidance_embeds=True,
        text_embed_dim=4096,
        pooled_projection_dim=768,
        rope_theta=256.0,
        rope_axes_dim=(16, 56, 56),
    ),
    width=1280,
    height=720,
    frames=129,
    text=256,
    valid=64,  # a prompt of some forty words
    presets=("hunyuanvideo-fast", "hunyuanvideo-balanced"),
    shallow={"num_layers": 4, "num_single_layers": 8},
    tiny={**_SMALL_HEADS, "text_embed_dim": 24, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)},
)
_SD3 = FullSize(
    name="sd3.5-large-1024",
    model="stabilityai/stable-diffusion-3.5-large",
    transformer="SD3Transformer2DModel",
    config=dict(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=38,
        attention_head_dim=64,
        num_attention_heads=38,
        joint_attention_dim=4096,
        caption_projection_dim=2432,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
    width=1024,
    height=1024,
    temporal=1,
    text=77 + 256,  # CLIP's and T5's
    batch=2,  # its pipeline sends both branches of guidance in one forward
    presets=("sd3-fast", "sd3-balanced"),
    tiny={
        **_SMALL_HEADS,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
    },
)
_480P, _720P = dict(width=832, height=480), dict(width=1280, height=720)
CASES = {
    case.name: case
    for case in (
        _wan(
            "wan-1.3b-480p", "Wan2.1-T2V-1.3B", _480P, ("wan21-1.3b-fast", "wan21-1.3b-balanced"),
            num_attention_heads=12, num_layers=30, ffn_dim=8960,
        ),
        _wan(
            "wan-14b-720p", "Wan2.1-T2V-14B", _720P, ("wan21-fast", "wan21-balanced"),
            shallow={"num_layers": 8}, num_attention_heads=40, num_layers=40, ffn_dim=13824,
        ),
        _HUNYUAN,
        *map(_flux, (1024, 2048, 4096)),
        _SD3,
    )
}  # fmt: skip


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
