"""Families under the laws: tiny pipelines and models of diffusers. A new family adds a row to `FAMILIES` and `MODELS`.

Every grid has at least eight blocks of 16 tokens and a ragged tail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dit_accel import testing


@dataclass(frozen=True)
class Request:
    """What a law asks a pipeline for."""

    batch: int = 1
    guidance: bool = True
    other: bool = False  # another prompt


@dataclass(frozen=True)
class Family:
    """A tiny pipeline and how to call it."""

    make: Callable[[], Any]
    # the prompts of a request as embeddings: arguments of the pipeline's call
    embed: Callable[[Any, Request], dict[str, Any]]
    call: Callable[[Request], dict[str, Any]]  # all other arguments, and the prompts in words if they can be
    output: str = "frames"
    forwards: int = 2  # of a step with guidance
    prepare: Callable[[Any, Request], None] | None = None  # what is set on the pipeline instead of given to it
    raster: str | None = None  # why its tokens keep the model's own order
    line: str | None = None  # why its tokens are no one grid, on which methods that need one cannot be used
    backend: bool = True  # whether its stock processors know a choice of attention backend
    calls_back: bool = True  # whether the pipeline takes a callback


@dataclass(frozen=True)
class Model:
    """A tiny transformer, and its arguments for one forward."""

    make: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]
    large: dict[str, Any]  # what makes it large enough to measure memory
    large_inputs: dict[str, Any]
    tokens: int  # that these inputs are
    times: tuple[float, ...] = (1.8, 1.2, 0.6)  # of a run, as shares of the time in the inputs
    contexts: bool = True  # whether the class has cache contexts


def _words(request: Request) -> dict[str, Any]:
    prompts = ["a red star moves left", "a small blue circle spins"]
    prompts = ["something else"] * 2 if request.other else prompts
    guidance = 5.0 if request.guidance else 1.0
    return {
        "prompt": prompts[: request.batch],
        "negative_prompt": ["blurry"] * request.batch,
        "guidance_scale": guidance,
    }


def _wan_embeddings(pipe: Any, request: Request) -> dict[str, Any]:
    words = _words(request)
    cond, uncond = pipe.encode_prompt(words["prompt"], words["negative_prompt"], True)
    return {"prompt": None, "negative_prompt": None, "prompt_embeds": cond, "negative_prompt_embeds": uncond}


_VIDEO = {"height": 96, "width": 112, "num_frames": 9}  # 3 x 6 x 7 tokens


def _wan_video(request: Request) -> dict[str, Any]:
    return {**_VIDEO, **_words(request)}


def _wan_image(request: Request) -> dict[str, Any]:
    rows, columns = _VIDEO["height"], _VIDEO["width"]
    gradient = torch.arange(rows * columns * 3).remainder(251).to(torch.uint8).view(rows, columns, 3)
    return {**_wan_video(request), "image": Image.fromarray(gradient.numpy())}


def _randn(request: Request, *shape: int, seed: int = 0) -> Tensor:
    """Rows that stay the same in a larger batch."""
    generator = torch.Generator().manual_seed(seed + 10 * request.other)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(request.batch)])


def _flux_embeddings(pipe: Any, request: Request) -> dict[str, Any]:
    config = pipe.transformer.config
    made = {
        "prompt_embeds": _randn(request, 19, config.joint_attention_dim),
        "pooled_prompt_embeds": _randn(request, config.pooled_projection_dim, seed=1),
    }
    if request.guidance:
        made["negative_prompt_embeds"] = _randn(request, 19, config.joint_attention_dim, seed=2)
        made["negative_pooled_prompt_embeds"] = _randn(request, config.pooled_projection_dim, seed=3)
    return made


def _flux_image(request: Request) -> dict[str, Any]:
    # 11 x 13 tokens; guidance on velocities that large would leave noise alone
    return {"height": 22, "width": 26, "true_cfg_scale": 1.5 if request.guidance else 1.0}


def _sd3_embeddings(pipe: Any, request: Request) -> dict[str, Any]:
    config = pipe.transformer.config
    shapes = {
        "prompt_embeds": (19, config.joint_attention_dim),
        "pooled_prompt_embeds": (config.pooled_projection_dim,),
    }
    made = {name: _randn(request, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return made | {f"negative_{name}": -x for name, x in made.items()}


def _sd3_image(request: Request) -> dict[str, Any]:
    return {"height": 22, "width": 26, "guidance_scale": 4.0 if request.guidance else 1.0}


def _z_image_embeddings(pipe: Any, request: Request) -> dict[str, Any]:
    size = pipe.transformer.config.cap_feat_dim
    made = {"prompt_embeds": list(_randn(request, 19, size))}
    return made | ({"negative_prompt_embeds": list(_randn(request, 40, size, seed=2))} if request.guidance else {})


def _z_image(request: Request) -> dict[str, Any]:
    return {"height": 22, "width": 26, "guidance_scale": 1.5 if request.guidance else 0.0}


def _flux2_embeddings(pipe: Any, request: Request) -> dict[str, Any]:
    size = pipe.transformer.config.joint_attention_dim
    made = {"prompt_embeds": _randn(request, 19, size)}
    return made | ({"negative_prompt_embeds": _randn(request, 19, size, seed=2)} if request.guidance else {})


def _flux2_image(request: Request) -> dict[str, Any]:
    return {"height": 88, "width": 104, "guidance_scale": 1.5 if request.guidance else 1.0}


_HUNYUAN = {"height": 80, "width": 112, "num_frames": 13}  # 4 x 5 x 7 tokens


def _masked(request: Request, tokens: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings of a prompt of which the last quarter is padding, and their mask."""
    mask = (torch.arange(tokens) < tokens * 3 // 4).long().expand(request.batch, -1)
    return _randn(request, tokens, size, seed=seed), mask


def _both(request: Request, embed: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Embeddings of a prompt and, with guidance, of a negative one."""
    negative = {f"negative_{name}": x for name, x in embed(5).items()} if request.guidance else {}
    return embed(0) | negative


def _hunyuan_embeddings(pipe: Any, request: Request) -> dict[str, Any]:
    def embed(seed: int) -> dict[str, Any]:
        names = ("prompt_embeds", "prompt_attention_mask")
        pooled = {"pooled_prompt_embeds": _randn(request, 8, seed=seed + 1)}
        return dict(zip(names, _masked(request, 20, 24, seed), strict=True)) | pooled

    return _both(request, embed)


def _hunyuan_video(request: Request) -> dict[str, Any]:
    return {**_HUNYUAN, "true_cfg_scale": 1.5 if request.guidance else 1.0}


def _hunyuan15_embeddings(pipe: Any, request: Request) -> dict[str, Any]:
    def embed(seed: int) -> dict[str, Any]:
        made = dict(zip(("prompt_embeds", "prompt_embeds_mask"), _masked(request, 20, 24, seed), strict=True))
        names = ("prompt_embeds_2", "prompt_embeds_mask_2")
        return made | dict(zip(names, _masked(request, 10, 12, seed + 1), strict=True))

    return _both(request, embed)


def _guide_hunyuan15(pipe: Any, request: Request) -> None:
    pipe.guider.guidance_scale = 1.5 if request.guidance else 1.0


def _framepack_video(request: Request) -> dict[str, Any]:
    """One section of 3 x 5 x 7 tokens behind its history."""
    call = {**_hunyuan_video(request), "num_frames": 9, "latent_window_size": 3}
    return {**call, "image": [Image.radial_gradient("L").resize((112, 80)).convert("RGB")] * request.batch}


FAMILIES: dict[str, Family] = {
    "wan-t2v": Family(testing.tiny_wan_pipeline, _wan_embeddings, _wan_video),
    "wan-i2v": Family(lambda: testing.tiny_wan_pipeline(i2v=True), _wan_embeddings, _wan_image),
    "wan-two-experts": Family(
        lambda: testing.tiny_wan_pipeline(two_experts=True), _wan_embeddings, _wan_video
    ),
    "flux": Family(testing.tiny_flux_pipeline, _flux_embeddings, _flux_image, "images"),
    "flux2-klein": Family(
        lambda: testing.tiny_flux2_pipeline("Flux2KleinPipeline"), _flux2_embeddings, _flux2_image, "images"
    ),
    "hunyuan-video-t2v": Family(testing.tiny_hunyuan_video_pipeline, _hunyuan_embeddings, _hunyuan_video),
    "hunyuan-video15-t2v": Family(
        testing.tiny_hunyuan_video15_pipeline,
        _hunyuan15_embeddings,
        lambda request: dict(_HUNYUAN),
        prepare=_guide_hunyuan15,
        calls_back=False,
    ),
    "framepack": Family(
        testing.tiny_framepack_pipeline,
        _hunyuan_embeddings,
        _framepack_video,
        line="history of other scales before the video",
    ),
    "sd3": Family(testing.tiny_sd3_pipeline, _sd3_embeddings, _sd3_image, "images", forwards=1, backend=False),
    "z-image": Family(
        testing.tiny_z_image_pipeline,
        _z_image_embeddings,
        _z_image,
        "images",
        forwards=1,
        raster="no hook reaches Z-Image's rotary table",
    ),
}
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 64}
MODELS: dict[str, Model] = {
    "wan": Model(
        testing.tiny_wan_transformer,
        testing.tiny_wan_inputs,
        {**_HEADS, "ffn_dim": 1024},
        {"grid": (9, 16, 15)},
        2160,
    ),
    "flux": Model(
        testing.tiny_flux_transformer,
        testing.tiny_flux_inputs,
        {**_HEADS, "axes_dims_rope": (16, 24, 24)},
        {"grid": (48, 45), "text": 100},
        2260,
    ),
    "flux2": Model(
        testing.tiny_flux2_transformer,
        testing.tiny_flux2_inputs,
        {**_HEADS, "axes_dims_rope": (16, 16, 16, 16)},
        {"grid": (48, 45), "text": 100},
        2260,
    ),
    "ltx": Model(
        testing.tiny_ltx_transformer,
        testing.tiny_ltx_inputs,
        {**_HEADS, "cross_attention_dim": 256},
        {"grid": (9, 16, 15)},
        2160,
    ),
    "qwen-image": Model(
        testing.tiny_qwen_image_transformer,
        testing.tiny_qwen_image_inputs,
        {**_HEADS, "axes_dims_rope": (16, 24, 24)},
        {"grid": (48, 45), "text": 100},
        2260,
    ),
    "hunyuan-video": Model(
        testing.tiny_hunyuan_video_transformer,
        testing.tiny_hunyuan_video_inputs,
        {**_HEADS, "rope_axes_dim": (16, 24, 24)},
        {"grid": (9, 16, 15), "text": 100, "valid": 77},
        2237,
    ),
    "hunyuan-video15": Model(
        testing.tiny_hunyuan_video15_transformer,
        testing.tiny_hunyuan_video15_inputs,
        {**_HEADS, "rope_axes_dim": (16, 24, 24)},
        {"grid": (9, 16, 15)},
        2160,
    ),
    "framepack": Model(
        testing.tiny_framepack_transformer,
        testing.tiny_framepack_inputs,
        {**_HEADS, "rope_axes_dim": (16, 24, 24)},
        {"grid": (6, 16, 15), "text": 100, "valid": 77},
        2134,
    ),
    "minimax-h3": Model(
        testing.tiny_minimax_h3_transformer,
        testing.tiny_minimax_h3_inputs,
        {**_HEADS, "hidden_size": 256, "ffn_dim": 512, "rope_freq_dim": 8},
        {"grid": (9, 16, 15), "text": 100},
        2268,
        times=(0.6, 1.2, 1.8),  # it runs from noise, 0, to 1
    ),
    "sd3": Model(
        testing.tiny_sd3_transformer,
        testing.tiny_sd3_inputs,
        {**_HEADS, "caption_projection_dim": 256, "pos_embed_max_size": 48, "dual_attention_layers": (0,)},
        {"grid": (48, 45), "text": 100},
        2260,
        contexts=False,
    ),
}
