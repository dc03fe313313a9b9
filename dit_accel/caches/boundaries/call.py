"""Boundary "call": all of the transformer, from its latents to its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.caches.boundaries.boundary import Boundary, Hooked
from dit_accel.caches.cache import Parts, View

if TYPE_CHECKING:
    from dit_accel.caches.decider import Verdict
    from dit_accel.trajectory import Call


class CallBoundary(Boundary):
    """A step that is made up runs nothing of the transformer."""

    keeps_tokens = False

    def clear(self) -> None:
        pass  # nothing of it is held here

    def hooks(self, transformer: nn.Module) -> list[Hooked]:
        return []

    def run(self, call: Call, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        engine = self.engine
        verdict, view = self._decide(call)
        rows_apart = getattr(engine.adapter, "ROWS_APART", False)
        if verdict.reuse:
            made = self._made_up(view, verdict)
            engine.commit(verdict, view, None)
            sample = list(made.unbind()) if rows_apart else made
            return (sample,) if not engine.given.get("return_dict", True) else _as_output(sample)
        output = original(*args, **kwargs)
        sample = output[0]
        if rows_apart and verdict.entry is not None:
            sample = torch.stack(sample)
        engine.settle(verdict, view, (sample.detach().clone(), None) if verdict.entry is not None else None)
        return output

    @torch.compiler.disable
    def _decide(self, call: Call) -> tuple[Verdict, View]:
        engine = self.engine
        view = View(call, _latents(engine.transformer, engine.given["hidden_states"]))
        verdict = engine.decide(view)
        if engine.sparse is not None and engine.sparse.installed:
            engine.sparse.skip() if verdict.reuse else engine.sparse.begin()
        return verdict, view

    @torch.compiler.disable
    def _made_up(self, view: View, verdict: Verdict) -> Tensor:
        return self.engine.cache.fill(view, verdict.memory)[0].to(view.x.dtype)

    def compare(self, view: View, parts: Parts, verdict: Verdict) -> tuple[Tensor, Tensor]:
        return self.engine.cache.fill(view, verdict.memory)[0], parts[0]


def _latents(transformer: nn.Module, hidden: Tensor) -> Tensor:
    """What of a transformer's input is in its output's shape: without channels of a picture or mask that condition it.

    The copy is the cache's own.
    """
    config, hidden = transformer.config, hidden.detach()
    if hidden.dim() > 3:
        channels = getattr(config, "out_channels", None) or config.in_channels
        return hidden[:, :channels].clone()
    # packed tokens: their channels are those of patches, and configurations differ in what `out_channels` counts
    return hidden[..., : transformer.proj_out.out_features].clone()


def _as_output(sample: Tensor | list[Tensor]) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)
