"""accelerate: install a preset's parts on a pipeline, and get a handle that reports and removes them.

Not called accelerate.py: importing a submodule of that name would replace the function
`dit_accel.accelerate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_accel.engine import Engine, Observer
from dit_accel.errors import UsageError
from dit_accel.options import SparseOptions
from dit_accel.processor import SparseProcessor, method_of
from dit_accel.report import Report, Tally
from dit_accel.trajectory import Trajectory

if TYPE_CHECKING:
    from dit_accel.preset import Preset

_ROLES = ("transformer", "transformer_2")  # Wan 2.2 has an expert for the noisy half and one for the rest


class Handle:
    """What `accelerate` installed. Also a context manager that removes it at its end."""

    def __init__(self, trajectory: Trajectory, tally: Tally, engines: list[Engine]) -> None:
        self._trajectory, self._tally, self._engines = trajectory, tally, engines

    def report(self, *, clear: bool = False) -> Report:
        """What ran since the start, or since the report was last cleared.

        Args:
            clear: count from zero afterwards.
        """
        keep = self._engines[0].keep_requested if self._engines else None
        report = self._tally.report(keep, sum(engine.bytes_held() for engine in self._engines))
        if clear:
            self._tally.clear()
        return report

    def begin(self) -> None:
        """Declare that the next forward starts a new run. Pipelines are understood without this."""
        self._trajectory.begin()

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
        for engine in self._engines:
            engine.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({', '.join(map(repr, self._engines)) or 'nothing installed'})"


def accelerate(pipe: Any, preset: str | Preset | SparseOptions | None = None, **overrides: Any) -> Handle:
    """Make a pipeline (or a bare transformer) attend sparsely.

    Args:
        pipe: a diffusers pipeline with a `transformer`, and perhaps a `transformer_2`; or such a transformer.
        preset: a preset's name or file, a loaded preset, sparse options, or None for options by keyword
        alone.
            A dense preset without overrides installs nothing.
        overrides: sparse options that replace the preset's; `method` may be a method object.

    Returns:
        The handle; leave its `with` block or call `remove()` to undo everything.

    Raises:
        UnknownNameError: an unknown preset, option, method, token order or executor.
        UnknownModelError: a transformer of no known family.
        UsageError: a value outside its range. The pipeline is left as it was.
    """
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
    if options is not None and method is not None:
        try:
            for role, transformer in transformers.items():
                engine = Engine(transformer, options, method, trajectory, tally, role)
                engines.append(engine)
                _set_processor(transformer, SparseProcessor.of(engine))
                engine.settle()
        except BaseException:
            for engine in engines:
                engine.remove()
            raise
    return Handle(trajectory, tally, engines)


def _set_processor(transformer: nn.Module, processor: SparseProcessor) -> None:
    """As `set_attn_processor`, which FramePack's class lacks."""
    for module in transformer.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor)


def _options(
    preset: str | Preset | SparseOptions | None, overrides: Mapping[str, Any]
) -> SparseOptions | None:
    if isinstance(preset, str):
        from dit_accel.preset import load_preset

        preset = load_preset(preset)
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
