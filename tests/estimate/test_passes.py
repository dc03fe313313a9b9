"""Passes over the tokens, against the real models: bytes that the operations of one more block read and write."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("diffusers")
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.estimate.architectures import PUBLISHED
from dit_accel.estimate.count import count_forward
from dit_accel.estimate.full_size import CASES
from dit_accel.estimate.timing import BYTES

NO_PASS = {
    "_reshape_alias", "_unsafe_view", "addmm", "alias", "as_strided", "bmm", "chunk", "detach", "empty", "empty_like",
    "expand", "mm", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "convolution",
}  # fmt: skip
# A CPU runs torch's RMSNorm as seven operations, 20 passes; a GPU as one, 2 passes.
MORE_ON_A_CPU = 18
# (case, one more block of which kind, its RMSNorms of torch's own over all tokens, config)
KINDS = {
    "wan": ("wan-1.3b-480p", "num_layers", 3, dict(attention_head_dim=128, ffn_dim=1024)),
    "flux double": ("flux-1024", "num_layers", 2, dict(attention_head_dim=128, axes_dims_rope=(16, 56, 56))),
    "flux single": ("flux-1024", "num_single_layers", 2, dict(attention_head_dim=128, axes_dims_rope=(16, 56, 56))),
    "hunyuan double": ("hunyuanvideo-720p", "num_layers", 0, dict(attention_head_dim=128, rope_axes_dim=(16, 56, 56))),
    "hunyuan single": (
        "hunyuanvideo-720p", "num_single_layers", 0, dict(attention_head_dim=128, rope_axes_dim=(16, 56, 56)),
    ),
    "sd3": (
        "sd3.5-large-1024", "num_layers", 0,
        dict(attention_head_dim=64, num_attention_heads=4, caption_projection_dim=256),
    ),
}  # fmt: skip
TEXT = 16


class Moving(TorchDispatchMode):
    """Bytes that operations read and write, but for views, products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if name not in NO_PASS and "scaled_dot_product" not in name:
            # what is expanded is read where it lies
            self.bytes += sum(
                min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())
                for leaf in tree_leaves((args, kwargs, out))
                if isinstance(leaf, torch.Tensor)
            )
        return out


@pytest.mark.parametrize("name", KINDS)
def test_passes_are_those_of_one_more_block(building: ModuleType, name: str) -> None:
    base, kind, norms, config = KINDS[name]
    case = replace(CASES[base].made_tiny(), text=TEXT)
    grid = (1, 32, 32) if case.temporal == 1 else (4, 16, 16)

    def moved(depth: int) -> tuple[int, int]:
        """Bytes as the model moves them, and as they are counted."""
        deep: Any = replace(case, config={**case.config, **config, kind: depth})
        device, dtype = torch.device("cpu"), torch.bfloat16
        model = building.build_transformer(deep, device, dtype, whole=True)
        given = building.at_noise(deep, building.make_inputs(deep, grid, device, dtype), 0.5)
        with torch.no_grad(), Moving() as moving:
            model(**given)
        work = count_forward(replace(PUBLISHED[deep.model], config=deep.config, text=TEXT), grid, batch=deep.batch)
        tokens = work.batch * work.joint * work.heads * work.head_dim
        return moving.bytes, BYTES * (work.pass_tokens + MORE_ON_A_CPU * norms * depth * tokens)

    (less, counted_less), (more, counted_more) = moved(2), moved(3)
    error = (counted_more - counted_less) / (more - less) - 1
    print(f"{name}: {error:+.1%}")
    assert abs(error) < 0.03
