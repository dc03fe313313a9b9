"""Report: what really ran. `Tally` counts while it happens, `Report` is what it comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.trajectory import Call, Trajectory


@dataclass(frozen=True)
class Report:
    """What ran since sparse attention was installed (or the report was last cleared)."""

    sparse_calls: int
    linear_calls: dict[int, int]  # of layers that are linear attention alone and read no key block; by layer
    dense_calls: int
    cross_attention_calls: int
    dense_reasons: dict[str, int]  # planned and unplanned
    fallbacks: dict[str, int]  # the unplanned ones among them
    keep_requested: float | None
    keep_achieved: float | None  # key tokens read / present, mean over query tokens, heads and sparse calls
    keep_per_layer: dict[int, float]
    keep_per_step: dict[int, float]
    executors: dict[str, int]
    dense_kernels: dict[str, int]  # dense self-attention calls that came to us, by what ran them
    token_orders: dict[str, int]  # forwards with sparse calls, by the order their tokens had
    plans: dict[
        str, int
    ]  # of sparse calls and groups of rows in them: how many were predicted, how many carried over from an earlier one
    stateless: dict[str, int]  # sparse calls of a method with memory that had to do without, by reason
    forwards: dict[str, int]  # under a step cache: how many were computed, how many reused
    computed_reasons: dict[str, int]  # why they were computed
    regions: dict[str, int]  # forwards under region sampling, by how many tokens they computed
    whole_reasons: dict[str, int]  # why forwards under it computed every token
    runs: int
    bytes_held: int  # between forwards
    bytes_working: int  # for a while in a call, beside what dense attention takes: copies in orders of the heads' own
    bytes_region: int  # the most that region sampling kept within a run; it lets go of it before the last step
    keep_per_role: dict[str, float]  # of each transformer with sparse calls
    forwards_per_role: dict[str, dict[str, int]]  # under a step cache, as `forwards`, of each transformer
    # options that transformers have of their own: role -> "sparse", "cache" or "region" -> these, or False: left out
    roles: dict[str, dict[str, Any]]
    guards: dict[str, int]  # what the guards did, beside the dense calls that they caused
    drift: dict[str, float]  # with a drift guard: the worst relative error of sparse attention, by role and branch

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "self_attention_calls": {
                "sparse": self.sparse_calls,
                "linear": sum(self.linear_calls.values()),
                "dense": self.dense_calls,
            },
            "linear_calls_per_layer": {str(layer): calls for layer, calls in self.linear_calls.items()},
            "dense_reasons": dict(self.dense_reasons),
            "cross_attention_calls": self.cross_attention_calls,
            "keep": {
                "requested": self.keep_requested,
                "achieved": self.keep_achieved,
                "per_layer": {str(layer): keep for layer, keep in self.keep_per_layer.items()},
                "per_step": {str(step): keep for step, keep in self.keep_per_step.items()},
                "per_role": dict(self.keep_per_role),
            },
            "executor": dict(self.executors),
            "dense_kernel": dict(self.dense_kernels),
            "token_order": dict(self.token_orders),
            "plans": dict(self.plans),
            "stateless": dict(self.stateless),
            "fallbacks": dict(self.fallbacks),
            "forwards": dict(self.forwards),
            "computed_reasons": dict(self.computed_reasons),
            "regions": dict(self.regions),
            "whole_reasons": dict(self.whole_reasons),
            "runs": self.runs,
            "bytes_held": self.bytes_held,
            "bytes_working": self.bytes_working,
            "bytes_region": self.bytes_region,
            "forwards_per_role": {role: dict(forwards) for role, forwards in self.forwards_per_role.items()},
            "roles": {role: dict(parts) for role, parts in self.roles.items()},
            "guards": dict(self.guards),
            "drift": dict(self.drift),
        }

    @property
    def calls(self) -> int:
        """Self-attention calls of every kind."""
        return self.sparse_calls + sum(self.linear_calls.values()) + self.dense_calls

    @property
    def sparse_share(self) -> float:
        """Share of self-attention calls that ran sparse; 0 if there were none."""
        return self.sparse_calls / self.calls if self.calls else 0.0

    @property
    def closing_line(self) -> str:
        """The bargain in one line."""
        if not self.calls:
            return self._forwards_line or "No self-attention has run yet."
        line = f"{self.sparse_calls} of {self.calls} self-attention calls sparse ({self.sparse_share:.0%})"
        if self.keep_achieved is not None:
            asked = "" if self.keep_requested is None else f" (asked {self.keep_requested:.1%})"
            line += f", reading {self.keep_achieved:.1%} of the keys{asked}"
        if self.linear_calls:
            line += f", {sum(self.linear_calls.values())} linear"
        fallen = sum(self.fallbacks.values())
        line = f"{line}, {fallen or 'no'} fall-back{'' if fallen == 1 else 's'}."
        return f"{self._forwards_line} {line}" if self._forwards_line else line

    def _told_of(self, role: str) -> str:
        """The options that a transformer has of its own, and what came of them."""
        told = []
        for what, own in self.roles[role].items():
            told += [f"{what} off"] if own is False else [f"{what}.{name}={value}" for name, value in own.items()]
        line = ", ".join(told)
        if role in self.keep_per_role:
            line += f"; read {self.keep_per_role[role]:.1%} of the keys"
        forwards = self.forwards_per_role.get(role)
        if forwards:
            line += f"; {forwards.get('reused', 0)} of {sum(forwards.values())} forwards reused"
        return line

    @property
    def _forwards_line(self) -> str:
        forwards = sum(self.forwards.values())
        reused = self.forwards.get("reused", 0)
        return f"{reused} of {forwards} forwards reused ({reused / forwards:.0%})." if forwards else ""

    def __str__(self) -> str:
        lines = [self.closing_line]
        for title, table in (
            ("executor", self.executors),
            ("linear attention alone in layer", self.linear_calls),
            ("dense kernel", self.dense_kernels),
            ("token order", self.token_orders),
            ("plan", self.plans),
            ("without memory because", self.stateless),
            ("dense because", self.dense_reasons),
            ("of these unplanned", self.fallbacks),
            ("forwards", self.forwards),
            ("computed because", self.computed_reasons),
            ("forwards with", self.regions),
            ("all tokens because", self.whole_reasons),
            ("guard", self.guards),
        ):
            lines += [f"  {title}: {name} ({count})" for name, count in table.items()]
        lines += [f"  drift from dense, the worst of {place}: {error:.3g}" for place, error in self.drift.items()]
        lines += [f"  {role} alone: {self._told_of(role)}" for role in self.roles]
        lines.append(f"  cross-attention left alone: {self.cross_attention_calls} calls")
        sizes = self.bytes_held, self.bytes_working, self.bytes_region
        held, working, region = (size / 2**20 for size in sizes)
        more = f", in a call for a while: {working:.2f} MiB" if working else ""
        more += f", by region sampling within a run: {region:.2f} MiB" if region else ""
        lines.append(f"  runs: {self.runs}, memory held: {held:.2f} MiB{more}")
        return "\n".join(lines)


@dataclass(eq=False)
class Tally:
    """Counts of one handle, shared by its transformers. What was read stays on the device until asked for."""

    sparse: int = 0
    dense: int = 0
    cross: int = 0
    runs: int = 0
    bytes_working: int = 0  # the most of any call
    bytes_region: int = 0  # the most at any time
    linear: Counter[int] = field(default_factory=Counter)  # by layer
    dense_reasons: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    executors: Counter[str] = field(default_factory=Counter)
    dense_kernels: Counter[str] = field(default_factory=Counter)
    token_orders: Counter[str] = field(default_factory=Counter)
    plans: Counter[str] = field(default_factory=Counter)
    stateless: Counter[str] = field(default_factory=Counter)
    forwards: Counter[str] = field(default_factory=Counter)
    computed_reasons: Counter[str] = field(default_factory=Counter)
    regions: Counter[str] = field(default_factory=Counter)
    whole_reasons: Counter[str] = field(default_factory=Counter)
    guards: Counter[str] = field(default_factory=Counter)
    drift: dict[str, float] = field(default_factory=dict)  # the worst, by role and branch
    # (layer, step, role, pairs of tokens there are in a call) -> pairs that were read, calls
    kept: dict[tuple[int, int, str, int], tuple[Tensor, int]] = field(default_factory=dict)
    forwards_per_role: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectory: Trajectory) -> Tally:
        """A tally that counts this trajectory's runs."""
        tally = cls()
        trajectory.on_run_start(tally.note_run)
        return tally

    def note_run(self) -> None:
        self.runs += 1

    def note_sparse(self, call: Call, executor: str, read: Tensor, present: int) -> None:
        """Count a sparse call that read so many (0-d, on the device) of the pairs of tokens that are present."""
        self.sparse += 1
        self.executors[executor] += 1
        assert call.layer is not None
        place = (call.layer, call.step, call.role, present)
        total, calls = self.kept.get(place, (None, 0))
        self.kept[place] = (read if total is None else total + read, calls + 1)

    def note_linear(self, call: Call, executor: str) -> None:
        """Count a call of a layer that is linear attention alone."""
        assert call.layer is not None
        self.linear[call.layer] += 1
        self.executors[executor] += 1

    def note_dense(self, reason: str, planned: bool, calls: int = 1) -> None:
        self.dense += calls
        self.dense_reasons[reason] += calls
        if not planned:
            self.fallbacks[reason] += calls

    def note_forward(self, role: str, reused: bool, reason: str) -> None:
        """Count a transformer's forward under a step cache, and why it was computed."""
        for counted in (self.forwards, self.forwards_per_role.setdefault(role, Counter())):
            counted["reused" if reused else "computed"] += 1
        if not reused:
            self.computed_reasons[reason] += 1

    def note_region(self, active: int, tokens: int, reason: str | None, held: int) -> None:
        """Count a forward under region sampling, why it computed every token if it did, and the bytes kept since."""
        self.bytes_region = max(self.bytes_region, held)
        self.regions[f"{active} of {tokens} tokens"] += 1
        if reason is not None:
            self.whole_reasons[reason] += 1

    def note_drift(self, place: str, error: float) -> None:
        """Count a look at how far sparse attention is from dense."""
        self.guards["calls compared with dense attention"] += 1
        self.drift[place] = max(self.drift.get(place, 0.0), error)

    def report(
        self, keep_requested: float | None, bytes_held: int, roles: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Report:
        """Add everything up; waits for the device."""
        kept = {place: (int(total) / place[3], calls) for place, (total, calls) in self.kept.items()}
        return Report(
            sparse_calls=self.sparse,
            linear_calls=dict(sorted(self.linear.items())),
            dense_calls=self.dense,
            cross_attention_calls=self.cross,
            dense_reasons=dict(self.dense_reasons),
            fallbacks=dict(self.fallbacks),
            keep_requested=keep_requested,
            keep_achieved=_mean(kept.values()),
            keep_per_layer=_grouped(kept, 0),
            keep_per_step=_grouped(kept, 1),
            executors=dict(self.executors),
            dense_kernels=dict(self.dense_kernels),
            token_orders=dict(self.token_orders),
            plans=dict(self.plans),
            stateless=dict(self.stateless),
            forwards=dict(self.forwards),
            computed_reasons=dict(self.computed_reasons),
            regions=dict(self.regions),
            whole_reasons=dict(self.whole_reasons),
            runs=self.runs,
            bytes_held=bytes_held,
            bytes_working=self.bytes_working,
            bytes_region=self.bytes_region,
            keep_per_role=_grouped(kept, 2),
            forwards_per_role={role: dict(forwards) for role, forwards in self.forwards_per_role.items()},
            roles={role: dict(parts) for role, parts in (roles or {}).items()},
            guards=dict(self.guards),
            drift=dict(self.drift),
        )

    def clear(self) -> None:
        """Count from zero again."""
        self.__init__()

    def __deepcopy__(self, memo: dict) -> Tally:
        new = memo[id(self)] = type(self)()
        return new


def _mean(parts: Any) -> float | None:
    parts = list(parts)
    calls = sum(count for _, count in parts)
    return sum(total for total, _ in parts) / calls if calls else None


def _grouped(kept: dict[tuple[int, int, str, int], tuple[float, int]], axis: int) -> dict[Any, float]:
    groups: dict[Any, list[tuple[float, int]]] = {}
    for place, part in kept.items():
        groups.setdefault(place[axis], []).append(part)
    return {index: _mean(parts) for index, parts in sorted(groups.items())}
