"""Models of ComfyUI's core: how their tokens lie, and which self-attentions they have.

A model is told by the name of its class, since none of them may be imported without ComfyUI. Text stands where the core
puts it: FLUX and SD3 before the image, HunyuanVideo behind the video, Wan not at all. Everything is read from what
ComfyUI gives the model as a whole, latents without the channels that condition them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit_accel.adapters.joint import grid_of_images
from dit_accel.errors import UnknownModelError
from dit_accel.layout import Grid
from dit_accel.trajectory import Facts

PIPELINES = ("wan", "hunyuan_video", "flux", "sd3")  # as presets call the families

# kind of block, its number -> layers, in the order in which the block attends with them
Slots = dict[tuple[str, int], tuple[int, ...]]


@dataclass(frozen=True)
class Tokens:
    """What attends to one another in a forward."""

    grid: Grid
    text: int = 0
    text_first: bool = False
    text_valid: tuple[int, ...] | None = None  # as of `Facts`
    loose: str | None = None  # as of `Facts`


@dataclass(frozen=True)
class Family:
    """One family of models."""

    slots: Callable[[nn.Module], Slots]
    # from the model, latents [B, C, (F,) H, W], text embeddings [B, L, C] and the other conditioning by name
    read: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tokens]
    balanced: Callable[[nn.Module], str]  # the name of the balanced preset for a model
    patch: Callable[[nn.Module], tuple[int, ...]]  # edges of a token in latents, as many as these have axes
    width: Callable[[nn.Module], int]  # numbers in a token's key, of all heads
    rotary_axis: int | None  # along which the rotary table that blocks are given has its tokens
    # why a model with this conditioning computes every token under region sampling, or None
    why_whole: Callable[[nn.Module, Mapping[str, Any]], str | None]

    def facts(
        self, model: nn.Module, latents: Tensor, noise: float, text: Tensor, given: Mapping[str, Any]
    ) -> Facts:
        """What one forward is about. noise: level, 0 to 1."""
        tokens = self.read(model, latents, text, given)
        return Facts(
            timestep=1000 * noise,
            grid=tokens.grid,
            shape=tuple(latents.shape[1:]),
            condition=None,  # branches have names here
            loose=tokens.loose,
            text=tokens.text,
            text_first=tokens.text_first,
            text_valid=tokens.text_valid,
        )


def find_family(model: nn.Module) -> Family:
    """The family of a diffusion model, by the names of its class and its bases.

    Raises:
        UnknownModelError: none of them is known.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise UnknownModelError(
        f"{type(model).__name__} is of no family that DiT-Accel knows in ComfyUI. Known: "
        f"{', '.join(sorted(FAMILIES))}. Take the DiT-Accel node out, or set it to off."
    )


# -- Wan


def _wan_slots(model: nn.Module) -> Slots:
    layers = len(model.blocks)
    slots = {("double", i): (i,) for i in range(layers)}
    for i, n in getattr(model, "vace_layers_mapping", {}).items():  # a VACE block follows its main one
        slots["double", i] += (layers + n,)
    return slots


def _wan_tokens(model: nn.Module, latents: Tensor, text: Tensor, given: Mapping[str, Any]) -> Tokens:
    frames, rows, columns = _patches(latents, model.patch_size)
    if given.get("time_dim_concat") is not None:
        frames = _patches(latents, model.patch_size, given["time_dim_concat"].shape[2])[0]
    if getattr(model, "ref_conv", None) is not None and "reference_latent" in given:
        frames += 1
    return Tokens((frames, rows, columns))


