"""Chooser: one run's choice of tokens, from step to step. All of its transformers and branches share it.

It is told of the one velocity that guidance makes of all branches' outputs. Where that is, and what is kept there of
earlier steps, is the host's business: `Sampler` stands in a diffusers scheduler, ComfyUI's behind a guider.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dit_accel.layout import Grid
from dit_accel.region import choose
from dit_accel.region.blocks import Blocks
from dit_accel.region.options import Region
from dit_accel.region.steps import count_active, whole_steps
from dit_accel.roles import ROLES
from dit_accel.trajectory import Call, Trajectory

if TYPE_CHECKING:
    from dit_accel.region.forwards import RegionForwards


class TokenMap(Protocol):
    """Where the tokens of a transformer lie in its latents."""

    def patch_velocity(self, velocity: Tensor, grid: Grid) -> Tensor | None:
        """A velocity by tokens, `[B, S, P, C]`; None if it is of another size than the grid."""

    def spread_tokens(self, values: Tensor, grid: Grid) -> Tensor:
        """A value of each token, `[B, S]`, at each of its places in the latents."""

    def agree(self, chosen: Tensor) -> Tensor:
        """The same choice on all processes that share the transformer's sequence."""


class Chooser:
    """Chooses the tokens of each step by the velocity of the one before.

    Args:
        region: what was asked for.
        trajectory: whose runs bound its memory.
    """

    def __init__(self, region: Region, trajectory: Trajectory) -> None:
        self._regions = {role: region.for_role(role) for role in ROLES}
        self._holder: Any = None
        self._begin()
        trajectory.on_new_run(self._begin)

    def bytes_held(self) -> int:
        """Memory kept between steps: counts of steps, and the next step's tokens."""
        held = (self._left_out, self._index, self._computed, self._seen, self._rate)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def region_of(self, role: str) -> Region:
        """What was asked for of one transformer."""
        return self._regions[role]

    # -- seen from a transformer's forward

    def why_whole(self, call: Call) -> str | None:
        """Why a forward computes every token, or None: by plan, or because nothing was chosen for its step."""
        chosen = self._chosen_for == call.step
        return self._why_planned(call, call.step) or (None if chosen else "no tokens were chosen")

    def may_follow(self, call: Call) -> bool:
        """Whether this transformer's next step may leave tokens out."""
        return self._why_planned(call, call.step + 1) is None and call.step + 1 < self._steps()

    def leaves_out(self, call: Call) -> bool:
        """Whether any step of this transformer can leave tokens out."""
        region, n_tokens = self._regions[call.role], math.prod(call.grid)
        if region.unit == "block":
            return region.sample_ratio < 1
        return count_active(region, n_tokens) < n_tokens

    def hold(self, engine: RegionForwards) -> None:
        """Have one transformer's memory at a time: an expert that takes over has the one before forget."""
        before = None if self._holder is None else self._holder()
        if before is not engine:
            if before is not None:
                before.forget()
            self._holder = weakref.ref(engine)

    def chosen(self) -> Tensor:
        """The tokens of this step, int64 `[B, K]` by row of the latents."""
        assert self._index is not None
        return self._index

    def chosen_blocks(self) -> Tensor:
        """The blocks of this step, int64 `[B, A]` by row of the latents; with unit "block"."""
        assert self._computed is not None
        return self._computed

    def note_forward(
        self, tokens: TokenMap, call: Call, index: Tensor | None, blocks: Blocks | None = None
    ) -> None:
        """A forward computed these tokens, or all of them (None); with unit "block" it had such blocks."""
        self._see(tokens, call)
        self._blocks = blocks
        if index is None:
            self._all = True
        else:
            self._some = True

    def note_made_up(self, tokens: TokenMap, call: Call) -> None:
        """A step cache made a forward up: no token was computed by it."""
        self._see(tokens, call)

    def _see(self, tokens: TokenMap, call: Call) -> None:
        if self._now is None or self._now.step != call.step:
            self._all = self._some = False
        self._now, self._tokens = call, tokens

    # -- seen from where guidance has made one velocity

    def before_step(self, velocity: Tensor, sample: Tensor) -> None:
        """Count for how long each token was left out, and mend the history of those that came back."""
        call = self._now
        if call is None:
            return
        if not self.leaves_out(call) and not self._behind:  # where the expert before left some out, they come back now
            self._now = None  # nothing to count or to choose
            return
        tokens = self._tokens
        assert tokens is not None
        if tokens.patch_velocity(velocity, call.grid) is None:
            self._begin()  # a velocity of other places than the tokens': nothing to choose by
            return
        shape = len(velocity), math.prod(call.grid)
        if self._left_out is None or tuple(self._left_out.shape) != shape:
            self._left_out, self._behind = torch.zeros(shape, dtype=torch.int32, device=velocity.device), False
        # a branch that computed a part has the others' old velocity, whatever another branch computed
        every = self._all and not self._some
        fresh = torch.full(shape, every, device=velocity.device)
        if self._some:
            fresh.scatter_(1, self.chosen().to(velocity.device), True)
        if self._behind and (self._all or self._some):
            self._mend(tokens.spread_tokens(fresh & (self._left_out > 0), call.grid), velocity, sample)
        if self._regions[call.role].selector == "change":
            self._watch(tokens.patch_velocity(velocity, call.grid).float(), fresh)
        self._left_out = torch.where(fresh, 0, self._left_out + 1)
        self._behind = not every

    def _watch(self, patches: Tensor, fresh: Tensor) -> None:
        """Note how fast the velocity of the tokens changed that were computed."""
        if self._seen is None or self._seen.shape != patches.shape:
            self._rate = torch.ones_like(fresh, dtype=torch.float32)
        else:
            rate = choose.change(patches, self._seen, self._left_out + 1)
            self._rate = torch.where(fresh, rate, self._rate)
        self._seen = patches

    def after_step(self, velocity: Tensor) -> None:
        """Choose the tokens of the next step."""
        call, self._now = self._now, None
        self._index, self._computed, self._chosen_for = None, None, None
        if call is None or self._left_out is None:
            return
        region, n_tokens = self._regions[call.role], self._left_out.shape[1]
        if self.may_follow(call):
            if region.unit == "token":
                self._index = self._choose(velocity, call, count_active(region, n_tokens), None)
            elif self._blocks is None:  # of a forward that no sparse attention laid out
                return
            else:
                blocks = self._blocks
                count = blocks.count(region.sample_ratio)
                self._computed = blocks.computed(self._choose(velocity, call, count, blocks))
                self._index = blocks.tokens(self._computed)
            self._chosen_for = call.step + 1  # of this transformer: another has nothing kept yet, and computes all

    def _choose(self, velocity: Tensor, call: Call, count: int, blocks: Blocks | None) -> Tensor:
        """So many tokens, or full blocks, int64 `[B, count]` ascending; the same on all processes that share them."""
        return self._tokens.agree(self._choose_here(velocity, call, count, blocks))

    def _choose_here(self, velocity: Tensor, call: Call, count: int, blocks: Blocks | None) -> Tensor:
        region, left_out = self._regions[call.role], self._left_out
        if blocks is not None:  # the tokens of a block are left out together
            left_out = blocks.means(left_out).round().int()
        if region.selector == "mask":
            mask = choose.read_mask(region.mask, call.grid, len(velocity)).to(velocity.device)
            return choose.choose_masked(mask if blocks is None else blocks.means(mask) > 0, left_out, count)
        if region.selector == "random":
            drawn = choose.draw(left_out.shape[1], region.seed, call.step).to(velocity.device)
            return choose.choose(
                drawn.expand(len(velocity), -1), left_out, count, region.high_ratio, region.starvation
            )
        if region.selector == "change":
            measured = self._rate * (self._left_out + 1)  # what it would be off by if left out once more
        else:
            patches = self._tokens.patch_velocity(velocity, call.grid)
            measured = choose.measure(patches, region.selector)
        if blocks is not None:
            measured = blocks.means(measured)
        return choose.choose(measured, left_out, count, region.high_ratio, region.starvation)

    # -- the run

    def _begin(self) -> None:
        """A new run, or one that broke off."""
        self._index: Tensor | None = None
        self._chosen_for: int | None = None  # the step that the index is of
        self._computed: Tensor | None = None  # unit "block": the blocks that these are, int64 [B, A]
        self._blocks: Blocks | None = None  # of the last forward
        self._left_out: Tensor | None = None  # int32 [B, S], steps in a row
        self._seen: Tensor | None = None  # selector "change": the velocity before, fp32 [B, S, P, C]
        self._rate: Tensor | None = None  # fp32 [B, S], how far each token's velocity moved in a step
        self._behind = False  # whether any token was left out at the step before
        self._now: Call | None = None  # of the step under way
        self._all = self._some = False  # whether a forward of it computed all tokens, or the chosen ones
        self._tokens: TokenMap | None = None  # of the forward seen last
        self._plans: dict[str, dict[int, str]] = {}  # by role: the steps that compute every token, and why

    def _steps(self) -> int:
        """How many steps the run has."""
        raise NotImplementedError

    def _mend(self, back: Tensor, velocity: Tensor, sample: Tensor) -> None:
        """See to what the host keeps of earlier steps, where tokens came back.

        Args:
            back: bool, broadcastable to `velocity`: what was left out at the step before and is computed at this one.
        """
        raise NotImplementedError

    def _why_planned(self, call: Call, step: int) -> str | None:
        if not self.leaves_out(call):
            return "every token is asked for"
        if call.role not in self._plans:
            self._plans[call.role] = whole_steps(self._regions[call.role], self._steps())
        return self._plans[call.role].get(step)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._regions!r})"
