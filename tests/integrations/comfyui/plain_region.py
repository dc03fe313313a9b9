"""Region sampling said plainly, for the tests to hold ours against.

The model computes every token at every step. Where some are left out, an attention reads their keys and values as they
were when they were computed last, and they have the velocity of that time: so nothing of what is computed for them now
reaches anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from dit_accel.integrations.comfyui.patch import KEY
from dit_accel.integrations.comfyui.region_forwards import SampledRegion


def watch(model: Any) -> tuple[Any, list[tuple[tuple[int, ...], Tensor | None]]]:
    """A clone of a model with region sampling, and a list of its forwards to come: whose prompts they are for, and
    which tokens they compute, `[B, K]`, or None for all."""
    model, seen = model.clone(), []

    def look(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        now = region_of(options)._forward
        seen.append((tuple(options["cond_or_uncond"]), None if now.index is None else now.index.clone()))
        return executor(x, t, concat, text, control, options, **given)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", look)
    return model, seen


def region_of(options: dict[str, Any]) -> SampledRegion:
    """What samples in a model's forward."""
    return options[KEY]._region


def predicted(model: Any) -> tuple[Any, list[tuple[Tensor, float]]]:
    """A clone of a model, and a list of its guided velocities to come, with their noise levels."""
    model, seen = model.clone(), []

    def look(executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = executor(x, sigma, *args, **kwargs)
        level = float(sigma.max())
        seen.append(((x - out) / level, level))
        return out

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "look", look)
    return model, seen


@dataclass
class Plain:
    """Makes a model do what it was seen to do.

    Args:
        seen: of `watch`.
        grid: frames, rows and columns of tokens.
        kept_layers: whose keys and values are kept; None: all. In the others tokens that are left out are not read.
        text_first: whether text stands before the others in joint attention.
        text: tokens of a prompt.
        patch: latents that a token has in a row of them, and in a column.
    """

    seen: list[tuple[tuple[int, ...], Tensor | None]]
    grid: tuple[int, int, int]
    kept_layers: set[int] | None = None
    text_first: bool = True
    text: int = 7
    patch: int = 2
    _keys: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _velocity: dict[Any, Tensor] = field(default_factory=dict)
    _forward: int = 0

    def on(self, model: Any) -> Any:
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "plain", self._apply)
        return model

    def _apply(
        self, executor: Any, x: Tensor, t: Tensor, concat: Any, text: Any, control: Any, options: dict, **given: Any
    ) -> Tensor:
        prompts, index = self.seen[self._forward]
        assert prompts == tuple(options["cond_or_uncond"])
        self._forward += 1
        self._prompts, self._layer = prompts, 0
        self._active = torch.ones(len(x), math.prod(self.grid), dtype=torch.bool)
        if index is not None:
            rows = index.repeat(len(x) // len(index), 1)
            self._active = torch.zeros_like(self._active).scatter(1, rows, True)
        self._whole = index is None
        inner = {**options, "optimized_attention_override": self._attend}
        out = executor(x, t, concat, text, control, inner, **given)
        level = t.view(-1, *(1,) * (x.ndim - 1))
        velocity = (x - out) / level
        if index is not None:
            here = self._active.view(len(x), 1, *self.grid)
            here = here.repeat_interleave(self.patch, 3).repeat_interleave(self.patch, 4)
            here = here[..., : x.shape[-2], : x.shape[-1]]
            here = here if x.ndim == 5 else here[:, :, 0]
            velocity = torch.where(here, velocity, self._velocity[prompts])
        self._velocity[prompts] = velocity
        return x - level * velocity

    def _attend(self, function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        axis, tokens = (2 if kwargs.get("skip_reshape") else 1), math.prod(self.grid)
        n_keys = key.shape[axis]
        if query.shape[axis] != n_keys or n_keys not in (tokens, tokens + self.text):
            return function(query, key, value, *args, **kwargs)
        place, self._layer = (self._prompts, self._layer), self._layer + 1
        read = torch.ones(len(key), n_keys, dtype=torch.bool)
        first = self.text if self.text_first and n_keys > tokens else 0
        read[:, first : first + tokens] = self._active
        if self.kept_layers is not None and place[1] not in self.kept_layers:
            [alike] = {tuple(row.nonzero()[:, 0].tolist()) for row in read}  # all rows have the same tokens
            key, value = (x.index_select(axis, torch.tensor(alike)) for x in (key, value))
            return function(query, key, value, *args, **kwargs)
        if not self._whole:
            read = read[:, None, :, None] if axis == 2 else read[:, :, None]
            held = self._keys[place]
            key = torch.where(read, key, held[0])
            value = torch.where(read if value.ndim == read.ndim else read[..., None], value, held[1])
        self._keys[place] = key, value
        return function(query, key, value, *args, **kwargs)
