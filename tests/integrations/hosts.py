"""Dispatchers that call a vLLM-Omni plugin: the contract as written here, and the real one where there is one.

Set VLLM_OMNI_ROOT to a folder that holds `vllm_omni` with `diffusion/attention/backends/sparse_attn.py`, in an
environment where vllm can be imported.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GROUP = "vllm_omni.sparse_attn"
SCALE = 0.2  # what no head size gives, so that it is seen to be used
ROOT = Path(__file__).parents[2]


def entry_point() -> EntryPoint:
    """Ours, as pyproject.toml has it."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"][GROUP]
    ((name, value),) = table.items()
    return EntryPoint(name, value, GROUP)


class Contract:
    """The published contract: parameters in three tiers, raw geometry, masks refused unless advertised.

    Args:
        options: what the user configured, the static tier.
        causal: whether the model's attention is.
    """

    def __init__(self, options: dict[str, Any], causal: bool = False) -> None:
        self.options, self.causal = options, causal
        self.function = entry_point().load()
        self.understood = {name for name, can in self.function.capabilities.items() if can}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: dict[str, Tensor] | None = None,
        extra: dict[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        tiers = {**self.options, **(state or {}), **(extra or {})}
        params = {name: given for name, given in tiers.items() if given is not None}
        params |= self._counts(params, query.shape[1])
        params |= self.function.geometry_fn(query.shape, params)
        if mask is not None:
            if "supports_attention_mask" not in self.understood:
                raise ValueError("an attn_mask, and the plugin does not advertise 'supports_attention_mask'")
            params["attn_mask"] = mask
        return self.function(query, key, value, params, is_causal=self.causal, softmax_scale=SCALE)

    def _counts(self, params: dict[str, Any], tokens: int) -> dict[str, int]:
        """Numbers of frames and of patches in one, where they make up all tokens."""
        if not {"latent_shape", "patch_size"} <= params.keys():
            return {}
        frames, rows, columns = (params["latent_shape"][0] // params["patch_size"][0]).tolist()
        if frames * rows * columns != tokens:
            return {}
        return {"total_latent_frames": frames, "patches_per_frame": rows * columns}


class VllmOmni:
    """vLLM-Omni's own dispatcher."""

    def __init__(self, options: dict[str, Any], causal: bool = False) -> None:
        from vllm_omni.diffusion.attention.backends import sparse_attn

        known = dict(num_heads=4, head_size=16, softmax_scale=SCALE, causal=causal)
        self.impl = sparse_attn._SparseAttentionImpl(**known, backend_kwargs={"backend": "dit_accel", **options})

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: dict[str, Tensor] | None = None,
        extra: dict[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata, PerForwardState

        told = AttentionMetadata(attn_mask=mask, extra=extra or {}, per_forward=PerForwardState(**(state or {})))
        return self.impl.forward(query, key, value, told)


HOSTS: list[Callable[..., Any]] = [Contract]
if "VLLM_OMNI_ROOT" in os.environ:
    sys.path.append(os.environ["VLLM_OMNI_ROOT"])
    HOSTS.append(VllmOmni)

each_host = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)


def told(step: int, steps: int, latent: tuple[int, int, int], samples: int = 2) -> dict[str, Tensor]:
    """What the framework tells of a forward of a video model with patches of 1 x 2 x 2."""
    return {
        "denoise_step_idx": torch.full((samples,), step),
        "total_denoise_steps": torch.full((samples,), steps),
        "latent_shape": torch.tensor([latent] * samples),
        "patch_size": torch.tensor([(1, 2, 2)] * samples),
    }
