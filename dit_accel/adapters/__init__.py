"""One file per model family: what its tokens mean and where they may be reordered.

An adapter module offers
- `self_attentions(transformer)`: the attentions that may be sparse, as (module path, layer), in order of use;
- `read(transformer, arguments)`: the `Facts` of one forward;
- `order_hooks(transformer)`: where tokens are brought into another order and back, or an empty list;
- `order_arguments(arguments, layout)`, only where arguments hold a value for each token: these, in another order;
- `why_raster(transformer, arguments)`: why this forward must keep the model's own order, or None;
- `why_dense(transformer, arguments)`, only where some forwards must run dense as a whole, whether or not their calls
  reach the dispatcher: why this one must, or None; all its self-attentions are counted when it begins;
- `REGION`, only where proven: names of classes that may compute a part of their tokens (see `dit_accel.region`), whose
  tokens leave through `proj_out`; and with it `patch_velocity(transformer, velocity, grid)`, a scheduler's velocity by
  tokens `[B, S, P, C]` or None if it does not fit the grid, and `spread_tokens(transformer, values, grid)`, values
  `[B, S]` of tokens at their places in it. Beside these, where needed, `why_whole(transformer, arguments)`: why this
  forward must compute every token, or None; and `sees_text(path)`: whether a self-attention is a joint one;
- `PARALLEL`, only where proven: names of classes that are sparse under context parallelism (see `parallel`);
- `plain(arguments)`, only where a forward's arguments have names or forms of their own: these and, besides,
  `hidden_states`, one tensor, and `timestep`, as the others have them;
- `ROWS_APART = True`, only where the output is a list of batch rows instead of one tensor;
- `why_apart(transformer, arguments)`, only where a step cache can keep nothing of some forwards: why of this one, or
  None;
- `MODULES`, only where the token cache serves: what blocks are made of (`block_modules`), by their class names;
- `has_image_prompt(transformer)`, only where IP-Adapters replace every processor when they come and go: whether one is
  loaded;
- `dispatching(stock)`, only where stock processors do not use diffusers' dispatcher: one that does in its place, or
  None if it knows none for this processor. It calls the same modules in the same order, as a parity test proves.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import nn

from dit_accel.errors import UnknownModelError

# transformer class -> module that describes it
FAMILIES = {
    "Flux2Transformer2DModel": "dit_accel.adapters.flux2",
    "FluxTransformer2DModel": "dit_accel.adapters.flux",
    "HunyuanVideo15Transformer3DModel": "dit_accel.adapters.hunyuan_video15",
    "HunyuanVideoFramepackTransformer3DModel": "dit_accel.adapters.framepack",
    "HunyuanVideoTransformer3DModel": "dit_accel.adapters.hunyuan_video",
    "SD3Transformer2DModel": "dit_accel.adapters.sd3",
    "LTXVideoTransformer3DModel": "dit_accel.adapters.ltx",
    "MiniMaxH3Transformer3DModel": "dit_accel.adapters.minimax_h3",
    "QwenImageTransformer2DModel": "dit_accel.adapters.qwen_image",
    "WanTransformer3DModel": "dit_accel.adapters.wan",
    "WanAnimateTransformer3DModel": "dit_accel.adapters.wan",
    "WanVACETransformer3DModel": "dit_accel.adapters.wan",
    "ZImageTransformer2DModel": "dit_accel.adapters.z_image",
}


def region_classes() -> list[str]:
    """Names of the transformers that may compute a part of their tokens."""
    adapters = {importlib.import_module(name) for name in FAMILIES.values()}
    return sorted(name for adapter in adapters for name in getattr(adapter, "REGION", ()))


def find_adapter(transformer: nn.Module) -> ModuleType:
    """The adapter of a transformer's family, by the names of its class and its bases.

    Raises:
        UnknownModelError: no adapter describes any of them.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in FAMILIES:
            return importlib.import_module(FAMILIES[cls.__name__])
    raise UnknownModelError(
        f"{type(transformer).__name__} is of no family that dit_accel knows. Known: "
        f"{', '.join(sorted(FAMILIES))}. "
        "Leave the model as it is, or describe it in a new file in dit_accel/adapters."
    )


def arguments_of(
    adapter: ModuleType, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """A forward's arguments by name, as its adapter reads them; None if it lacks latents or a time.

    Args:
        names: of the forward's arguments, by place.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if hasattr(adapter, "plain"):
        given = adapter.plain(given)
    return given if "hidden_states" in given and "timestep" in given else None
