"""Region sampling in ComfyUI: a part of the tokens, taken out between a model's blocks, and the rest held outside.

The guider's prediction is where guidance has made one velocity of all prompts. What a sampler keeps between its steps
is out of reach, so that only one that keeps nothing, looks once at each level and adds no noise may leave tokens out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from dit_accel.adapters import patches
from dit_accel.errors import UsageError
from dit_accel.integrations.comfyui.families import FAMILIES, Family
from dit_accel.integrations.comfyui.region_blocks import BlockPatches
from dit_accel.layout import Grid
from dit_accel.region.active import ActiveTokens
from dit_accel.region.chooser import Chooser
from dit_accel.region.forwards import RegionForwards
from dit_accel.region.options import Region
from dit_accel.trajectory import Call, Facts, Trajectory

if TYPE_CHECKING:
    from dit_accel.integrations.comfyui.sparse_forwards import SparseForwards

# what other nodes put on a model to have its forward be theirs
_INSIDES = ("_forward", "forward_orig", "forward_core_with_concat")


@dataclass(frozen=True)
class LatentTokens:
    """Where tokens lie in latents of a size. The core pads them to whole patches."""

    patch: tuple[int, ...]
    sizes: tuple[int, ...]  # (frames,) rows and columns

    def patch_velocity(self, velocity: Tensor, grid: Grid) -> Tensor | None:
        if tuple(velocity.shape[2:]) != self.sizes:
            return None
        more = [-size % edge for size, edge in zip(self.sizes, self.patch, strict=True)]
        if any(more):
            padding = [count for amount in reversed(more) for count in (0, amount)]
            velocity = nn.functional.pad(velocity, padding, mode="replicate")
        return patches.split(velocity, grid, self.patch)

    def spread_tokens(self, values: Tensor, grid: Grid) -> Tensor:
        spread = patches.spread(values, grid, self.patch)
        return spread[(..., *(slice(size) for size in self.sizes))]

    def agree(self, chosen: Tensor) -> Tensor:
        return chosen


class GuidedChooser(Chooser):
    """A `Chooser` behind a guider.

    Args:
        region: what was asked for.
        trajectory: which was told how many steps there are.
    """

    def __init__(self, region: Region, trajectory: Trajectory) -> None:
        self._n_steps = trajectory.n_steps()
        super().__init__(region, trajectory)

    def _steps(self) -> int:
        return self._n_steps

    def _mend(self, back: Tensor, velocity: Tensor, sample: Tensor) -> None:
        """Nothing: a sampler that keeps anything computes every token."""


class SampledRegion(RegionForwards):
    """Region sampling on a model while a sampler runs it.

    Args:
        forwards: of the model.
        chooser: chooses the tokens.
        diffusion: the model.
        family: its family.
        itemsize: bytes of a number that it computes with.
        why_never: why no forward of this sampling can leave tokens out, or None.

    Raises:
        UsageError: a model that cannot compute a part of its tokens, or as of `RegionForwards`.
    """

    def __init__(
        self,
        forwards: SparseForwards,
        chooser: Chooser,
        diffusion: nn.Module,
        family: Family,
        itemsize: int,
        why_never: str | None,
    ) -> None:
        name = type(diffusion).__name__
        if name not in FAMILIES:  # a class that is only derived from one has tokens that nobody described
            raise UsageError(
                f"Region sampling is not proven for {name} in ComfyUI: set DiT-Accel Region to off. It runs on "
                f"{', '.join(sorted(FAMILIES))}."
            )
        super().__init__(forwards, chooser, name)
        self._diffusion, self._family = diffusion, family
        self._itemsize, self._why_sampling_never = itemsize, why_never
        self._patches = BlockPatches(list(family.slots(diffusion)), family.rotary_axis)
        self._map: LatentTokens | None = None
        self._predicted: tuple[int, ...] | None = None  # shape of the latents that a guider predicts from

    # -- around a guider's prediction

    def predict(
        self, executor: Callable[..., Tensor], x: Tensor, sigma: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        """A guider's prediction, from whose velocity the tokens of the next step are chosen.

        Args:
            x: noisy latents `[B, C, (F,) H, W]`.
            sigma: noise level of each row.
        """
        self._predicted = tuple(x.shape)
        try:
            out = executor(x, sigma, *args, **kwargs)
        finally:
            self._predicted = None
        velocity = _velocity(x, out, sigma)
        self.chooser.before_step(velocity, x)
        self.chooser.after_step(velocity)
        return out

    # -- around one forward

    def enter(
        self,
        call: Call,
        facts: Facts,
        x: Tensor,
        control: Any,
        options: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> ActiveTokens | None:
        """Decide which tokens a forward computes; None: all. Arguments as of `Sampling.apply`.

        Raises:
            UsageError: what would be kept does not fit into memory.
        """
        self._look_at(x)
        reason = self._why_sampling_never or self._why_never(call, facts, x, control, options, given)
        return self._decide(call, facts, x, self._itemsize, reason)

    def stand_in(self, options: dict[str, Any], active: ActiveTokens, text_first: bool) -> dict[str, Any]:
        """ComfyUI's options for a forward of these tokens (`BlockPatches.stand_in`)."""
        return self._patches.stand_in(options, active, text_first, alike=len(self._forward.index) == 1)

    def settle(self, x: Tensor, sigma: Tensor, out: Tensor) -> Tensor:
        """What a forward gave, `[B, C, (F,) H, W]` without noise: with the others' held velocity where it computed a
        part of the tokens.

        Raises:
            UsageError: something else within the model kept the tokens from being taken out.
        """
        now = self._forward
        assert now is not None and self._map is not None
        if now.active is not None:
            self._check_ran()
            chosen = torch.zeros(len(x), math.prod(now.call.grid), dtype=torch.bool, device=x.device)
            here = self._map.spread_tokens(chosen.scatter_(1, now.active.index, True), now.call.grid)
            now.kept.velocity = torch.where(here, _velocity(x, out, sigma), now.kept.velocity)
            held = x.float() - _level(x, sigma) * now.kept.velocity
            out = torch.where(here, out, held.to(out.dtype))
            self._patches.clear()
        elif now.stores:
            now.kept.velocity = _velocity(x, out, sigma)
            if self.region.keys == "cached" and not now.attended.issuperset(self._kept_layers()):
                now.kept.keys.clear()  # something else attended in some of them
        self.leave()
        return out

    def attend(
        self, place: Any, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]
    ) -> Tensor | None:
        """As of `RegionForwards`.

        Raises:
            UsageError: other tokens than those that were to be computed.
        """
        now = self._forward
        if now is not None and now.active is not None:
            tokens = now.active.n_video_tokens
            if query.shape[1] not in (tokens, tokens + now.text):
                raise self._not_taken_out()
        return super().attend(place, query, key, value, call)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a copy of keys and values, if they are of the tokens that are known."""
        tokens = math.prod(self._forward.call.grid)
        if key.shape[1] in (tokens, tokens + self._forward.text):
            super().store(layer, key, value)
            self._forward.attended.add(layer)

    def pass_by(self, call: Call, x: Tensor) -> None:
        """Note that a step cache made a forward up."""
        kept = self._kept.get(call.branch)
        if kept is not None:
            kept.step = call.step
        self._look_at(x)
        self.chooser.note_made_up(self._map, call)

    def forget(self) -> None:
        super().forget()
        self._patches.clear()

    # -- as a host

    def _look_at(self, x: Tensor) -> None:
        self._places = math.prod(x.shape[1:])
        self._map = LatentTokens(tuple(self._family.patch(self._diffusion)), tuple(x.shape[2:]))

    def _tokens(self) -> LatentTokens:
        assert self._map is not None
        return self._map

    def declare(self, rows: int, tokens: int, text: int, itemsize: int) -> int:
        velocity = rows * self._places * 4
        if self.region.keys == "drop":
            return velocity
        # SD3.5's blocks attend a second time, to the image alone
        alone = {layer for layers in self._family.slots(self._diffusion).values() for layer in layers[1:]}
        keys = sum(tokens + text * (layer not in alone) for layer in self._kept_layers())
        return velocity + 2 * keys * rows * self._family.width(self._diffusion) * itemsize

    def _kept_layers(self) -> range:
        return range(self._first_layer, self._forwards().n_layers)

    def _check_ran(self) -> None:
        missing = set(self._kept_layers()) - self._forward.attended if self.region.keys == "cached" else ()
        if self._patches.n_run != len(self._patches) or missing:
            raise self._not_taken_out()

    def _not_taken_out(self) -> UsageError:
        attended = len(self._forward.attended)
        return UsageError(
            f"Region sampling could not take its tokens out: {self._patches.n_run} of {len(self._patches)} blocks and "
            f"{attended} of {self._forwards().n_layers} self-attentions came to it. Another node changes this model "
            "within: set DiT-Accel Region to off, or take that node out."
        )

    # -- why not

    def _why_never(
        self,
        call: Call,
        facts: Facts,
        x: Tensor,
        control: Any,
        options: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> str | None:
        """Why this forward can neither leave tokens out nor be kept for one that does, or None."""
        if call.branch is None:
            return "branch unknown"
        if torch.is_grad_enabled() and x.requires_grad:
            return "gradients are needed"
        if options.get("context_window") is not None:
            return "a context window"
        predicted = self._predicted
        if predicted is None or tuple(x.shape[1:]) != predicted[1:] or len(x) % predicted[0]:
            return "a part of the latents"
        if control is not None:
            return "a ControlNet comes in"
        if options.get("patches_replace", {}).get("dit"):
            return "another node stands in for blocks"
        if any(options.get("patches", {}).values()):
            return "another node patches tokens"
        if any(options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}).values()):
            return "another node stands around the model"
        if any(name in vars(self._diffusion) for name in _INSIDES):
            return "another node replaced the model's forward"
        kept = self._kept.get(call.branch)
        if kept is not None and kept.step == call.step:  # with something changed, or there would be no sense in it
            return "the branch comes a second time at this step"
        return facts.loose or self._family.why_whole(self._diffusion, given)


def why_sampler(sampler: Any) -> str | None:
    """Why no sampling by this sampler can leave tokens out, or None."""
    function = getattr(sampler, "sampler_function", None)
    if function is not sample_euler:
        name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
        return f"sampler {name}: only euler is known to look once at a level, back at none, and to add no noise"
    if getattr(sampler, "extra_options", {}).get("s_churn"):
        return "sampler euler adds noise (s_churn)"
    return None


def _level(x: Tensor, sigma: Tensor) -> Tensor:
    return sigma.view(-1, *(1,) * (x.ndim - 1)).to(x)


def _velocity(x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
    """Of latents and what they are without noise, fp32."""
    return ((x - out) / _level(x, sigma)).float()
