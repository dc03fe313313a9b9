"""MiniMax-H3: video with its sound, from text, from key frames, and from references.

All self-attention runs over one packed sequence, whose rows the pipeline describes: text, then conditions (key frames
or references with their sound), then the sound that is made, and last the video, by frame, row, column. Everything
before the video counts as text: it reads all and is read by all. A sequence in which the video does not stand last
runs dense, with a reason. The token refiner's attentions are among text alone and stay stock.

Video tokens are reordered once per forward: where the patch embedding makes them, where the rotary table is made and
behind the output projection. Modulation is looked up by row; where it is not the same for the whole video, the model
keeps its own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import LayoutError
from dit_accel.layout import Grid, TokenLayout
from dit_accel.trajectory import Facts

TRAIN_TIMESTEPS = 1000  # times are shares; the clock takes noise levels as shares of so many steps
# classes that pass the permutation test of tests/adapters
_REORDERED = ("MiniMaxH3Transformer3DModel",)

OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def self_attentions(transformer: nn.Module) -> list[tuple[str, int]]:
    """Module path and layer of the attention of every block."""
    return [(f"transformer_blocks.{i}.attn", i) for i in range(len(transformer.transformer_blocks))]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. The model's time runs from 0, noise, to 1; each row has its own, the video's counts.

    Finding the video among the rows waits for the device.

    Raises:
        LayoutError: rows that are described neither by three coordinates nor by an index.
    """
    video, hidden = _find_video(transformer, arguments), arguments["hidden_states"]
    return Facts(
        timestep=(1.0 - video.time) * TRAIN_TIMESTEPS,
        grid=video.grid or (1, 1, hidden.shape[1]),
        shape=tuple(hidden.shape),
        condition=arguments["encoder_hidden_states"],
        text=video.first,
        text_first=True,
    )


def why_apart(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why a step cache can keep nothing of a forward: one that was made up would leave out the sound."""
    return "the model gives sound beside the video"


def why_dense(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why no attention of this forward can be sparse, or None if some can."""
    if _find_video(transformer, arguments).grid is None:
        return "the packed sequence does not end with whole frames of video"
    return None


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    if not _find_video(transformer, arguments).alike:
        return "the video's rows are modulated one by one"
    return None


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder it."""
    return [
        (transformer.proj_in, _order_rows),
        (transformer.rope, _order_rotary),
        (transformer.proj_out, _restore_rows),
    ]


@dataclass(frozen=True)
class _Video:
    """The run of video rows at the end of a packed sequence."""

    first: int  # its first row, which is the number of rows before it
    grid: Grid | None  # None: the sequence does not end with it, or it is not whole frames
    time: float
    alike: bool  # whether all its rows have one time and one kind


def _find_video(transformer: nn.Module, arguments: dict[str, Any]) -> _Video:
    place, index = arguments.get("position_ids"), arguments.get("video_indices")
    tokens = arguments["hidden_states"].shape[1]
    if place is None or place.ndim != 2 or place.shape[1] != 3 or index is None or index.shape != (tokens,):
        given = [None if x is None else tuple(x.shape) for x in (place, index)]
        raise LayoutError(
            f"{type(transformer).__name__} got position_ids of shape {given[0]} and video_indices of shape {given[1]}; "
            f"they must be [rows of the packed sequence, 3] and [{tokens}], a row for each of its video tokens."
        )
    # Conditions are video rows too; where they end the index jumps.
    numbers = torch.arange(len(index), device=index.device)
    jumps = torch.cat([index[:1] >= 0, index.diff() != 1])
    first = index[(numbers * jumps).max()]
    inside = torch.arange(len(place), device=place.device) >= first
    frame = inside & (place[:, 0] == place[first, 0])
    row = frame & (place[:, 1] == place[first, 1])
    kind = torch.stack([arguments["timestep_indices"], arguments["token_tags"]])
    alike = ((kind == kind[:, -1:]).all(0) | ~inside).all()
    found = torch.stack([first, index[-1], frame.sum(), row.sum(), alike]).tolist()
    time = float(arguments["timestep"][arguments["timestep_indices"][-1]])
    first, last, per_frame, columns, alike = found
    rows = len(place) - first
    whole = last == len(place) - 1 and rows % per_frame == 0 and per_frame % columns == 0
    grid = (rows // per_frame, per_frame // columns, columns) if whole else None
    return _Video(first, grid, time, bool(alike))


def _order_rows(output: Tensor, layout: TokenLayout) -> Tensor:
    return _with_last(output, 1, layout, layout.apply)  # [B, conditions + N, C]


def _order_rotary(output: tuple[Tensor, ...], layout: TokenLayout) -> tuple[Tensor, ...]:
    return tuple(_with_last(table, 0, layout, layout.apply) for table in output)  # each [S, D]


def _restore_rows(output: Tensor, layout: TokenLayout) -> Tensor:
    return _with_last(output, 1, layout, layout.undo)  # [B, S, patch]; the model picks the video's rows next


def _with_last(x: Tensor, dim: int, layout: TokenLayout, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The video's tokens, which stand last along `dim`, in another order; all before them as it was."""
    ahead = x.shape[dim] - layout.n_video_tokens
    video = change(x.narrow(dim, ahead, layout.n_video_tokens), dim)
    return torch.cat([x.narrow(dim, 0, ahead), video], dim) if ahead else video
