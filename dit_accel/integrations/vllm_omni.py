"""vLLM-Omni: `attn_fn`, which its SPARSE_ATTN dispatcher finds under the entry point group `vllm_omni.sparse_attn`.

The contract is that of vllm-project/vllm-omni's pull request 4493: one callable

    attn_fn(query, key, value, params, is_causal, softmax_scale) -> Tensor

for query, key and value `[B, S, H, D]`, self-attention only. `params` is flat: what the user configured, the step, the
raw geometry (`latent_shape`, `patch_size`), and whatever a model adds, which a plugin does not know must not disturb
it. `capabilities` says that no masks are understood, so that the dispatcher refuses them; `geometry_fn` turns the raw
geometry into the grid of tokens. vLLM-Omni itself is not imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.integrations.bare import SparseAttention
from dit_accel.methods import method_options
from dit_accel.options import SparseOptions
from dit_accel.report import Report

logger = logging.getLogger("dit_accel")

GRID = "dit_accel_grid"
# What the dispatcher puts among the parameters, and what its models are known to add.
_HOST = {
    *("denoise_step_idx", "total_denoise_steps", "latent_shape", "patch_size"),
    *("total_latent_frames", "patches_per_frame", "kv_cache_dtype", "attention_mask_mode", "valid_kv_length"),
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", GRID),
}
_MASKS = ("attn_mask", "full_attn_spans")


class AttentionFunction:
    """The plugin. One serves a whole process: the dispatcher gives every layer the same."""

    capabilities: ClassVar[dict[str, bool]] = {"supports_attention_mask": False, "supports_full_attn_spans": False}

    def __init__(self) -> None:
        self._by_options: dict[str, SparseAttention] = {}
        self._unknown: set[str] = set()

    # Lists and counts in it change from call to call; a compiled model goes around it.
    @torch.compiler.disable(recursive=True)
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: Mapping[str, Any],
        is_causal: bool,
        softmax_scale: float,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[B, S, H, D]`, as are key, value and the result.
            params: options of `SparseOptions` and of the method, and what vLLM-Omni adds.
            is_causal: such calls run dense, and count as a fall-back.
            softmax_scale: of the logits.

        Raises:
            UsageError: an option that cannot be, or a mask.
            FallbackError: under `strict`, if the call would run dense unplanned.
        """
        for name in _MASKS:
            if params.get(name) is not None:
                raise UsageError(f"{name} is not possible here: this plugin advertises no masks. Run this model dense.")
        step, steps = (_first(params.get(name)) for name in ("denoise_step_idx", "total_denoise_steps"))
        known = dict(grid=params.get(GRID), step=step, steps=steps, scale=softmax_scale, is_causal=is_causal)
        return self._sparse(params)(query, key, value, **known)

    def geometry_fn(self, query_shape: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any]:
        """The grid of tokens, as a parameter for `__call__`.

        Args:
            query_shape: `[B, S, H, D]`.
            params: with `latent_shape` and `patch_size`, `[samples, 3]` each: frames, rows, columns.

        Returns:
            `{"dit_accel_grid": (frames, rows, columns)}`; nothing where either is not told, or where their tokens are
            not all that there are (padding, or text among them).
        """
        latent, patch = (_triple(params.get(name)) for name in ("latent_shape", "patch_size"))
        if latent is None or patch is None or min(patch) < 1:
            return {}
        grid = tuple(length // edge for length, edge in zip(latent, patch, strict=True))
        return {GRID: grid} if grid[0] * grid[1] * grid[2] == query_shape[1] else {}

    def reports(self) -> list[Report]:
        """What ran, for each set of options in the order in which they came."""
        return [sparse.report() for sparse in self._by_options.values()]

    def _sparse(self, params: Mapping[str, Any]) -> SparseAttention:
        method = params.get("method", SparseOptions.method)
        allowed = {f.name for f in dataclasses.fields(SparseOptions)} | method_options(method)
        options = {name: value for name, value in params.items() if name in allowed}
        self._remark(set(params) - allowed - _HOST, allowed)
        key = repr(sorted(options.items()))  # lists and tables among them cannot be keys
        if key not in self._by_options:
            try:
                self._by_options[key] = SparseAttention(**options)
            except UsageError as error:
                raise UsageError(
                    f"{error} In vLLM-Omni options are --diffusion-attention-config.per_role.self.extra.NAME VALUE."
                ) from error
        return self._by_options[key]

    def _remark(self, unknown: set[str], allowed: set[str]) -> None:
        """Say once of each parameter that is no option: the contract lets models add what they like."""
        for name in sorted(unknown - self._unknown):
            near = difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            logger.warning(f"vLLM-Omni's parameter {name!r} is no option of dit_accel and changes nothing.{hint}")
        self._unknown |= unknown


def _first(value: Any) -> int | None:
    """The smallest of the samples' numbers: a batch is as far as the one that is least far."""
    if isinstance(value, Tensor):
        return int(value.min())
    return None if value is None else int(value)


def _triple(value: Any) -> tuple[int, int, int] | None:
    """Three numbers of the first sample; all in one batch have the same."""
    if value is None:
        return None
    rows = value.tolist() if isinstance(value, Tensor) else list(value)
    row = rows[0] if isinstance(rows[0], list | tuple) else rows
    return tuple(map(int, row))


attn_fn = AttentionFunction()
