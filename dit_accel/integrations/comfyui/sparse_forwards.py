"""The engine's forwards in ComfyUI: which self-attention a call is, and its tokens in the layout's order.

ComfyUI's models are shared by all who cloned them, so that nothing is hooked to their modules: each sparse call brings
its own tokens into the order, and back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.attending import Laid
from dit_accel.forwards import Forwards, Reason
from dit_accel.integrations.comfyui.attention import AttentionCall, Override
from dit_accel.integrations.comfyui.families import Slots
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.report import Tally
from dit_accel.trajectory import Call, Facts, Trajectory

if TYPE_CHECKING:
    from dit_accel.integrations.comfyui.region_forwards import SampledRegion

_GRADIENTS = "gradients are needed, and the sparse kernels have no backward"
_PASSED_BY = "its attention did not come to us: another override took its place within the model"
_UNTOLD = "ComfyUI does not say which block attends, and text and video are equally long"
_MORE = "a block attends more often than is known of it"


class SparseForwards(Forwards):
    """The forwards of one sampling.

    Args:
        slots: the model's self-attentions.

    Raises:
        UsageError: as of `Forwards`.
    """

    def __init__(
        self,
        options: SparseOptions,
        method: Method | None,
        trajectory: Trajectory,
        tally: Tally,
        role: str,
        slots: Slots,
    ) -> None:
        super().__init__(options, method, trajectory, tally, role, sum(map(len, slots.values())))
        self._make_attending(None)
        self._slots, self._inside = slots, False
        self.region: SampledRegion | None = None  # region sampling beside it
        self._seen: Counter[Any] = Counter()  # self-attentions of this forward, by block

    def enter(self, call: Call, facts: Facts, latents: Tensor, prompt: int, whole: bool = True) -> None:
        """Decide what holds for all of a forward.

        Args:
            latents: `[B, ...]`.
            prompt: tokens of its text, whether or not they take part in self-attention.
            whole: whether all tokens are computed; where region sampling leaves some out, they lie as in the forward
                before.
        """
        self.call, self._facts, self._prompt = call, facts, prompt
        self._seen.clear()
        self._dense_reason = self._why_asked_dense(latents.device) or self._why_no_grid(facts)
        if not whole:
            return
        if self._dense_reason is None:
            order = self._lay_out(facts, len(latents), latents.device, facts.loose)
            self.tally.token_orders[order] += 1
        elif self._dense_reason[1] and self.region is not None and self.region.region.unit == "block":
            self._lay_out(facts, len(latents), latents.device, facts.loose)  # what is kept may be used in a sparse one

    def leave(self) -> None:
        """Note that the forward returned."""
        if not self._seen:
            self.count_dense(_PASSED_BY, False, self.n_layers)
        self.call = self.order = None

    def override(self, before: Override | None) -> Override:
        """What ComfyUI shall call in place of its attention, for one forward.

        Args:
            before: the override that is there, to which everything goes that is not sparse.
        """

        def attend(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return self._attend_once(
                AttentionCall(function, before, args, kwargs), kwargs.get("transformer_options")
            )

        return attend

    @torch.compiler.disable  # a compiled graph would apply what is counted and chosen here behind the forward
    def _attend_once(self, place: AttentionCall, options: dict[str, Any] | None) -> Tensor:
        if self._inside:  # an override that stood before us leads back here
            return place.without_override()
        self._inside = True
        try:
            return self._attend(place, options or {})
        finally:
            self._inside = False

    def _attend(self, place: AttentionCall, options: dict[str, Any]) -> Tensor:
        query, key, value = place.tensors()
        others = place.others
        if not self._is_self_attention(query, key):
            self.tally.cross += 1
            return place.as_called()
        layer, reason = self._layer(options, key.shape[1])
        if layer is None and reason is None:
            self.tally.cross += 1
            return place.as_called()
        if layer is not None:
            place.layer = layer
            out = None if self.region is None else self.region.attend(place, query, key, value, others)
            if out is not None:
                return place.give(out)
            reason = self._why_dense(place, query, key, others)
            if self.region is not None and self.region.keeps(layer):
                self.region.store(layer, *(self._in_order(x, forth=True) for x in (key, value)))
        if reason is not None:
            self.count_dense(*reason, 1)
            plain = reason[1] and others["attn_mask"] is None and not others["enable_gqa"]
            if plain and self.options.dense == "fastest":
                return place.give(self.attending.attend_densely(place, query, key, value, True, others))
            self.tally.dense_kernels[place.title] += 1
            return place.as_called()
        laid = Laid(self.layout, self.groups, self.observer)
        ordered = [self._in_order(x, forth=True) for x in (query, key, value)]
        out = self.attending.attend_sparsely(*ordered, others, self.call.at(layer), laid, place)
        return place.give(self._in_order(out, forth=False))

    def _is_self_attention(self, query: Tensor, key: Tensor) -> bool:
        """Whether a call's keys are its queries' own, and no text alone: HunyuanVideo refines that first."""
        facts, tokens = self._facts, query.shape[1]
        refines = facts.text and not facts.text_first and tokens in (facts.text, self._prompt)
        return tokens == key.shape[1] and not refines

    def _layer(self, options: dict[str, Any], keys: int) -> tuple[int | None, Reason | None]:
        """The number of a self-attention, or why it is dense; neither: it is none."""
        block = options.get("block_type"), options.get("block_index")
        ambiguous = self._facts.text == 0 and keys == self._prompt
        if block[1] is None:  # SD3, and old cores: self-attentions come in the order of their layers
            if ambiguous:
                self._seen[None] += 1
                return None, (_UNTOLD, False)
            block, layers = None, range(self.n_layers)
        else:
            layers = self._slots.get(block, ())
        nth = self._seen[block]
        self._seen[block] += 1
        if nth < len(layers):
            return layers[nth], None
        return (None, None) if ambiguous else (None, (_MORE, False))

    def _why_dense(
        self, place: AttentionCall, query: Tensor, key: Tensor, others: dict[str, Any]
    ) -> Reason | None:
        reason = self._why_call_dense(place, query, key, others)
        if reason is None and torch.is_grad_enabled() and query.requires_grad:
            return _GRADIENTS, False
        return reason

    def _is_padding(self, mask: Tensor, query: Tensor) -> bool:
        # the core makes it of the text's mask, as large negative numbers behind zeros
        rows, tokens = query.shape[:2]
        return bool(self.groups) and mask.shape[-1] == tokens and mask.numel() in (tokens, rows * tokens)

    def _in_order(self, x: Tensor, *, forth: bool) -> Tensor:
        """Bring `[B, S, H, D]` into the layout's order, or back; text keeps its place."""
        if self.order is None:
            return x
        bring = self.order.apply if forth else self.order.undo
        video = self.order.n_video_tokens
        text = x.shape[1] - video
        if not text:
            return bring(x, 1)
        if self._facts.text_first:
            return torch.cat([x[:, :text], bring(x[:, text:], 1)], dim=1)
        return torch.cat([bring(x[:, :video], 1), x[:, video:]], dim=1)
