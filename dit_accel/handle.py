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
from dit_accel.caches.off import Off
from dit_accel.engine import Engine, Probe
from dit_accel.errors import UsageError
from dit_accel.forwards import method_of
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.planner import Experiment
from dit_accel.processor import SparseProcessor
from dit_accel.region import Region, load_region
from dit_accel.region.engine import RegionEngine
from dit_accel.region.sampler import Sampler
from dit_accel.region.schedulers import remove_step
from dit_accel.report import Report, Tally
from dit_accel.roles import ROLES, Own, check_pipeline_has
from dit_accel.trajectory import Trajectory

if TYPE_CHECKING:
    from dit_accel.caches.trials import Trial
    from dit_accel.preset import Preset


class Handle:
    """What `accelerate` installed. Also a context manager that removes it at its end."""

    def __init__(
        self, trajectory: Trajectory, tally: Tally, engines: list[Engine], caches: list[CacheEngine]
    ) -> None:
        self._trajectory, self._tally, self._engines, self._caches = trajectory, tally, engines, caches
        self._sampler: Sampler | None = None
        self._roles: dict[str, dict[str, Own]] = {}  # what was said of single transformers: role -> part -> options

    def report(self, *, clear: bool = False) -> Report:
        """What ran since the start, or since the report was last cleared.

        Args:
            clear: count from zero afterwards.
        """
        keeps = {engine.keep_requested for engine in self._engines if engine.method is not None}
        held = sum(part.bytes_held() for part in self._parts())
        report = self._tally.report(keeps.pop() if len(keeps) == 1 else None, held, self._roles)
        if clear:
            self._tally.clear()
        return report

    def begin(self) -> None:
        """Declare that the next forward starts a new run. Pipelines are understood without this."""
        self._trajectory.begin()

    def decisions(self) -> dict[str, str]:
        """What the step caches decided in the latest run, as their option `schedule` takes it, by transformer.

        A digit a step, 1 for a computed one; where branches of guidance decided differently, such a text for each:
        "cond=1101; uncond=1111". Steps before a transformer's first are given as computed. Replayed, it costs no look
        at the tensors. Of two experts each takes its own: `{role: {"schedule": text}}` beside the cache's options.
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

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Of each transformer with sparse attention or region sampling, what serves its attentions."""
        return tuple(self._engines)

    def probe(self, probe: Probe | None) -> None:
        """Have a function asked at every call that may be sparse what goes on from it; None ends that.

        Args:
            probe: takes the call and two functions that attend, densely and sparsely, and gives `[B, S, H, D]`. While
                it asks for sparse attention, `experiment` says how sparse.
        """
        for engine in self._engines:
            engine.probe = probe

    def experiment(self, experiment: Experiment | None) -> None:
        """Have attention be as an experiment says, whatever the rules say; None ends that."""
        for engine in self._engines:
            engine.planner.experiment = experiment

    def needs(self) -> dict[str, int]:
        """Bytes that the installed parts want beside the model's own: declared for forwards like the latest, or seen.

        Caches and region sampling declare what they keep of one branch of guidance; of sparse attention it is what it
        holds between forwards and what it took for a while in a call. Parts that want nothing are left out.
        """
        parts = [*self._caches, *(engine.region for engine in self._engines if engine.region is not None)]
        sparse = sum(engine.planner.bytes_held() + engine.layouts.bytes_held() for engine in self._engines)
        told = dict(part.needs() for part in parts) | {"sparse attention": sparse + self._tally.bytes_working}
        return {name: size for name, size in told.items() if size}

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
        overrides: sparse options that replace the preset's; `method` may be a method object. `transformer=` and
            `transformer_2=`, here as in `cache` and `region`, are options of this transformer alone, or False to
            leave it out (see `dit_accel.roles`).

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
    given = overrides.get("method")
    if given is None or isinstance(given, str):
        given, options = None, _options(preset, overrides)
    else:
        options = _options(preset, {k: v for k, v in overrides.items() if k != "method"}) or SparseOptions()
    transformers = _transformers(pipe)
    asked = {"sparse": options, "cache": step_cache, "region": regional}
    said = {what: part.roles for what, part in asked.items() if part is not None}
    for what, roles in said.items():
        check_pipeline_has(roles, what, pipe, transformers)
    caches_by_role = {role: _cache_of(step_cache, regional, role) for role in transformers}
    sparse_by_role = {role: _sparse_of(options, given, role) for role in transformers}
    trajectory = Trajectory(None if pipe in transformers.values() else pipe)
    tally = Tally.of(trajectory)
    engines: list[Engine] = []
    caches: list[CacheEngine] = []
    handle = Handle(trajectory, tally, engines, caches)
    found = {role: {what: roles[role] for what, roles in said.items() if role in roles} for role in transformers}
    handle._roles = {role: parts for role, parts in found.items() if parts}
    try:
        if regional is not None:
            handle._sampler = Sampler(regional, pipe, trajectory)
        else:
            remove_step(getattr(pipe, "scheduler", None))
        for role, transformer in transformers.items():
            engine, own_cache = None, caches_by_role[role]
            if regional is not None or options is not None:
                engine = Engine(transformer, *sparse_by_role[role], trajectory, tally, role)
                engines.append(engine)
                set_processor(transformer, SparseProcessor.of(engine))
                engine.settle()
                if handle._sampler is not None:
                    RegionEngine(engine, handle._sampler)
            if own_cache is not None:
                caches.append(CacheEngine(transformer, own_cache, trajectory, tally, role, engine))
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


def _sparse_of(
    options: SparseOptions | None, given: Method | None, role: str
) -> tuple[SparseOptions, Method | None]:
    """A transformer's sparse options, and its method: None where its attention is dense.

    Args:
        given: a method object in place of the one that the options name.
    """
    own = None if options is None else options.for_role(role)
    if own is None:
        return SparseOptions(), None
    said = options.roles.get(role, {})
    if given is None or "method" in said:
        return own, method_of(own)
    beside = sorted({"keep", "top_p", *own.method_options} & set(said))
    if beside:
        raise UsageError(
            f"sparse option {role}.{beside[0]} is of a method, and method= is an object, whose options are its own: "
            f"name the method of {role}, too, or give method= by name."
        )
    return own, given


def _cache_of(cache: Cache | None, region: Region | None, role: str) -> Cache | None:
    """A transformer's cache, one that is off included; None where no transformer has one."""
    own = None if cache is None else cache.for_role(role)
    if own is None:
        return None if cache is None else Off()
    sampled = region is not None and region.roles.get(role) is not False
    if sampled and own.boundary != "call":
        raise UsageError(
            f"cache {own.name!r} keeps tokens, and under region sampling a forward has other tokens than the "
            f"one before. Use one that keeps whole steps (easy or latent), or region=False; or leave {role} out of one."
        )
    return own


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return {"transformer": pipe}
    found = {role: getattr(pipe, role, None) for role in ROLES}
    found = {role: transformer for role, transformer in found.items() if isinstance(transformer, nn.Module)}
    if not found:
        raise UsageError(
            f"{type(pipe).__name__} has no transformer to accelerate: give a diffusers pipeline with one, or "
            "the transformer itself."
        )
    return found
