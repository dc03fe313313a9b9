"""Gradient checkpointing under an engine: a block computed again in the backward attends as it did in its forward.

The backward runs a block's forward a second time after the transformer's own has returned, perhaps behind another
forward. The engine then no longer knows which call this is, so it is told again.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_accel.engine import Engine


class Checkpointing:
    """Hooks around a transformer's forward that stand in for its checkpointing functions while it runs.

    Args:
        engine: of the transformer; its own hooks come first.
        transformer: diffusers', whose `enable_gradient_checkpointing` may be called before or after.
    """

    def __init__(self, engine: Engine, transformer: nn.Module) -> None:
        self._engine = engine
        self._handles = [
            transformer.register_forward_pre_hook(self._enter),
            transformer.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks away. Nothing the second time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, transformer: nn.Module, args: tuple) -> None:
        for module in _checkpointed(transformer):
            module._gradient_checkpointing_func = _Remembering(self._engine, module._gradient_checkpointing_func)

    def _leave(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        for module in _checkpointed(transformer):
            if isinstance(module._gradient_checkpointing_func, _Remembering):
                module._gradient_checkpointing_func = module._gradient_checkpointing_func.inner


class _Remembering:
    """A checkpointing function that has what it is given run in the moment of this forward, whenever that is."""

    def __init__(self, engine: Engine, inner: Any) -> None:
        self.engine, self.inner, self.moment = engine, inner, engine.moment()

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner(_Again(self, module), *args, **kwargs)


class _Again:
    """A block that is run in its forward's moment."""

    def __init__(self, remembering: _Remembering, module: Any) -> None:
        self.remembering, self.module = remembering, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine, moment = self.remembering.engine, self.remembering.moment
        if engine.call is moment["call"]:
            return self.module(*args, **kwargs)
        with engine.back_in(moment):
            return self.module(*args, **kwargs)


def _checkpointed(transformer: nn.Module) -> list[Any]:
    """Modules that checkpoint parts of theirs."""
    return [module for module in transformer.modules() if getattr(module, "gradient_checkpointing", False)]
