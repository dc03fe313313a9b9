"""Forwards: a transformer's forwards, sparse or dense. It decides what holds for each, and knows no host.

What it decides with: `layouts` (how tokens are ordered and cut), `planner` (which blocks are read), `attending` (one
attention computed). A host's own class puts it in place: `Engine` for diffusers, `integrations/comfyui` for ComfyUI.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dit_accel.arrangement import arrange
from dit_accel.attending import Attending, Observer
from dit_accel.errors import UsageError
from dit_accel.guards import Guards
from dit_accel.layout import TokenLayout
from dit_accel.layouts import Layouts
from dit_accel.methods import Method, Weights, load_method
from dit_accel.options import SparseOptions
from dit_accel.planner import Planner
from dit_accel.report import Tally
from dit_accel.rows import RowGroup, group_rows
from dit_accel.trajectory import Call, Facts, Trajectory

Reason = tuple[str, bool]  # why something is dense, and whether that was planned


class Place(Protocol):
    """One self-attention of the host: which it is, and how the host itself would attend there."""

    layer: int
    title: str  # what attends there densely, for the report
    splits: bool  # whether the host shares out the sequence over processes there

    def dense(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor: ...

    def dense_whole(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor: ...


class Forwards:
    """The forwards of one transformer.

    Args:
        options: what was asked for.
        method: predicts the plans; None: attention is dense.
        trajectory: the clock; shared by the experts of one pipeline.
        tally: what ran; shared likewise.
        role: which transformer of the pipeline this is.
        n_layers: self-attentions there are.

    Raises:
        UsageError: a layer that does not exist, or a share of steps where nobody knows how many there are.
    """

    def __init__(
        self,
        options: SparseOptions,
        method: Method | None,
        trajectory: Trajectory,
        tally: Tally,
        role: str,
        n_layers: int,
    ) -> None:
        self.options, self.method, self.role, self.n_layers = options, method, role, n_layers
        self.trajectory, self.tally = trajectory, tally
        self.dense_layers = resolve_layers("dense_layers", options.dense_layers, n_layers)
        if options.dense_first and trajectory.n_steps() is None:
            raise UsageError(
                f"dense_first={options.dense_first:g} is a share of a run's steps, and only a pipeline's scheduler "
                "knows how many there are. Give `accelerate` the pipeline, or use dense_above, a noise level."
            )
        self.planner = Planner(options, method, trajectory, tally, n_layers)
        self.layouts = Layouts(arrange(method, options))
        self.why_dense_now: str | None = None  # set while all forwards shall be dense, to say why
        self.observer: Observer | None = None
        # of the forward under way
        self.call: Call | None = None
        self.layout: TokenLayout | None = None  # of its tokens
        self.order: TokenLayout | None = (
            None  # what brings them into another order, where that is done once for all
        )
        self.text = 0  # text tokens of this forward, padding included
        self.groups: tuple[RowGroup, ...] = ()  # its batch rows by their padding; none: calls have no mask
        # why all of this forward is dense, and whether that was planned
        self._dense_reason: Reason | None = None

    def _make_attending(self, weights: Weights | None) -> None:
        self.weights = weights
        guards = Guards(self.options, self.planner, self.trajectory)
        self.attending = Attending(self.options, self.planner, self.layouts, self.tally, guards, weights)

    @property
    def keep_requested(self) -> float | None:
        """The share of key blocks asked for; None where a method has no such option."""
        return getattr(self.method, "keep", None)

    def bytes_held(self) -> int:
        """Memory kept between forwards."""
        parts = (self.planner, self.layouts, self.weights)
        return sum(part.bytes_held() for part in parts if part is not None)

    def clear(self) -> None:
        """Forget all forwards."""
        self.planner.clear()
        self.layouts.clear()
        self.attending.clear()
        self.call = self.layout = self.order = None

    # -- one forward

    def _why_asked_dense(self, device: torch.device) -> Reason | None:
        """Why the options make all of this forward dense, on this device."""
        call, options = self.call, self.options
        assert call is not None
        if self.method is None:
            return "sparse attention is off", True
        if self.why_dense_now is not None:
            return self.why_dense_now, True
        if call.noise > options.dense_above:
            return f"noise level above {options.dense_above:g}", True
        if call.noise < options.dense_below:
            return f"noise level below {options.dense_below:g}", True
        if options.dense_first and call.step < options.n_dense_first(self.trajectory.n_steps() or 0):
            return f"one of the first {options.dense_first:.3g} of the steps", True
        tokens, least = call.segments[-1][2], options.least_tokens(device.type)
        if tokens < least:
            return f"fewer than {least} tokens, where dense is faster", True
        return None

    def _why_no_grid(self, facts: Facts) -> Reason | None:
        """Why the method cannot be used on these tokens."""
        if facts.loose and getattr(self.method, "needs_grid", False):
            return f"the method looks at places, and the tokens are no one grid ({facts.loose})", False
        return None

    def _lay_out(self, facts: Facts, batch: int, device: torch.device, why_raster: str | None) -> str:
        """Choose the order of this forward's tokens, lay them out in it, and say which and why.

        Args:
            batch: rows there are.
            why_raster: why the model's own order must stay, or None.
        """
        order = self.layouts.arrangement.order
        order = "raster" if why_raster else order
        text = facts.text if facts.text_valid is None else facts.text_valid[0]
        # plans shared by branches must not depend on how rows are grouped in either
        self.text, self.groups = facts.text, group_rows(facts, batch, apart=self.options.share_plans)
        kind = facts.text_first, facts.first_frame_apart
        self.layout = self.layouts.find(facts.grid, order, device, text, *kind, len(self.groups))
        self.order = None if order == "raster" else self.layout
        return f"raster: {why_raster}" if why_raster else order

    # -- one attention

    def why_dense_at(self, layer: int) -> Reason | None:
        """Why the options make a layer of this forward dense."""
        if self._dense_reason is not None:
            return self._dense_reason
        if layer in self.dense_layers:
            return "dense layer", True
        if self.planner.is_dense(self.call.at(layer)):
            return "a rule", True
        return None

    def _why_call_dense(
        self, place: Place, query: Tensor, key: Tensor, call: dict[str, Any]
    ) -> Reason | None:
        """Why one self-attention is dense: query and key `[B, S, H, D]`, and the host's other arguments."""
        reason = self.why_dense_at(place.layer)
        if reason is not None:
            return reason
        if call["attn_mask"] is not None and not self._is_padding(call["attn_mask"], query):
            return "an attention mask", False
        if call["is_causal"] or call["dropout_p"]:
            return "causal attention or dropout", False
        if query.shape != key.shape:
            return "queries and keys of different shape", False
        video = self.layout.n_video_tokens
        whole = (video + self.text,) if self.groups else (video + self.text, video)
        expected = [self._tokens_here(tokens, place) for tokens in whole]
        if query.shape[1] not in expected:
            return f"{query.shape[1]} tokens where the grid has {expected[0]}", False
        return None

    def why_dense_part(self, place: Place, call: dict[str, Any]) -> Reason | None:
        """Why an attention of some query blocks runs dense, and whether that was planned; or None."""
        reason = self.why_dense_at(place.layer)
        if reason is not None:
            return reason
        if call["attn_mask"] is not None or call["is_causal"] or call["dropout_p"]:
            return "an attention mask, causal attention or dropout", False
        return None

    def _tokens_here(self, tokens: int, place: Place) -> int:
        """How many of so many tokens this process holds."""
        return tokens

    def _is_padding(self, mask: Tensor, query: Tensor) -> bool:
        """Whether a call's mask is the one that keeps out the padding the adapter told of. Its numbers are not read."""
        shape = (query.shape[0], 1, 1, query.shape[1])
        return bool(self.groups) and mask.dtype == torch.bool and mask.shape == shape

    def is_linear(self, layer: int) -> bool:
        """Whether a self-attention is linear attention alone, as trained weights may have it."""
        return self.weights is not None and layer in self.weights.linear_layers

    def count_dense(self, reason: str, planned: bool, calls: int) -> None:
        """As `Attending.count_dense`."""
        self.attending.count_dense(reason, planned, calls)


def resolve_layers(name: str, layers: tuple[int, ...], n_layers: int) -> frozenset[int]:
    """The numbers of layers, those that count from the last included.

    Args:
        name: what the option is called.

    Raises:
        UsageError: a layer that there is not.
    """
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise UsageError(
                f"{name} names layer {layer}, but this transformer has {n_layers}: give 0 to "
                f"{n_layers - 1}, or -1 to {-n_layers} to count from the last."
            )
    return frozenset(layer % n_layers for layer in layers)


def method_of(options: SparseOptions) -> Method:
    """The method that some options name."""
    return load_method(options.method, keep=options.keep, top_p=options.top_p, **options.method_options)
