"""How a cache comes between a transformer and its work: hooks of diffusers, on the transformer and on its blocks.

A step that is made up must not run, and torch's own hooks cannot prevent a forward. `ModelHook.new_forward` can, in the
registry that every transformer of diffusers has, whether or not it knows `enable_cache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from dit_accel.caches.boundaries.modules import ModuleBoundary, Site
    from dit_accel.caches.boundaries.stack import StackBoundary
    from dit_accel.caches.engine import CacheEngine
    from dit_accel.engine import Engine

ROOT, BLOCK = "dit_accel_cache", "dit_accel_cache_block"  # names in diffusers' hook registries
_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")  # where transformers have their blocks, in order


class RootHook(ModelHook):
    """Around the whole forward."""

    def __init__(self, engine: CacheEngine) -> None:
        super().__init__()
        self.engine = engine

    def decides_for(self, sparse: Engine) -> bool:
        """Whether it tells this engine of each forward if it is computed or made up (see `hooks.may_be_made_up`)."""
        return self.engine.cache.boundary == "call" and self.engine.sparse is sparse

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.engine.run(self.fn_ref.original_forward, args, kwargs)


class BlockHook(ModelHook):
    """Around one block."""

    # Tokens may be used in another forward: sparse attention then keeps one order for all (`hooks.keeps_tokens`).
    _is_stateful = True

    def __init__(self, stack: StackBoundary, index: int, form: Form) -> None:
        super().__init__()
        self.stack, self.index, self.form = stack, index, form

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = self.form.arguments(args, kwargs)
        return self.stack.pass_block(self, module, lambda: self.fn_ref.original_forward(*args, **kwargs), given)

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module  # the clock tells the engine of a run's end


class ModuleHook(ModelHook):
    """Around one attention or MLP of a block."""

    _is_stateful = True  # as a BlockHook is

    def __init__(self, modules: ModuleBoundary, site: Site) -> None:
        super().__init__()
        self.modules, self.site = modules, site

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.modules.pass_module(self.site, self.fn_ref.original_forward, args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


@dataclass(frozen=True)
class Form:
    """What a kind of block is given and gives, as diffusers registers it."""

    names: tuple[str, ...]  # of the forward's arguments
    hidden_name: str
    encoder_name: str
    hidden_index: int
    encoder_index: int | None  # None: it gives no text tokens, and then the tensor alone

    @classmethod
    def of(cls, block: nn.Module) -> Form:
        """Raises UsageError for a block that diffusers does not describe."""
        try:
            told = TransformerBlockRegistry.get(type(block))
        except ValueError:
            raise UsageError(
                f"diffusers does not say what a {type(block).__name__} gives, so this cache cannot leave blocks out. "
                "Use one that keeps whole steps: easy or latent."
            ) from None
        names = tuple(inspect.signature(type(block).forward).parameters)[1:]
        return cls(
            names,
            told.hidden_states_argument_name,
            told.encoder_hidden_states_argument_name,
            told.return_hidden_states_index,
            told.return_encoder_hidden_states_index,
        )

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def read(self, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Tokens of image or video, and of text where the block gives these too."""
        return given[self.hidden_name], None if self.encoder_index is None else given.get(self.encoder_name)

    def split(self, output: Any) -> tuple[Tensor, Tensor | None]:
        if self.encoder_index is None:
            return output, None
        return output[self.hidden_index], output[self.encoder_index]

    def join(self, hidden: Tensor, encoder: Tensor | None) -> Any:
        if self.encoder_index is None:
            return hidden
        return (hidden, encoder) if self.hidden_index == 0 else (encoder, hidden)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Its blocks, in order of use.

    Raises:
        UsageError: none are found.
    """
    found = [block for name in _LISTS for block in getattr(transformer, name, None) or ()]
    if not found:
        raise UsageError(
            f"{type(transformer).__name__} has no list of blocks that is known ({', '.join(_LISTS)}), so this cache "
            "cannot leave any out. Use one that keeps whole steps: easy or latent."
        )
    return found


def forms_of(blocks: list[nn.Module]) -> list[Form]:
    """The form of each block.

    Raises:
        UsageError: blocks that are not described, or that mix text in at some point, so that nothing added up over all
            of them fits their ends.
    """
    forms = [Form.of(block) for block in blocks]
    if len({form.encoder_index is None for form in forms}) > 1:
        kinds = sorted({type(block).__name__ for block in blocks})
        raise UsageError(
            f"{' and '.join(kinds)} pass on different tokens, so this cache cannot leave them out as one. Use one that "
            "keeps whole steps: easy or latent."
        )
    return forms


def set_hook(module: nn.Module, hook: ModelHook, name: str) -> Callable[[], None]:
    """Register a hook, and return what takes it away."""
    had = hasattr(module, "_diffusers_hook")
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)

    def remove() -> None:
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None or registry.hooks.get(name) is not hook:
            return
        registry.remove_hook(name, recurse=False)
        own = module.__dict__.get("forward")
        if getattr(own, "__func__", None) is type(module).forward:
            del module.forward  # diffusers leaves the class's function behind as the module's own
        if not had and not registry.hooks:
            del module._diffusers_hook

    return remove
