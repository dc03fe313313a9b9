"""accelerate: install a preset's parts on a pipeline, and get a handle that reports and removes them.

Not called accelerate.py: importing a submodule of that name would replace the function
`dit_accel.accelerate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from dit_accel.attending import Observer
from dit_accel.caches import Cache, load_cache
from dit_accel.caches.engine import CacheEngine, remove_cache
from dit_accel.engine import Engine
from dit_accel.errors import UsageError
from dit_accel.options import SparseOptions
from dit_accel.processor import SparseProcessor, method_of
from dit_accel.region import Region, load_region
from dit_accel.region.engine import RegionEngine
from dit_accel.region.sampler import Sampler
from dit_accel.region.schedulers import remove_step
from dit_accel.report import Report, Tally
from dit_accel.trajectory import Trajectory

if TYPE_CHECKING:
    from dit_accel.caches.trials import Trial
    from dit_accel.preset import Preset

_ROLES = ("transformer", "transformer_2")  # Wan 2.2 has an expert for the noisy half and one for the rest


class Handle:
    """What `accelerate` installed. Also a context manager that removes it at its end."""

    def __init__(
        self, trajectory: Trajectory, tally: Tally, engines: list[Engine], caches: list[CacheEngine]
    ) -> None:
        self._trajectory, self._tally, self._engines, self._caches = trajectory, tally, engines, caches
        self._sampler: Sampler | None = None

    def report(self, *, clear: bool = False) -> Report:
        """What ran since the start, or since the report was last cleared.

        Args:
            clear: count from zero afterwards.
        """
        keep = self._engines[0].keep_requested if self._engines else None
        held = sum(part.bytes_held() for part in self._parts())
        report = self._tally.report(keep, held)
        if clear:
            self._tally.clear()
        return report

    def begin(self) -> None:
        """Declare that the next forward starts a new run. Pipelines are understood without this."""
        self._trajectory.begin()

    def decisions(self) -> dict[str, str]:
        """What the step caches decided in the latest run, as their option `schedule` takes it, by transformer.

        A digit a step, 1 for a computed one; where branches of guidance decided differently, such a text for each:
        "cond=1101; uncond=1111". Replayed, it costs no look at the tensors.
        """
        return {cache.role: cache.decisions.text() for cache in self._caches}

    def trials(self) -> list[Trial]:
        """What step caches with `dry_run` noted so far: see `dit_accel.caches.trials`."""
        return [trial for cache in self._caches for trial in cache.trials]

    def observe(self, observer: Observer | None) -> None:
        """Have a function told of every sparse call before it runs; None ends that.

        Where prompts of one batch differ in length it is told of each group of rows alike; `call.rows` says which.

        Args:
            observer: takes the call, its layout, query, key and value `[B, S, H, D]` and the plan. It must not change
            them, and what it raises ends the run.
        """
        for engine in self._engines:
            engine.observer = observer

    def remove(self) -> None:
        """Undo exactly what was installed. Does nothing the second time, or once another handle took over."""
        for part in self._parts():
            part.remove()

    def _parts(self) -> list[Any]:
        return [*self._caches, *self._engines, *([] if self._sampler is None else [self._sampler])]

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({', '.join(map(repr, self._parts())) or 'nothing installed'})"


def accelerate(
    pipe: Any,
    preset: str | Preset | SparseOptions | None = None,
    *,
    cache: str | Mapping[str, Any] | Cache | Literal[False] | None = None,
    region: Mapping[str, Any] | Region | Literal[False] | None = None,
    **overrides: Any,
) -> Handle:
    """Make a pipeline (or a bare transformer) attend sparsely, reuse what it computed in earlier steps, compute a part
    of its tokens at most steps, or several of these.

    Args:
        pipe: a diffusers pipeline with a `transformer`, and perhaps a `transformer_2`; or such a transformer.
        preset: a preset's name or file, a loaded preset, sparse options, or None for options by keyword
        alone.
            A dense preset without overrides and cache installs nothing.
        cache: a step cache's name, a mapping with `name` and its options, or a cache (see `dit_accel.caches`); None
            takes the preset's, False takes none.
        region: options of region-adaptive sampling by name, or a `Region` (see `dit_accel.region`); None takes the
            preset's, False takes none. It needs the whole pipeline, in whose scheduler it stands.
        overrides: sparse options that replace the preset's; `method` may be a method object.

    Returns:
        The handle; leave its `with` block or call `remove()` to undo everything.

    Raises:
        UnknownNameError: an unknown preset, option, method, cache, token order or executor.
        UnknownModelError: a transformer of no known family.
        UsageError: a value outside its range, or a cache or region sampling that this pipeline cannot have. The
            pipeline is left as it was.
    """
    if isinstance(preset, str):
        from dit_accel.preset import load_preset

        preset = load_preset(preset)
    if cache is None:
        cache = getattr(preset, "cache", None)
    step_cache = load_cache(cache) if cache else None
    region = getattr(preset, "region", None) if region is None else region
    regional = None if region is False or region is None else load_region(region)
    if regional is not None and step_cache is not None and step_cache.boundary != "call":
        raise UsageError(
            f"cache {step_cache.name!r} keeps tokens, and under region sampling a forward has other tokens than the "
            "one before. Use one that keeps whole steps (easy or latent), or region=False."
        )
    method = overrides.get("method")
    if method is None or isinstance(method, str):
        options = _options(preset, overrides)
        method = None if options is None else method_of(options)
    else:
        options = _options(preset, {k: v for k, v in overrides.items() if k != "method"}) or SparseOptions()
    transformers = _transformers(pipe)
    trajectory = Trajectory(None if pipe in transformers.values() else pipe)
    tally = Tally.of(trajectory)
    engines: list[Engine] = []
    caches: list[CacheEngine] = []
    handle = Handle(trajectory, tally, engines, caches)
    try:
        if regional is not None:
            handle._sampler = Sampler(regional, pipe, trajectory)
        else:
            remove_step(getattr(pipe, "scheduler", None))
        for role, transformer in transformers.items():
            engine = None
            if regional is not None or (options is not None and method is not None):
                engine = Engine(transformer, options or SparseOptions(), method, trajectory, tally, role)
                engines.append(engine)
                set_processor(transformer, SparseProcessor.of(engine))
                engine.settle()
                if handle._sampler is not None:
                    RegionEngine(engine, handle._sampler)
            if step_cache is not None:
                caches.append(CacheEngine(transformer, step_cache, trajectory, tally, role, engine))
            else:
                remove_cache(transformer)
    except BaseException:
        handle.remove()
        raise
    return handle


def set_processor(transformer: nn.Module, processor: SparseProcessor) -> None:
    """As `set_attn_processor`, which FramePack's class lacks."""
    for module in transformer.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor)


def _options(
    preset: Preset | SparseOptions | None, overrides: Mapping[str, Any]
) -> SparseOptions | None:
    options = preset if preset is None or isinstance(preset, SparseOptions) else preset.sparse
    if options is None:
        return SparseOptions.from_mapping(overrides) if overrides else None
    return options.merged(overrides) if overrides else options


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return {"transformer": pipe}
    found = {role: getattr(pipe, role, None) for role in _ROLES}
    found = {role: transformer for role, transformer in found.items() if isinstance(transformer, nn.Module)}
    if not found:
        raise UsageError(
            f"{type(pipe).__name__} has no transformer to accelerate: give a diffusers pipeline with one, or "
            "the transformer itself."
        )
    return found
