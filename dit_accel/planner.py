"""Planner: gets each sparse call its plan. Predicted, carried over from an earlier step, or learnt from a call.

Three things a method need not know of itself: which values its options have here (`rules`), that a plan may serve for
several steps or for both branches of guidance, and where its memory is kept.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.errors import UsageError
from dit_accel.layout import TokenLayout
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.plan import BlockPlan
from dit_accel.report import Tally
from dit_accel.trajectory import Call, StateTable, Trajectory

_EVERY = "every branch"  # stands for the branches that share plans


@dataclass
class KeptPlan:
    """A plan between two steps: its lists, and what it skips, as bitmaps."""

    bits: Tensor | None = None  # int32 [B|1, H|1, Nq, ceil(Nk / 32)]
    skipped: Tensor | None = None  # uint8 [B|1, H|1, Nq, ceil(Nk / 8)]
    rest: BlockPlan | None = None  # everything but these
    step: int = -1
    noise: float = 0.0

    def keep(self, plan: BlockPlan, call: Call) -> None:
        from dit_accel.kernels.bitmaps import pack_lists

        self.bits = pack_lists(plan)
        empty = dict(counts=plan.counts.new_zeros(plan.counts.shape), indices=plan.indices[..., :0].clone())
        self.skipped = None if plan.skipped is None else _pack(plan.skipped)
        self.rest = replace(plan, **empty, key_means=None, skipped=None)
        self.step, self.noise = call.step, call.noise

    def plan(self) -> BlockPlan:
        from dit_accel.kernels.bitmaps import unpack_lists

        assert self.bits is not None and self.rest is not None
        counts, indices = unpack_lists(self.bits, self.rest.n_k)
        skipped = None if self.skipped is None else _unpack(self.skipped, self.rest.n_k)
        return replace(self.rest, counts=counts, indices=indices, skipped=skipped)


def _pack(mask: Tensor) -> Tensor:
    """Eight entries of the last dimension to a byte, the first in its lowest bit."""
    whole = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (whole << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, n: int) -> Tensor:
    """The first n entries of what `_pack` made."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :n].bool()


@dataclass(frozen=True)
class Experiment:
    """What attention does while it is measured, in place of what the rules say."""

    layers: frozenset[int] | None  # sparse in these alone; None: in all
    keep: float


