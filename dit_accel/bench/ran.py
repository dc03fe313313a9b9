"""What really ran, added up over the runs of a variant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from dit_accel.bench.results import Ran
from dit_accel.report import Report


def ran_of(report: Report, decisions: Mapping[str, str]) -> Ran:
    """One run's report."""
    return Ran(
        sparse_calls=report.sparse_calls,
        linear_calls=sum(report.linear_calls.values()),
        dense_calls=report.dense_calls,
        dense_reasons=dict(report.dense_reasons),
        fallbacks=dict(report.fallbacks),
        keep_requested=report.keep_requested,
        keep_achieved=report.keep_achieved,
        keep_per_layer=dict(report.keep_per_layer),
        keep_per_step=dict(report.keep_per_step),
        executors=dict(report.executors),
        forwards=dict(report.forwards),
        decisions=dict(decisions),
        regions=dict(report.regions),
        guards=dict(report.guards),
    )


def add_up(before: Ran | None, now: Ran) -> Ran:
    """Counts of both; shares of keys weighted by sparse calls; the decisions of the later."""
    if before is None:
        return now
    calls = before.sparse_calls, now.sparse_calls

    def counts(name: str) -> dict[str, int]:
        return dict(Counter(getattr(before, name)) + Counter(getattr(now, name)))

    def shares(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
        keys = sorted({*one, *other})
        return {key: _weighted((one.get(key), other.get(key)), calls) for key in keys}

    return Ran(
        sparse_calls=sum(calls),
        linear_calls=before.linear_calls + now.linear_calls,
        dense_calls=before.dense_calls + now.dense_calls,
        dense_reasons=counts("dense_reasons"),
        fallbacks=counts("fallbacks"),
        keep_requested=now.keep_requested,
        keep_achieved=_weighted((before.keep_achieved, now.keep_achieved), calls),
        keep_per_layer=shares(before.keep_per_layer, now.keep_per_layer),
        keep_per_step=shares(before.keep_per_step, now.keep_per_step),
        executors=counts("executors"),
        forwards=counts("forwards"),
        decisions=now.decisions,
        regions=counts("regions"),
        guards=counts("guards"),
    )


def _weighted(values: tuple[float | None, float | None], weights: tuple[int, int]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
