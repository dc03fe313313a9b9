"""Small random models of ComfyUI's core, made of its own classes, as its loaders give them to nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams

WIDTH, HEADS = 64, 2
_WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=WIDTH, ffn_dim=128, num_heads=HEADS, num_layers=3, text_dim=32,
    freq_dim=32,
)  # fmt: skip
_STREAMS = dict(
    in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=32, hidden_size=WIDTH, mlp_ratio=2.0,
    num_heads=HEADS, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=256, qkv_bias=True,
)  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WAN21_T2V", {**_WAN}),
    "hunyuan": (
        "HunyuanVideo",
        {
            **_STREAMS, "image_model": "hunyuan_video", "patch_size": [1, 2, 2], "guidance_embed": True, "byt5": False,
            "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
        },
    ),
    "flux": (
        "Flux", {**_STREAMS, "image_model": "flux", "patch_size": 2, "guidance_embed": True, "txt_ids_dims": []}
    ),
    "sd3": (
        "SD3",
        {
            "in_channels": 16, "patch_size": 2, "depth": HEADS, "num_blocks": 3, "adm_in_channels": 24,
            "context_size": 32, "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}
            },
            "pos_embed_max_size": 64, "num_patches": 4096, "input_size": None, "pos_embed_scaling_factor": None,
            "qk_norm": "rms", "x_block_self_attn_layers": [0],
        },
    ),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
BY_FRAME = "wan22"  # a family whose frames may have noise levels of their own
CONFIGS |= {
    BY_FRAME: ("WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48}),
    "wan-i2v": ("WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36}),
    "flux2": (
        "Flux2",
        {
            **_STREAMS, "image_model": "flux2", "patch_size": 1, "in_channels": 128, "out_channels": 128,
            "axes_dim": [8, 8, 8, 8], "vec_in_dim": None, "guidance_embed": True, "txt_ids_dims": [3],
            "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
        },
    ),
    "hunyuan-image": (
        "HunyuanImage21",
        {
            **CONFIGS["hunyuan"][1], "vec_in_dim": None, "patch_size": [1, 1], "in_channels": 64, "out_channels": 64,
            "axes_dim": [16, 16], "guidance_embed": False,
        },
    ),
}  # fmt: skip
_PARAMS = {
    "flux": FluxParams, "flux2": FluxParams, "hunyuan": HunyuanVideoParams, "hunyuan-image": HunyuanVideoParams
}  # fmt: skip
VIDEO = ("wan", "hunyuan", BY_FRAME, "wan-i2v")


def build(family: str) -> Any:
    """A ModelPatcher of a small random model. Two builds of a family are equal."""
    name, config = CONFIGS[family]
    if family in _PARAMS:  # cores differ in what these hold
        known = {field.name for field in dataclasses.fields(_PARAMS[family])} | {"image_model"}
        config = {key: value for key, value in config.items() if key in known}
    model_config = getattr(comfy.supported_models, name)({**config, "dtype": torch.float32})
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=draw)
        parameter.data = drawn * (0.3 / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.3)
        parameter.requires_grad_(False)
    for name, buffer in model.diffusion_model.named_buffers():
        if name == "pos_embed":  # left for a checkpoint to fill
            buffer.copy_(torch.randn(buffer.shape, generator=draw))
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def conditioning(family: str, seed: int = 1, tokens: int = 7, **more: Any) -> list[Any]:
    """A prompt's embeddings, as a text encode node gives them."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, 32, generator=draw)
    return [[text, {"pooled_output": torch.randn(1, 24, generator=draw), **more}]]


def latents(family: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Empty latents of so many frames, rows and columns."""
    config = CONFIGS[family][1]
    channels = config.get("out_channels") or config.get("out_dim") or 16
    shape = (1, channels, *size) if family in VIDEO else (1, channels, *size[1:])
    return {"samples": torch.zeros(shape)}
