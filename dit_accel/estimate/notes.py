"""Notes: what the figures of an estimate leave out or take for granted."""

from __future__ import annotations

from collections.abc import Iterator

from dit_accel.estimate.architectures import Published
from dit_accel.estimate.gpus import nearest_head
from dit_accel.estimate.run_plan import RunPlan
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset

NOT_ESTIMATED = ("text encoders", "autoencoder")
_SMALL = 1024  # channels; every model that was measured is wider


def notes_on(preset: Preset, model: Published, plan: RunPlan, most: int | None, reused: int | None) -> Iterator[str]:
    yield f"not estimated: {' and '.join(NOT_ESTIMATED)}; seconds and memory are those of the transformer"
    if not plan.gpu.measured:
        yield (
            "rates of this GPU are scaled from the H200's by published peaks, not measured; where the Hopper executor "
            "does not run, sparse attention may gain less"
        )
    if preset.sparse is not None:
        yield from _sparse_notes(preset.sparse, plan)
    if any(part is not None and part.roles for part in (preset.sparse, preset.cache, preset.region)):
        yield "options for one transformer alone are left out: both are reckoned with the common ones"
    head = model.config["attention_head_dim"]
    if nearest_head(head) != head:
        yield f"heads of {head} were not measured: rates of heads of {nearest_head(head)}"
    if most and reused is None and preset.cache.schedule is None:
        yield (
            f"the cache judges during the run: no reused step is reckoned with, of at most {most}; give what a like "
            "run reports with --reused N"
        )
    if model.width < _SMALL:
        yield (
            "a model so small leaves a GPU waiting for the host, whose time for a plain kernel is in no record: these "
            "times are too short"
        )


def _sparse_notes(options: SparseOptions, plan: RunPlan) -> Iterator[str]:
    if plan.fast is None:
        least = options.least_tokens("cuda")
        few = plan.work.tokens < least
        why = f"{plan.work.tokens:,} tokens are fewer than its min_tokens, {least:,}" if few else (
            f"each is among the first {options.dense_first:g} of the steps, or its noise level at this size is outside "
            f"{options.dense_below:g} to {options.dense_above:g}"
        )  # fmt: skip
        yield f"no step is sparse: {why}"
    if options.method != "pooled":
        yield f"predicting a plan by method {options.method!r} was not measured in a pipeline: pooled's time is taken"
    if options.precision != "full":
        yield f"precision {options.precision!r} is reckoned as full: it is in no record of a pipeline"
    if options.top_p is not None:
        yield "top_p may keep more than keep says; that is not in these figures"
