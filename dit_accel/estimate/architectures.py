"""Architectures: the configurations of published transformers, those of each model's own `transformer/config.json`.

The one table of them: the estimate counts with it, and the scripts that time full-size models build from it. A model in
a local folder is read from its own files instead (`read_architecture`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_accel.errors import UsageError
from dit_accel.pipelines.limits import SizeRule, vae_step
from dit_accel.pipelines.weights import components, read_config, read_index, read_json
from dit_accel.presets import model_path, shipped_models

WAN, HUNYUAN = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"
FLUX, SD3 = "FluxTransformer2DModel", "SD3Transformer2DModel"
VIDEO = (WAN, HUNYUAN)


@dataclass(frozen=True)
class Published:
    """One model: its transformer, and what of its pipeline decides how many tokens there are."""

    transformer: str  # its class in diffusers
    config: Mapping[str, Any]
    text: int  # text tokens a forward is given, padding included
    valid: int | None = None  # how many of them are taken for no padding, where the model masks it; none: it does not
    spatial: int = 8  # pixels along a side of one latent
    temporal: int = 4  # frames of one latent, where there are frames
    transformers: int = 1  # experts that share the steps; all of their weights are held
    both_branches: bool = False  # whether guidance's two branches are rows of one forward
    guided: bool = True  # whether guidance takes a second branch at all
    # shift of the noise schedule that the model ships with; none: by the size of the image, as FLUX.1 dev's
    flow_shift: float | None = 1.0
    origin: str = "published configuration"

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def layers(self) -> int:
        """Blocks with self-attention."""
        return self.config["num_layers"] + self.config.get("num_single_layers", 0)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return patch_of(self.transformer, self.config)

    def grid(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens.

        Raises:
            UsageError: a size that the model cannot make; the message names the nearest.
        """
        if self.transformer in VIDEO:
            rule = SizeRule.of_videos(self.spatial, self.temporal, self.patch)
        else:
            rule = SizeRule.of_images(self.spatial * self.patch[1])
        rule.check(width, height, frames)
        latents = (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial
        f, h, w = (size // patch for size, patch in zip(latents, self.patch, strict=True))
        return f, h, w


def patch_of(transformer: str, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of latents in a token. FLUX's pipeline, not its transformer, makes tokens of latents."""
    if transformer == FLUX:
        return 1, 2, 2
    size = config.get("patch_size", 2)
    f, h, w = size if isinstance(size, tuple | list) else (config.get("patch_size_t", 1), size, size)
    return f, h, w


def _wan(heads: int, layers: int, ffn: int, **more: Any) -> Published:
    config = dict(
        patch_size=(1, 2, 2), attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
        num_attention_heads=heads, num_layers=layers, ffn_dim=ffn,
    )  # fmt: skip
    own = {key: more.pop(key) for key in list(more) if key not in Published.__dataclass_fields__}
    return Published(WAN, {**config, **own}, text=512, **{"flow_shift": 3.0, **more})


_FLUX = Published(
    transformer=FLUX,
    config=dict(
        patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    ),
    text=512, temporal=1, guided=False, flow_shift=None,
)  # fmt: skip
_HUNYUAN = Published(
    transformer=HUNYUAN,
    config=dict(
        in_channels=16, out_channels=16, num_attention_heads=24, attention_head_dim=128, num_layers=20,
        num_single_layers=40, num_refiner_layers=2, mlp_ratio=4.0, patch_size=2, patch_size_t=1, qk_norm="rms_norm",
        guidance_embeds=True, text_embed_dim=4096, pooled_projection_dim=768, rope_theta=256.0,
        rope_axes_dim=(16, 56, 56),
    ),
    text=256, valid=64, guided=False, flow_shift=7.0,  # valid: a prompt of some forty words
)  # fmt: skip
_SD35_LARGE = Published(
    transformer=SD3,
    config=dict(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=38, attention_head_dim=64,
        num_attention_heads=38, joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048,
        pos_embed_max_size=192, qk_norm="rms_norm",
    ),
    text=77 + 256, temporal=1, both_branches=True, flow_shift=3.0,  # text: CLIP's and T5's
)  # fmt: skip
_A14B = dict(heads=40, layers=40, ffn=13824)
PUBLISHED: Mapping[str, Published] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(12, 30, 8960),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(**_A14B),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _wan(**_A14B, in_channels=36, added_kv_proj_dim=5120, image_dim=1280),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan(**_A14B, transformers=2),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _wan(**_A14B, in_channels=36, transformers=2),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(24, 30, 14336, in_channels=48, out_channels=48, spatial=16),
    "hunyuanvideo-community/HunyuanVideo": _HUNYUAN,
    "hunyuanvideo-community/HunyuanVideo-I2V": replace(
        _HUNYUAN,
        config={
            **_HUNYUAN.config, "in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat",
        },
    ),
    "black-forest-labs/FLUX.1-dev": _FLUX,
    "black-forest-labs/FLUX.1-schnell": replace(
        _FLUX, config={**_FLUX.config, "guidance_embeds": False}, text=256, guided=True, flow_shift=1.0
    ),
    "stabilityai/stable-diffusion-3.5-large": _SD35_LARGE,
}  # fmt: skip


def find_architecture(model: str) -> Published:
    """The architecture of a model: from its files where it is a shipped model or a local folder, else from the table.

    Raises:
        UsageError: a hub id that the table does not have.
        EnvironmentProblem: a folder without the config files.
    """
    folder = model_path(model) if model in shipped_models() else Path(model).expanduser()
    if folder.is_dir():
        return read_architecture(folder)
    if model not in PUBLISHED:
        raise UsageError(
            f"model {model!r}: its architecture is not in the table of published ones ({', '.join(PUBLISHED)}); "
            "give a local folder in diffusers' format with --model DIR (its config files are enough)"
        )
    return PUBLISHED[model]


def read_architecture(folder: Path) -> Published:
    """The architecture of a model in a local folder, from its config files alone.

    Raises:
        EnvironmentProblem: a config file is missing or broken.
        UsageError: a transformer that is not counted.
    """
    parts = components(folder)
    # Wan 2.2 in two folders: their architectures are alike.
    name = next((name for name in ("transformer", "transformer_2") if name in parts), "transformer")
    transformer = parts.get(name, ("", "none"))[1]
    like = {published.transformer: published for published in PUBLISHED.values()}.get(transformer)
    if like is None:
        known = sorted({published.transformer for published in PUBLISHED.values()})
        raise UsageError(f"{folder}: its transformer is a {transformer}; what is counted are {', '.join(known)}")
    config, vae = read_config(folder, name), read_config(folder, "vae")
    if transformer == WAN:
        spatial, temporal = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    elif transformer == HUNYUAN:
        spatial, temporal = vae.get("spatial_compression_ratio", 8), vae.get("temporal_compression_ratio", 4)
    else:
        spatial, temporal = vae_step(vae), 1
    text, guided = like.text, like.guided
    if transformer == FLUX:
        # without distilled guidance there is a second branch; T5's prompt is padded as the recipe has it
        guided = not config.get("guidance_embeds")
        most = 256 if guided else 512
        text = min(most, _length(folder, "tokenizer_2", most))
    if transformer == SD3:
        # CLIP's prompt is padded to its tokenizer's length, T5's to the pipeline's 256 or fewer
        text = _length(folder, "tokenizer", 77) + min(256, _length(folder, "tokenizer_3", 256))
    return replace(
        like,
        config=config,
        text=text,
        spatial=spatial,
        temporal=temporal,
        transformers=sum(part in parts for part in ("transformer", "transformer_2")),
        guided=guided,
        flow_shift=_flow_shift(folder),
        origin=f"{read_index(folder)['_class_name']} in {folder.name}/",
    )


def _flow_shift(folder: Path) -> float | None:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "the noise schedule")
    if scheduler.get("use_dynamic_shifting"):
        return None
    return float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)) or 1.0)


def _length(folder: Path, tokenizer: str, usual: int) -> int:
    """Tokens that a tokenizer of the folder was made for; `usual` where there is none."""
    if not (folder / tokenizer / "tokenizer_config.json").is_file():
        return usual
    told = read_json(folder / tokenizer / "tokenizer_config.json", "the length of a prompt")
    return int(told.get("model_max_length", usual))
