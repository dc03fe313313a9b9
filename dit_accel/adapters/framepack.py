"""FramePack, HunyuanVideo that makes a video section by section: the frames before a section go along as tokens.

Every attention is joint: history of three scales (one token for 4x4x4, 2x2x2 or 1 token of video), the section's video,
then tokens of an image and of text, of which the last ones may be padding. One prompt alone comes without its padding;
in a batch padding is kept out by a mask, and trimmed here, which is exact.

Tokens of several scales are no one grid. History and video are taken as a line and stay in the model's own order:
blocks are then runs of rows, scored like any others, and methods that look at places run dense, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dit_accel.adapters import hunyuan_video
from dit_accel.adapters.joint import joint_attentions
from dit_accel.errors import LayoutError
from dit_accel.layout import TokenLayout
from dit_accel.trajectory import Facts

_HISTORY = "history of other scales before the video"
# arguments with history and with its frames' numbers, and how much of it one token is: frames, rows and columns
_SCALES = {
    ("latents_clean", "indices_latents_clean"): (1, 2, 2),
    ("latents_history_2x", "indices_latents_history_2x"): (2, 4, 4),
    ("latents_history_4x", "indices_latents_history_4x"): (4, 8, 8),
}

self_attentions = joint_attentions
OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading the timestep and the lengths of the prompts waits for the device.

    Raises:
        LayoutError: latents without a single patch each way, or no embedding of an image.
    """
    image = arguments.get("image_embeds")
    if image is None:
        raise LayoutError(
            f"{type(transformer).__name__} got no image_embeds; it attends to an image's tokens beside the text's. "
            "Give the embedding of the video's first image, [batch, tokens, numbers], as its pipeline does."
        )
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    video = math.prod(hunyuan_video.read_grid(transformer, latents))
    lengths = arguments["encoder_attention_mask"].sum(1, dtype=torch.int).tolist()  # as the model counts
    valid = tuple(image.shape[1] + length for length in lengths)
    trimmed = len(latents) == 1  # by the model itself
    return Facts(
        timestep=float(arguments["timestep"].max()),
        grid=(1, 1, _count_history(arguments) + video),
        shape=tuple(latents.shape),
        condition=text,
        loose=_HISTORY,
        text=valid[0] if trimmed else image.shape[1] + text.shape[1],
        text_valid=None if trimmed else valid,
    )


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order."""
    return _HISTORY


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """None: no token leaves the model's own order."""
    return []


def _count_history(arguments: dict[str, Any]) -> int:
    """Tokens of history. Coarse scales are padded to whole tokens; at the finest, what is left over is cut off."""
    tokens = 0
    for names, patch in _SCALES.items():
        latents, numbers = (arguments.get(name) for name in names)
        if latents is not None and numbers is not None:
            divide = math.floor if patch[0] == 1 else math.ceil
            tokens += math.prod(divide(size / edge) for size, edge in zip(latents.shape[2:], patch, strict=True))
    return tokens