class Planner:
    """The plans of one transformer.

    Args:
        options: what was asked for.
        method: predicts the plans.
        trajectory: whose runs bound all memory.
        tally: counts what was predicted and what was carried over.
        n_layers: of the transformer.

    Raises:
        UsageError: a rule that names a layer that does not exist, an option that is fixed or a value that the method
            refuses, or plans asked to be carried over that a method learns anew from every call.
    """

    def __init__(
        self, options: SparseOptions, method: Method, trajectory: Trajectory, tally: Tally, n_layers: int
    ) -> None:
        self.options, self.method, self.tally = options, method, tally
        self.learns = hasattr(method, "learn")
        self.experiment: Experiment | None = None  # set while attention is measured
        self._memory = StateTable(trajectory)
        self._kept = StateTable(trajectory)
        self._variants: dict[tuple, Method] = {}
        self._raised: dict[str, float] = {}  # by what factor keep is raised in this run, by `place`
        self._raised_at: dict[str, int] = {}  # in which step it was last
        trajectory.on_new_run(self._raise_nothing)
        if self.learns and (options.predict_every > 1 or options.share_plans):
            raise UsageError(
                f"Method {type(method).__module__.rpartition('.')[2]!r} learns each plan from the call before it: "
                "predict_every and share_plans have nothing to carry over. Leave them out."
            )
        for rule in options.rules:
            for layer in rule.layers or ():
                if not -n_layers <= layer < n_layers:
                    raise UsageError(
                        f"A rule names layer {layer}, but this transformer has {n_layers}: give 0 to {n_layers - 1}, "
                        f"or -1 to {-n_layers} to count from the last."
                    )
            fixed = sorted(set(rule.values) & set(getattr(method, "fixed", ())))
            if fixed:
                raise UsageError(
                    f"A rule changes {fixed[0]}, which holds for a whole transformer: give it beside the rules."
                )
            self._with_values(tuple(rule.values.items()))  # refuses now what it would refuse in mid-run

    def is_dense(self, call: Call) -> bool:
        """Whether the last rule about it says that this call is dense."""
        assert call.layer is not None
        if self.experiment is not None:
            return self.experiment.layers is not None and call.layer not in self.experiment.layers
        held = [rule for rule in self.options.rules if rule.holds(call.noise, call.layer, call.n_layers)]
        return bool(held) and held[-1].dense

    def method_at(self, call: Call) -> Method:
        """The method with the values that the rules give its options here."""
        assert call.layer is not None
        if self.experiment is not None:
            return self._with_values((("keep", self.experiment.keep),))
        values: dict[str, Any] = {}
        for rule in self.options.rules:
            if rule.holds(call.noise, call.layer, call.n_layers):
                values |= rule.values
        if self._raised:
            keep = values.get("keep", self.method.keep)
            if keep is not None:
                values["keep"] = min(1.0, keep * self._raised.get(self.place(call), 1.0))
        return self._with_values(tuple(values.items()))

    def place(self, call: Call) -> str:
        """What has a keep of its own: a transformer's branch, or all of them where they share plans."""
        branch = _EVERY if self.options.share_plans else call.branch
        return f"{call.role}, {branch or 'branch unknown'}"

    def raise_keep(self, call: Call, factor: float) -> float | None:
        """Have a call's place keep more for the rest of the run, from plans predicted anew; at most once a step.

        Returns:
            What this call's keep would be now; None where it was all already, or was raised in this step.
        """
        place, keep = self.place(call), self.method_at(call).keep
        if keep is None or keep >= 1 or self._raised_at.get(place) == call.step:
            return None
        self._raised[place] = self._raised.get(place, 1.0) * factor
        self._raised_at[place] = call.step
        self._kept.clear()
        return self.method_at(call).keep

    def _raise_nothing(self) -> None:
        self._raised.clear()
        self._raised_at.clear()

    def forget(self, call: Call) -> None:
        """Let go of what is remembered of one attention: a call of it went wrong, and it is dense from now on."""
        self._memory.discard(call)
        self._kept.discard(call)

    def plan(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call) -> BlockPlan:
        """The plan of one call. query, key: `[B, S, H, D]`, in the layout's order."""
        kept = self._kept_for(call, query)
        if kept is not None and self._still_good(kept, call):
            self.tally.plans["carried over"] += 1
            return kept.plan()
        plan = self.method_at(call).predict(query, key, layout, call, self.state_for(query, layout, call))
        self.tally.plans["predicted"] += 1
        if kept is not None:
            kept.keep(plan, call)
        return plan

    def state_for(self, query: Tensor, layout: TokenLayout, call: Call) -> Any:
        """What the method remembers of this role, branch and layer; None if it remembers nothing."""
        init = getattr(self.method, "init_state", None)
        if init is None or not self._has_branch(call):
            return None
        return self._memory.get(call, tuple(query.shape), lambda: init(query, layout))

    def clear(self) -> None:
        self._memory.clear()
        self._kept.clear()

    def bytes_held(self) -> int:
        return self._memory.bytes_held() + self._kept.bytes_held()

    def __repr__(self) -> str:
        return f"Planner({self._memory!r}, kept plans {self._kept!r})"

    def __deepcopy__(self, memo: dict) -> Planner:
        """For a copied transformer: the same method, with memory and counts of its own."""
        new = memo[id(self)] = object.__new__(type(self))
        new.options, new.method, new.learns = self.options, self.method, self.learns
        new.tally = copy.deepcopy(self.tally, memo)
        new._memory, new._kept = copy.deepcopy(self._memory, memo), copy.deepcopy(self._kept, memo)
        new._variants = dict(self._variants)
        new._raised, new._raised_at, new.experiment = {}, {}, None
        return new

    def _kept_for(self, call: Call, query: Tensor) -> KeptPlan | None:
        share = self.options.share_plans
        if self.options.predict_every == 1 and not share:
            return None
        if not share and not self._has_branch(call):
            return None
        place = replace(call, branch=_EVERY) if share else call
        return self._kept.get(place, tuple(query.shape), KeptPlan)

    def _still_good(self, kept: KeptPlan, call: Call) -> bool:
        if kept.bits is None:
            return False
        age = call.step - kept.step
        if age == 0:
            return self.options.share_plans  # made for the other branch of this very step
        near = kept.noise - call.noise <= self.options.predict_drift
        return 0 < age < self.options.predict_every and near

    def _has_branch(self, call: Call) -> bool:
        if call.branch is None:
            self.tally.stateless["branch unknown"] += 1
        return call.branch is not None

    def _with_values(self, values: tuple[tuple[str, Any], ...]) -> Method:
        if not values:
            return self.method
        key = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in values)
        if key not in self._variants:
            if not dataclasses.is_dataclass(self.method):
                raise UsageError(
                    "Rules change options of a method, and this method object is not a dataclass."
                )
            self._variants[key] = replace(self.method, **dict(values))
        return self._variants[key]
