"""The hooks an engine puts on a transformer.

They are torch's own module hooks, not diffusers' `ModelHook`, for three measured reasons: a deep copy of a
module with a `ModelHook` runs the original's weights; torch hooks are always outermost, however many hooks
diffusers adds later (a root hook must see whole latents, not shards); and `forward` stays the class's
function. The one thing only a `ModelHook` is told, the pipeline's cache context, comes through a listener
that sits in diffusers' hook registry without touching `forward`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import nn

from dit_accel.adapters import parallel
from dit_accel.trajectory import Context, Trajectory

if TYPE_CHECKING:
    from dit_accel.engine import Engine

LISTENER = "dit_accel"  # its name in diffusers' hook registry
_WHOLE_GRAPH = (
    "dit_accel reads the denoising step in Python before each forward, so the whole transformer cannot be "
    "one graph: use `transformer.compile_repeated_blocks(fullgraph=True)`, or compile with fullgraph=False."
)


def _kept_out_of_graphs(function: Any) -> Any:
    """Keep a hook out of torch.compile's graphs, which would apply what it writes only after the forward."""
    if "reason" in inspect.signature(torch.compiler.disable).parameters:
        return torch.compiler.disable(function, reason=_WHOLE_GRAPH)
    return torch.compiler.disable(function)


class Enter:
    """Root hook before the forward. A class, so that a deep copy of the module copies it with its engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @_kept_out_of_graphs
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        changed = self.engine.enter(args, kwargs)
        if not may_be_made_up(module, self.engine):
            self.engine.begin()
        return changed


class Leave:
    """Root hook behind the forward; an exception skips it, which is how the clock learns of one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @_kept_out_of_graphs
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.engine.leave()


class Reorder:
    """Hook behind a module whose output carries tokens."""

    def __init__(self, engine: Engine, reorder: Any) -> None:
        self.engine, self.reorder = engine, reorder

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        order = self.engine.order
        return None if order is None else parallel.reorder(module, output, self.reorder, order)


def keeps_tokens(transformer: nn.Module) -> bool:
    """Whether a cache stands on the transformer, of diffusers or ours, that may use tokens of one forward in another.

    They are stateful hooks, however they came: `enable_cache` leaves a note, `apply_first_block_cache` does not.
    """
    registries = (module.__dict__.get("_diffusers_hook") for module in transformer.modules())
    return any(
        hook._is_stateful and not isinstance(hook, Listener)
        for registry in registries
        if registry is not None
        for hook in registry.hooks.values()
    )


def may_be_made_up(transformer: nn.Module, engine: Engine) -> bool:
    """Whether a step cache has yet to decide, and tell the engine, if this forward is computed."""
    registry = transformer.__dict__.get("_diffusers_hook")
    hooks = () if registry is None else registry.hooks.values()
    return any(hook.decides_for(engine) for hook in hooks if hasattr(hook, "decides_for"))


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class Listener(ModelHook):
    """Hears the pipeline's `cache_context`, which diffusers tells stateful hooks only.

    It takes the first place in the registry's order without wrapping `forward`: diffusers never relinks what
    is below the first place when another hook is removed.
    """

    _is_stateful = True

    def __init__(self, trajectory: Trajectory, name: str = LISTENER) -> None:
        super().__init__()
        self.trajectory, self.name = trajectory, name
        self.contexts = StateManager(_NoState)

    def context(self) -> Context:
        heard = self.contexts._context
        return Context() if heard is None else Context(heard.name, getattr(heard, "step_index", None))

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by pipelines at their end."""
        self.contexts.reset()
        self.trajectory.begin()
        return module

    def join(self, module: nn.Module) -> None:
        self._made_registry = not hasattr(module, "_diffusers_hook")
        registry = HookRegistry.check_if_exists_or_initialize(module)
        self.fn_ref = HookFunctionReference()
        registry.hooks[self.name] = self
        registry._hook_order.insert(0, self.name)
        registry._fn_refs.insert(0, self.fn_ref)

    def part(self, module: nn.Module) -> None:
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None or registry.hooks.get(self.name) is not self:
            return
        place = registry._hook_order.index(self.name)
        del registry.hooks[self.name], registry._hook_order[place], registry._fn_refs[place]
        if self._made_registry and not registry.hooks:
            del module._diffusers_hook
