"""Attention as models call it."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def _gives_way(function: Any) -> Any:
    @functools.wraps(function)
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if override is None or "_inside_attn_wrapper" in kwargs:
            return function(*args, **kwargs)
        return override(function, *args, **kwargs, _inside_attn_wrapper=True)

    return attend


@_gives_way
def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: Any = None,
    skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
) -> Tensor:  # fmt: skip
    if not skip_reshape:
        q, k, v = (x.reshape(len(x), x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None])
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
