"""One file per sparse method; the file's name is the method's name.

A method is a frozen dataclass `Method` with

    predict(query, key, layout, call, state) -> BlockPlan

for post-RoPE query and key `[B, S, H, D]` in the layout's order. What it may also have:

- `arrangement`, a class attribute: the token order and block size it was made for, unless others are asked for.
- `needs_grid`, true if it looks at where tokens stand in frame, row and column; where a model's tokens are no one grid
  such a method cannot be used.
- `rows_apart`, true if the plan of a query block follows from its own queries and all keys, so that a part of the
  queries can be planned for: what the plan says of other blocks then is of no matter.
- `init_state(query, layout) -> state`, if it remembers something between steps: it is given that state back for the
  same transformer, branch and layer until the run ends, and None where the branch is not known.
- `threshold_at(call)` and `learn(needed, plan, layout, call, state)`, if the kernel shall tell which entries of the
  plan mattered (`kernels.block_sparse.block_sparse_feedback`).
- `pv_threshold`, an option that the engine hands to the kernel as it is here: what the kernel may leave out of the plan
  (`kernels.block_sparse.block_sparse`). Not for methods that learn.
- `weights_for(transformer, layers, arrangement, role) -> Weights | None`, if it has trained weights: asked once, when
  it is installed, for the self-attentions that are not to stay dense of the pipeline's transformer of that name. It
  touches nothing and raises UsageError where they do not fit. The weights may name layers that are linear attention
  alone; there is no plan for those.
- `compensate(out, query, key, value, plan, call, weights) -> out`, if what is not read is given back by more than the
  plan can say: called behind the executor with `[B, H, S, D]` and those weights or None; it may write over `out` where
  nothing needs gradients. Options that `weights_for` reads stand in `fixed`, a class attribute: rules cannot change
  them.

A plan with `coarse` weights gives back what is not read as mean values of blocks, one with orders of its own brings
each head's tokens into another order for the call. Options that vary with noise level or layer, and plans that serve
several steps, are the planner's business, not a method's. Shared steps live in `parts`.

Method files import torch only inside their functions, so that options can be checked without it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol

from dit_accel.errors import UsageError, unknown_name
from dit_accel.typed import check_fields

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call


class Weights(Protocol):
    """A method's trained weights on one transformer, held by its engine."""

    title: str  # what they add, for the report
    trains: bool  # whether calls that need gradients are sparse too, for the weights' sake
    linear_layers: frozenset[int]  # self-attentions that `attend_linearly` computes, without a plan
    blends: bool  # whether dense attention is computed beside it now, as training may want

    def install(self) -> None:
        """Put in place what they change of the transformer."""

    def show(self, trained: bool, transformer: nn.Module) -> None:
        """Have that in place, or what the transformer had: asked as each forward begins, false for a dense one."""

    def remove(self) -> None:
        """Give the transformer back what it was, exactly; nothing the second time."""

    def bytes_held(self) -> int: ...

    def attend_linearly(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call, softmax: Tensor | None
    ) -> Tensor:
        """Attend in a linear layer; all `[B, H, S, D]`, softmax being dense attention where `blends`."""

    def bytes_working(self, query: Tensor, plan: BlockPlan | None) -> int:
        """What `compensate`, or without a plan `attend_linearly`, takes for a while in a call, query `[B, H, S, D]`."""


class Method(Protocol):
    """What every method offers."""

    def predict(
        self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any
    ) -> BlockPlan: ...


def method_names() -> list[str]:
    """Every method there is, by file name."""
    return list(_files())


@functools.cache  # reading presets asks often, and the package's files stay what they are
def _files() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))


def method_options(name: str) -> set[str]:
    """The options of a method beside `keep` and `top_p`.

    Raises:
        UnknownNameError: no such method.
    """
    return {f.name for f in dataclasses.fields(method_class(name))} - {"keep", "top_p"}


def load_method(name: str, **options: Any) -> Method:
    """Build a method by name; a budget (keep, top_p) given as None counts as not given.

    Raises:
        UnknownNameError: no such method, or an option it does not have.
        UsageError: a value it refuses, or an option missing.
    """
    cls = method_class(name)
    given = {
        key: value for key, value in options.items() if value is not None or key not in ("keep", "top_p")
    }
    known = {f.name for f in dataclasses.fields(cls)}
    for key in given:
        if key not in known:
            raise unknown_name(f"option of method {name!r}", key, known)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in given
    ]
    if missing:
        raise UsageError(f"Method {name!r} needs {', '.join(missing)}: give {missing[0]}=...")
    try:
        method = cls(**given)
    except TypeError:  # it compared what cannot be compared; the check says of which option
        check_fields(cls, given, f"method {name!r}")
        raise
    check_fields(cls, given, f"method {name!r}")
    return method


def method_class(name: str) -> type:
    """The method's class.

    Raises:
        UnknownNameError: no such method.
    """
    if name not in method_names():
        raise unknown_name("method", name, method_names())
    cls = importlib.import_module(f"{__name__}.{name}").Method
    assert inspect.isclass(cls) and dataclasses.is_dataclass(cls)
    return cls
