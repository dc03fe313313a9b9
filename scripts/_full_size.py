"""Transformers at full size, with random weights: what they are, and what one forward of them is given.

Numbers are those of the models' published config files. Weights are drawn on the device itself, in the dtype that is
asked for; nothing can be said about quality with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import testing


@dataclass(frozen=True)
class Scenario:
    """One model at one size."""

    title: str
    class_name: str  # of diffusers
    config: dict[str, Any]
    layers: dict[str, int]  # numbers of blocks, by the names of the config
    inputs: Callable[..., dict[str, Any]]  # of `dit_accel.testing`; they fit any configuration
    given: dict[str, Any]  # its arguments, `grid` among them
    small: dict[str, Any] = field(default_factory=dict)  # arguments for the check of correctness

    def build(self, device: torch.device, dtype: torch.dtype, share: float = 1.0, **tiny: Any) -> nn.Module:
        """The transformer with a share of its blocks, at least one of each kind."""
        import diffusers

        blocks = {name: max(1, round(count * share)) for name, count in self.layers.items()}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            with torch.device(device):
                made = getattr(diffusers, self.class_name)(**{**self.config, **blocks, **tiny})
        finally:
            torch.set_default_dtype(before)
        # as `from_pretrained` leaves them
        exact = set(made._keep_in_fp32_modules or ())
        for name, weight in made.named_parameters():
            if exact & set(name.split(".")):
                weight.data = weight.data.float()
        return made.eval().requires_grad_(False)

    def arguments(self, transformer: nn.Module, *, small: bool = False) -> dict[str, Any]:
        """Arguments of one forward, where the transformer is and in its dtype."""
        made = self.inputs(transformer, **{**self.given, **(self.small if small else {})})
        like = next(transformer.parameters())
        return {name: _as(x, like, name) for name, x in made.items()}


def _as(x: Any, like: Tensor, name: str) -> Any:
    if not isinstance(x, Tensor):
        return x
    # places and times are exact numbers, which 16 bits could not hold
    keep = not x.is_floating_point() or name.endswith("ids") or name == "timestep"
    return x.to(like.device) if keep else x.to(like.device, like.dtype)


_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
_FLUX = {
    "in_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
_SMALL_VIDEO, _SMALL_IMAGE = {"grid": (5, 12, 17)}, {"grid": (30, 33)}


def _flux(edge: int) -> Scenario:
    tokens = edge // 16
    return Scenario(
        f"FLUX.1, {edge} x {edge}",
        "FluxTransformer2DModel",
        _FLUX,
        {"num_layers": 19, "num_single_layers": 38},
        testing.tiny_flux_inputs,
        {"grid": (tokens, tokens), "text": 512},
        _SMALL_IMAGE,
    )


SCENARIOS: dict[str, Scenario] = {
    "wan-1.3b-480p": Scenario(
        "Wan 2.1 1.3B, 81 frames of 832 x 480",
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960},
        {"num_layers": 30},
        testing.tiny_wan_inputs,
        {"grid": (21, 30, 52)},
        _SMALL_VIDEO,
    ),
    "wan-14b-720p": Scenario(
        "Wan 2.1 14B, 81 frames of 1280 x 720",
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824},
        {"num_layers": 40},
        testing.tiny_wan_inputs,
        {"grid": (21, 45, 80)},
        _SMALL_VIDEO,
    ),
    "hunyuan-video-720p": Scenario(
        "HunyuanVideo, 129 frames of 1280 x 720, a prompt of 60 tokens padded to 256",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_refiner_layers": 2,
            "mlp_ratio": 4.0,
            "patch_size": 2,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "guidance_embeds": True,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
            "rope_theta": 256.0,
            "rope_axes_dim": (16, 56, 56),
        },
        {"num_layers": 20, "num_single_layers": 40},
        testing.tiny_hunyuan_video_inputs,
        {"grid": (33, 45, 80), "text": 256, "valid": 60},
        _SMALL_VIDEO,
    ),
    **{f"flux-{edge}": _flux(edge) for edge in (1024, 2048, 4096)},
    "sd3.5-large-1024": Scenario(
        "Stable Diffusion 3.5 large, 1024 x 1024",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        {"num_layers": 38},
        testing.tiny_sd3_inputs,
        {"grid": (64, 64), "text": 333},
        _SMALL_IMAGE,
    ),
}
