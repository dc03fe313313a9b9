"""One file per model family: what its tokens mean and where they may be reordered.

An adapter module offers
- `self_attentions(transformer)`: the attentions that may be sparse, as (module path, layer), in order of use;
- `read(transformer, arguments)`: the `Facts` of one forward;
- `order_hooks(transformer)`: where tokens are brought into another order and back, or an empty list;
- `order_arguments(arguments, layout)`, only where arguments hold a value for each token: these, in another order;
- `why_raster(transformer, arguments)`: why this forward must keep the model's own order, or None;
- `PARALLEL`, only where proven: names of classes that are sparse under context parallelism (see `parallel`);
- `dispatching(stock)`, only where stock processors do not use diffusers' dispatcher: one that does in its place, or
  None if it knows none for this processor. It calls the same modules in the same order, as a parity test proves.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn

from dit_accel.errors import UnknownModelError

# transformer class -> module that describes it
FAMILIES = {
    "FluxTransformer2DModel": "dit_accel.adapters.flux",
    "HunyuanVideoTransformer3DModel": "dit_accel.adapters.hunyuan_video",
    "WanTransformer3DModel": "dit_accel.adapters.wan",
    "WanAnimateTransformer3DModel": "dit_accel.adapters.wan",
    "WanVACETransformer3DModel": "dit_accel.adapters.wan",
}


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
