"""Stable Diffusion 3 and 3.5: text to image, image to image, inpainting, ControlNet, skip-layer guidance, IP-Adapter.

Every block has a joint attention: the image's tokens first, then the text's, all of which take part (nothing is
masked). SD3.5-medium's first blocks have a second one among image tokens alone, which is sparse as well: it costs
nearly as much as the first. The flat order of the image is row, column of the patched latents. Places are added to the
patch embedding; there is no rotary table.

Guidance is one forward of twice the batch, whose rows a plan keeps apart. Skip-layer guidance adds a forward of the
single batch at some steps; it is a branch of its own, also where it has the same conditioning.

Image tokens are reordered once per forward: where the patch embedding makes them and behind the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dit_accel.adapters import patches, sd3_processors
from dit_accel.adapters.block_modules import BlockModules
from dit_accel.adapters.joint import order_tokens, restore_tokens
from dit_accel.errors import LayoutError, UsageError
from dit_accel.layout import Grid, TokenLayout
from dit_accel.trajectory import Facts

# classes that pass the permutation test of tests/adapters
_REORDERED = ("SD3Transformer2DModel",)
# classes that pass the region tests of tests/region
REGION = ("SD3Transformer2DModel",)
# for caches that leave out parts of a block
MODULES = {"JointTransformerBlock": BlockModules(attentions=("attn", "attn2"), rows=("ff",), with_text=("attn",))}

dispatching = sd3_processors.dispatching
OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def self_attentions(transformer: nn.Module) -> list[tuple[str, int]]:
    """Module path and layer of every attention of the blocks, in order of use: a block's second follows its first."""
    paths = []
    for i, block in enumerate(transformer.transformer_blocks):
        paths += [f"transformer_blocks.{i}.{name}" for name in ("attn", "attn2") if getattr(block, name) is not None]
    return [(path, layer) for layer, path in enumerate(paths)]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading the timestep waits for the device once per forward.

    Raises:
        LayoutError: latents without a single patch each way.
        UsageError: an IP-Adapter whose image got lost, because pipelines did not see the adapter.
    """
    latents, patch = arguments["hidden_states"], transformer.config.patch_size
    grid = (1, *(size // patch for size in latents.shape[2:]))
    if len(grid) != 3 or min(grid) < 1:
        raise LayoutError(
            f"{type(transformer).__name__} got latents of shape {tuple(latents.shape)}; with patches of {patch} "
            "they must be [batch, channels, rows, columns] and hold at least one patch each way."
        )
    _check_image_prompt(transformer, arguments)
    text, skipped = arguments["encoder_hidden_states"], arguments.get("skip_layers")
    return Facts(
        timestep=float(arguments["timestep"].max()),
        grid=grid,
        shape=tuple(latents.shape[1:]),  # the batch doubles for guidance and not for skip-layer guidance, in one run
        condition=text,
        text=text.shape[1],
        variant=f"without blocks {sorted(skipped)}" if skipped else "",
    )


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    if arguments.get("block_controlnet_hidden_states") is not None:
        return "a ControlNet adds its tokens in the model's order"
    return None


def sees_text(path: str) -> bool:
    """Whether the self-attention at this path is a joint one."""
    return not path.endswith("attn2")


def patch_velocity(transformer: nn.Module, velocity: Tensor, grid: Grid) -> Tensor | None:
    """A velocity `[B, C, H, W]` by tokens, `[B, S, P, C]`; None if it is of another size than the tokens' grid."""
    return patches.split(velocity, grid, (transformer.config.patch_size,) * 2)


def spread_tokens(transformer: nn.Module, values: Tensor, grid: Grid) -> Tensor:
    """A value of each token, `[B, S]`, at each of its places in the latents: `[B, 1, H, W]`."""
    return patches.spread(values, grid, (transformer.config.patch_size,) * 2)


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder it."""
    return [(transformer.pos_embed, order_tokens), (transformer.proj_out, restore_tokens)]


def has_image_prompt(transformer: nn.Module) -> bool:
    """Whether an IP-Adapter is loaded. Loading and unloading one replaces the processor of every attention."""
    return getattr(transformer, "image_proj", None) is not None


def _check_image_prompt(transformer: nn.Module, arguments: dict[str, Any]) -> None:
    from dit_accel.processor import SparseProcessor

    # Pipelines look for the adapter's processors before they encode `ip_adapter_image`, and pass over the image if
    # there are none to be seen: until the first forward, where a SparseProcessor was set by hand.
    attn = transformer.transformer_blocks[0].attn
    stock = getattr(getattr(attn, "_dit_accel", None), "stock", None)
    hidden = sd3_processors.takes_image_prompt(stock) and isinstance(attn.processor, SparseProcessor)
    if not hidden or not has_image_prompt(transformer) or stock.scale == 0:
        return
    given = arguments.get("joint_attention_kwargs") or {}
    if not {"ip_adapter_image_embeds", "ip_hidden_states"} & set(given):
        raise UsageError(
            "An IP-Adapter is loaded, but this forward has no image for it: pipelines do not see the adapter behind a "
            "SparseProcessor before its first forward and pass over `ip_adapter_image`. Use "
            "`dit_accel.accelerate(pipe, ...)`, give `ip_adapter_image_embeds="
            "pipe.prepare_ip_adapter_image_embeds(...)` instead, or call `pipe.unload_ip_adapter()` before making the "
            "attention sparse."
        )
