"""Forwards of published models in published sizes: what is timed on a GPU, and what the estimate is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dit_accel.estimate.architectures import PUBLISHED, patch_of

# lists of blocks in a transformer, and what a config calls their length
DEPTHS = {
    "blocks": "num_layers",
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
}


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
        return patch_of(self.transformer, self.config)

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


def _case(name: str, model: str, presets: tuple[str, ...], size: tuple[int, int, int], **more: Any) -> FullSize:
    """A case of a published model. size: width and height in pixels, and frames."""
    published = PUBLISHED[model]
    return FullSize(
        name=name,
        model=model,
        transformer=published.transformer,
        config=published.config,
        width=size[0],
        height=size[1],
        frames=size[2],
        text=published.text,
        valid=published.valid,
        spatial=published.spatial,
        temporal=published.temporal,
        batch=2 if published.both_branches else 1,  # its pipeline sends both branches of guidance in one forward
        presets=presets,
        **more,
    )


_WAN_TINY = dict(num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32)
_FLUX_TINY = {
    **_SMALL_HEADS,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
_HUNYUAN_TINY = {**_SMALL_HEADS, "text_embed_dim": 24, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)}
_SD3_TINY = {**_SMALL_HEADS, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20}
CASES = {
    case.name: case
    for case in (
        _case(
            "wan-1.3b-480p", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ("wan21-1.3b-fast", "wan21-1.3b-balanced"),
            (832, 480, 81), tiny=_WAN_TINY,
        ),
        _case(
            "wan-14b-720p", "Wan-AI/Wan2.1-T2V-14B-Diffusers", ("wan21-fast", "wan21-balanced"),
            (1280, 720, 81), shallow={"num_layers": 8}, tiny=_WAN_TINY,
        ),
        _case(
            "hunyuanvideo-720p", "hunyuanvideo-community/HunyuanVideo", ("hunyuanvideo-fast", "hunyuanvideo-balanced"),
            (1280, 720, 129), shallow={"num_layers": 4, "num_single_layers": 8}, tiny=_HUNYUAN_TINY,
        ),
        *(
            _case(
                f"flux-{side}", "black-forest-labs/FLUX.1-dev", ("flux-fast", "flux-balanced"), (side, side, 1),
                tiny=_FLUX_TINY,
            )
            for side in (1024, 2048, 4096)
        ),
        _case(
            "sd3.5-large-1024", "stabilityai/stable-diffusion-3.5-large", ("sd3-fast", "sd3-balanced"),
            (1024, 1024, 1), tiny=_SD3_TINY,
        ),
    )
}  # fmt: skip