def _why_wan_whole(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    if given.get("time_dim_concat") is not None:
        return "frames are appended to the latents"
    if given.get("reference_latent") is not None:
        return "a reference image"
    return None


def _wan_balanced(model: nn.Module) -> str:
    kind = {1536: "wan21-1.3b", 3072: "wan22-5b"}.get(model.dim)
    return f"{kind or ('wan21-i2v' if model.model_type == 'i2v' else 'wan21')}-balanced"


# -- FLUX and HunyuanVideo


def _two_stream_slots(model: nn.Module) -> Slots:
    double = len(model.double_blocks)
    slots = {("double", i): (i,) for i in range(double)}
    return slots | {("single", i): (double + i,) for i in range(len(model.single_blocks))}


def _why_flux_whole(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    if given.get("ref_latents"):
        return "reference images"
    if given.get("attention_mask") is not None:
        return "an attention mask"
    return None


def _why_hunyuan_whole(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    if given.get("ref_latent") is not None:
        return "a reference image"
    if given.get("guiding_frame_index") is not None:
        return "the first frame is modulated by itself"
    if given.get("clip_fea") is not None:
        return "an image's tokens stand among the text"
    return None


def _flux_tokens(model: nn.Module, latents: Tensor, text: Tensor, given: Mapping[str, Any]) -> Tokens:
    references = given.get("ref_latents") or ()
    images = [_patches(x, (model.patch_size,) * 2) for x in (latents, *references)]
    grid, loose = grid_of_images(images)
    return Tokens(grid, text.shape[1], text_first=True, loose=loose)


def _hunyuan_tokens(model: nn.Module, latents: Tensor, text: Tensor, given: Mapping[str, Any]) -> Tokens:
    grid = _patches(latents, model.patch_size)
    mask, tokens = given.get("attention_mask"), text.shape[1]
    if getattr(model, "byt5_in", None) is not None and given.get("txt_byt5") is not None:
        return Tokens(grid, tokens + given["txt_byt5"].shape[1])
    valid = None
    if mask is not None and not mask.is_floating_point() and mask.shape[-1] == tokens:
        mask = mask.view(-1, tokens)
        if bool((mask[:, 1:] <= mask[:, :-1]).all()):  # else a mask that is no padding, which runs dense
            valid = tuple(mask.sum(1).tolist())
    return Tokens(grid, tokens, text_valid=valid)


# -- SD3


def _sd3_slots(model: nn.Module) -> Slots:
    slots, layer = {}, 0
    for i, block in enumerate(model.joint_blocks):
        count = 1 + bool(block.x_block.x_block_self_attn)
        slots["joint", i] = tuple(range(layer, layer + count))
        layer += count
    return slots


def _sd3_tokens(model: nn.Module, latents: Tensor, text: Tensor, given: Mapping[str, Any]) -> Tokens:
    grid = _patches(latents, (model.patch_size,) * 2)
    return Tokens(grid, text.shape[1], text_first=True)


FAMILIES = {
    "Flux": Family(
        slots=_two_stream_slots,
        read=_flux_tokens,
        balanced=lambda model: "flux-balanced",
        patch=lambda model: (model.patch_size,) * 2,
        width=lambda model: model.hidden_size,
        rotary_axis=2,
        why_whole=_why_flux_whole,
    ),
    "HunyuanVideo": Family(
        slots=_two_stream_slots,
        read=_hunyuan_tokens,
        balanced=lambda model: "hunyuanvideo-balanced",
        patch=lambda model: model.patch_size,
        width=lambda model: model.hidden_size,
        rotary_axis=2,
        why_whole=_why_hunyuan_whole,
    ),
    "OpenAISignatureMMDITWrapper": Family(  # SD3's MMDiT
        slots=_sd3_slots,
        read=_sd3_tokens,
        balanced=lambda model: "sd3-balanced",
        patch=lambda model: (model.patch_size,) * 2,
        width=lambda model: model.hidden_size,
        rotary_axis=None,
        why_whole=lambda model, given: None,
    ),
    "WanModel": Family(
        slots=_wan_slots,
        read=_wan_tokens,
        balanced=_wan_balanced,
        patch=lambda model: model.patch_size,
        width=lambda model: model.dim,
        rotary_axis=1,
        why_whole=_why_wan_whole,
    ),
}


def _patches(latents: Tensor, patch: tuple[int, ...], more_frames: int = 0) -> Grid:
    """Frames, rows and columns of tokens of latents `[B, C, (F,) H, W]`; the core pads them to whole patches."""
    sizes = list(latents.shape[-len(patch) :])
    sizes[0] += more_frames
    grid = tuple(math.ceil(size / edge) for size, edge in zip(sizes, patch, strict=True))
    return (1,) * (3 - len(grid)) + grid
