"""FLUX.2: text to image and editing with reference images, dev and Klein.

Every attention is joint: text tokens stand before the image's, in dual blocks and in single ones, whose projections are
fused with the feed-forward's. The flat order of an image is row, column of its packed latents, which columns 1 and 2 of
`img_ids` tell; column 0 is 0 for the image that is made and another number for each reference image behind it.

Reference images of the made image's size (the pipelines' default with one of them) are frames beside it, and reordered
with it. Others fill no common grid: all tokens are then a line in the model's own order, and methods that look at
places run dense, with a reason. So do calls that fill or read Klein's key-value cache, which give the dispatcher keys
of other tokens than its queries, and no seat.

Image tokens are reordered once per forward: where the patch embedding makes them, where the rotary table is made and
behind the output projection. The rotary table of the text comes from the same module; its length tells it apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from torch import Tensor, nn

from dit_accel.adapters import dispatch
from dit_accel.adapters.joint import joint_attentions, order_tokens, read_images, restore_tokens
from dit_accel.errors import LayoutError
from dit_accel.layout import TokenLayout
from dit_accel.trajectory import Facts

TRAIN_TIMESTEPS = 1000  # the pipelines divide the scheduler's timesteps by it
# classes that pass the permutation test of tests/adapters
_REORDERED = ("Flux2Transformer2DModel",)

self_attentions = joint_attentions
OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading the grid from `img_ids` waits for the device once per forward.

    Raises:
        LayoutError: no `img_ids`, or not four columns for each token.
    """
    hidden, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    places, own = _places(transformer, arguments), hidden.shape[1]
    if _fills_cache(arguments):
        # Reference tokens, which stand first here, are gone from the next step on: they are none of the run's latents.
        own -= arguments["num_ref_tokens"]
    grid, loose = read_images(places[-own:])
    return Facts(
        timestep=float(arguments["timestep"].max()) * TRAIN_TIMESTEPS,
        grid=grid,
        shape=(hidden.shape[0], own, *hidden.shape[2:]),
        condition=text,
        loose=loose,
        text=text.shape[1],
        text_first=True,
    )


def why_dense(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why no attention of this forward can be sparse, or None if some can."""
    if _fills_cache(arguments):
        return "reference tokens fill a key-value cache"
    if _reads_cache(arguments):
        return "keys and values of reference tokens come from a cache"
    return None


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    if arguments["encoder_hidden_states"].shape[1] == arguments["hidden_states"].shape[1]:
        return "as many text tokens as image tokens"  # their rotary tables could not be told apart
    return None


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder it."""
    return [
        (transformer.x_embedder, order_tokens),
        (transformer.pos_embed, _order_rotary),
        (transformer.proj_out, restore_tokens),
    ]


def dispatching(stock: Any) -> Any | None:
    """As `dispatch.dispatching`; of one with a key-value cache, a processor that leaves calls with it to `stock`."""
    seated = {Flux2KVAttnProcessor: _SeatedKV, Flux2KVParallelSelfAttnProcessor: _SeatedParallelKV}
    if type(stock) not in seated:
        return dispatch.dispatching(stock)
    made = seated[type(stock)]()
    vars(made).update(vars(stock))
    return made


class _CacheAside:
    """With a cache, such a processor calls the dispatcher without its `_parallel_config`, where the seat is."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        if _fills_cache(named) or _reads_cache(named):
            return self._parallel_config.stock(attn, hidden_states, *args, **named)
        return super().__call__(attn, hidden_states, *args, **named)


class _SeatedKV(_CacheAside, Flux2KVAttnProcessor):
    pass


class _SeatedParallelKV(_CacheAside, Flux2KVParallelSelfAttnProcessor):
    pass


def _fills_cache(arguments: dict[str, Any]) -> bool:
    return arguments.get("kv_cache_mode") == "extract" and arguments.get("num_ref_tokens", 0) > 0


def _reads_cache(arguments: dict[str, Any]) -> bool:
    return arguments.get("kv_cache_mode") == "cached" and arguments.get("kv_cache") is not None


def _places(transformer: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Image, row and column of each image token, `[N, 4]`."""
    tokens, ids = arguments["hidden_states"].shape[1], arguments.get("img_ids")
    if ids is None or ids.shape[-1] != 4 or ids.shape[-2] != tokens:
        raise LayoutError(
            f"{type(transformer).__name__} got img_ids of shape {None if ids is None else tuple(ids.shape)}; they must "
            f"be [{tokens}, 4] or [batch, {tokens}, 4]: image, row, column and layer of each of its image tokens."
        )
    return ids.reshape(-1, tokens, 4)[0]


def _order_rotary(output: tuple[Tensor, ...], layout: TokenLayout) -> tuple[Tensor, ...]:
    if output[0].shape[0] != layout.n_video_tokens:
        return output  # the text's
    return tuple(layout.apply(table, 0) for table in output)  # each [N, D]
