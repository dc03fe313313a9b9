"""Time forwards of a transformer, dense and sparse in turns, and see where the time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dit_accel import SparseOptions, SparseProcessor
from dit_accel.bench.stopwatch import Stopwatch, seconds_of, timed
from dit_accel.testing import peak_bytes

STEP = 0.01  # how far the noise level falls from one forward to the next
CHECK_GRID = (3, 21, 26)  # at most, for `judge_full_plan`; ragged on purpose, and even
# How much further than dense by another kernel a full plan may be from dense, and what is forgiven at all (in eps).
_SLACK, _FORGIVEN = 4.0, 1.0


@dataclass(frozen=True)
class Variant:
    """Stock dense attention (`options` None), or sparse attention."""

    name: str
    options: SparseOptions | None = None
    source: str = ""  # the preset it comes from, or "given"
    dropped: tuple[str, ...] = ()  # what of the preset does not hold here


class _WatchDense(TorchFunctionMode):
    """Times torch's attention where at least so many keys meet as many queries, and names its kernel."""

    def __init__(self, watch: Stopwatch, tokens: int) -> None:
        super().__init__()
        self.watch, self.tokens = watch, tokens
        self.kernels: set[str] = set()

    def __torch_function__(
        self, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        query, key = given["query"], given["key"]
        if query.shape[-2] != key.shape[-2] or key.shape[-2] < self.tokens:
            return function(*args, **kwargs)
        self.kernels.add(_kernel_of(given))
        start = self.watch.now()
        out = function(*args, **kwargs)
        self.watch.note("attention", start)
        return out


def _kernel_of(given: dict[str, Any]) -> str:
    """Which of torch's attention kernels such a call gets."""
    choice = torch._fused_sdp_choice(given["query"], given["key"], given["value"], given.get("attn_mask"))
    return torch.nn.attention.SDPBackend(choice).name.lower()


@contextlib.contextmanager
def installed(transformer: nn.Module, options: SparseOptions | None) -> Iterator[SparseProcessor | None]:
    """The transformer with sparse attention while the block runs; stock again behind it."""
    if options is None:
        yield None
        return
    processor = SparseProcessor(transformer, **options.to_mapping())
    transformer.set_attn_processor(processor)
    try:
        yield processor
    finally:
        processor.remove()


@dataclass
class Sample:
    """What one round tells of a variant."""

    seconds: float  # of a forward; the mean where plans serve several steps
    report: Any  # None for dense
    peak_bytes: int | None  # above what was held before; None on a CPU


def take_sample(
    transformer: nn.Module,
    variant: Variant,
    inputs: Callable[[float], dict[str, Any]],
    noise: float,
    warm: bool,
) -> Sample:
    """Run a variant: one forward that is not timed, if asked for or sparse, then those that are.

    Args:
        inputs: the arguments of a forward at a noise level.
        noise: where the timed forwards begin. Where plans serve several steps so many are timed, one prediction falls
            among them, and the mean is told.
    """
    device = next(transformer.parameters()).device
    options = variant.options
    steps = 1 if options is None else options.predict_every
    with installed(transformer, options) as processor:
        if warm or options is not None:
            transformer(**inputs(noise + STEP))
        held = reset_peak(device)
        spent = 0.0
        for step in range(steps):
            given = inputs(noise - STEP * step)
            spent += seconds_of(lambda given=given: transformer(**given), device)
        peak = None if held is None else torch.cuda.max_memory_allocated(device) - held
        report = None if processor is None else processor.report
    return Sample(spent / steps, report, peak)


def reset_peak(device: torch.device) -> int | None:
    """Bytes in use on a GPU, from which its peak counts anew; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def watch_forward(
    transformer: nn.Module,
    variant: Variant,
    inputs: Callable[[float], dict[str, Any]],
    noise: float,
    tokens: int,
    lists: tuple[str, ...],
) -> dict[str, Any]:
    """Where a forward's time goes. Watching costs something: the time of a forward is taken unwatched.

    Args:
        tokens: so many keys at least make an attention one of those that may be sparse.
        lists: the transformer's lists of blocks.

    Returns:
        `attention_ms` of each layer (prediction included), `predict_ms` in all, `blocks_ms` of each list, `forward_ms`,
        the kernels of dense attention, and on a CPU the peak of memory above what was held before.
    """
    device = next(transformer.parameters()).device
    with installed(transformer, variant.options) as processor:
        transformer(**inputs(noise + STEP))
        watch, dense = Stopwatch(device), contextlib.nullcontext()
        handles = _watch_blocks(transformer, lists, watch)
        if processor is None:
            dense = _WatchDense(watch, tokens)
        else:
            engine = processor.engine
            engine.attend = timed(engine.attend, watch, "attention")
            engine.planner.plan = timed(engine.planner.plan, watch, "predict")
        given = inputs(noise)
        start = watch.now()
        try:
            with dense:
                transformer(**given)
            watch.note("forward", start)
        finally:
            for handle in handles:
                handle.remove()
            if processor is not None:
                del engine.attend, engine.planner.plan
        peak = None if device.type == "cuda" else peak_bytes(lambda: transformer(**given))[0]
    told = watch.read()
    return {
        "forward_ms": told["forward"][0],
        "attention_ms": told.get("attention", []),
        "predict_ms": sum(told.get("predict", [])),
        "blocks_ms": {name: sum(told[name]) for name in lists},
        "dense_kernels": sorted(getattr(dense, "kernels", ())),
        "peak_bytes": peak,
    }


def _watch_blocks(transformer: nn.Module, lists: tuple[str, ...], watch: Stopwatch) -> list[Any]:
    started: list[Any] = []
    handles = []
    for name in lists:
        for block in getattr(transformer, name):
            handles.append(block.register_forward_pre_hook(lambda *_: started.append(watch.now())))
            handles.append(block.register_forward_hook(lambda *_, name=name: watch.note(name, started.pop())))
    return handles


def relative_error(a: Tensor, b: Tensor) -> float:
    """`|a - b| / |b|` in the Euclidean norm, in float32."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def judge_full_plan(error: float, floor: float, dtype: torch.dtype, report: Any) -> dict[str, Any]:
    """Whether a plan that keeps everything came out as dense attention does.

    Args:
        error: relative, from dense.
        floor: that of dense attention by another kernel.
        report: of the forward with that plan.

    Returns:
        Both, the limit, and `problem`, a sentence or None.
    """
    limit = _SLACK * floor + _FORGIVEN * torch.finfo(dtype).eps
    problem = None
    if report.dense_calls or not report.sparse_calls:
        problem = f"of the check's calls {report.sparse_calls} were sparse: {dict(report.dense_reasons)}"
    elif not error <= limit:  # also where it is not a number
        problem = f"a full plan is {error:.1e} from dense, which may be {limit:.1e}"
    return {"error": error, "floor": floor, "limit": limit, "problem": problem}
