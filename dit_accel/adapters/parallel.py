"""Context parallelism: diffusers splits the sequence over processes, and sparse attention still sees all of it.

Under Ulysses each process holds a run of the tokens with all heads. diffusers' all-to-all turns that into all tokens
with a share of the heads and back, and what attends in between may as well be sparse: heads do not know of each other.
So a process predicts, remembers and counts for its own heads, and no plan ever travels.

Region sampling (`dit_accel.region`) takes its tokens out before the sequence is split, and keeps the keys of all tokens
for the heads of the process. Every process sees the whole velocity, so each could choose the next tokens for itself;
they take those of the first one all the same (`as_first`), for a choice that differed in one token would mix up rows.

Two things must be seen to. diffusers hands modules whose output is split an output hook that stands before any of
ours, so that a rotary table arrives here in parts (`reorder`). And which calls are sparse must be the same on every
process; it follows from the forward's arguments alone, which all have in common.

Ring attention gives a process all heads of its own queries and the keys of one other at a time: no block plan fits
that, and such forwards are dense, with a reason. So are those of models with text in the same sequence, where the
all-to-all brings text and video of one process, then text and video of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.models import attention_dispatch as host
from diffusers.models._modeling_parallel import ContextParallelOutput
from torch import Tensor, nn
from torch import distributed as dist

from dit_accel.errors import UsageError
from dit_accel.layout import TokenLayout

# Attends to whole sequences: query, key and value [B, S, heads of this process, D], and the first of these heads.
AttendWhole = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def config_of(owner: Any) -> Any | None:
    """diffusers' `ParallelConfig` of a processor or a transformer if it is one of context parallelism, else None."""
    config = getattr(owner, "_parallel_config", None)
    return None if getattr(config, "context_parallel_config", None) is None else config


def check_processors(transformer: nn.Module, processors: Iterable[Any]) -> None:
    """See that what attends knows of the split, or knows of none where there is none.

    Args:
        processors: the stock processors of the self-attentions, or what was set in place of ours.

    Raises:
        UsageError: some do not. They would attend within one process's part of the sequence, and nothing would tell.
    """
    config, processors = config_of(transformer), list(processors)
    strangers = sum(config_of(processor) is not config for processor in processors)
    if strangers:
        state = "off" if config is None else "on"
        raise UsageError(
            f"Context parallelism is {state} for this {type(transformer).__name__}, but {strangers} of its "
            f"{len(processors)} self-attentions have processors that know otherwise, and would attend to the wrong "
            "tokens. Set processors of your own before `enable_parallelism`; a SparseProcessor may come before or "
            "after it."
        )


def why_dense(transformer: nn.Module, adapter: ModuleType, text: int) -> str | None:
    """Why sparse attention is not exact where this transformer's sequence is split, or None if it is.

    Args:
        adapter: of its family.
        text: text tokens that take part in self-attention.
    """
    config = config_of(transformer)
    if config is None:
        return None
    if config.context_parallel_config.ring_degree > 1:
        return "context parallelism by ring attention"
    if text:
        return "context parallelism mixes text and video"
    if type(transformer).__name__ not in getattr(adapter, "PARALLEL", ()):
        return f"context parallelism is not proven for {type(transformer).__name__}"
    if _splits(transformer) != _splits_of_plan(type(transformer)._cp_plan):
        return "context parallelism by another plan than the model's own"
    return None


def tokens_here(n_tokens: int, processor: Any) -> int:
    """How many of so many tokens this process holds; all of them if the processor knows of no split."""
    config = config_of(processor)
    if config is None:
        return n_tokens
    split = config.context_parallel_config
    share, more = divmod(n_tokens, split.ulysses_degree)
    return share + (split._ulysses_local_rank < more)


def heads_here(transformer: nn.Module, heads: int) -> int:
    """The most of so many heads that one process attends with; all of them if there is no split."""
    config = config_of(transformer)
    return heads if config is None else math.ceil(heads / config.context_parallel_config.ulysses_degree)


def shares_of(transformer: nn.Module, n_tokens: int) -> int | None:
    """How many processes would share so many tokens, and cannot; None if they can, or there is no split."""
    config = config_of(transformer)
    if config is None:
        return None
    split = config.context_parallel_config
    return split.ulysses_degree if n_tokens % split.ulysses_degree and not split.ulysses_anything else None


def as_first(transformer: nn.Module, chosen: Tensor) -> Tensor:
    """What the first of the processes chose that share this transformer's sequence: the same on all of them.

    Every process has the whole velocity and chooses for itself, but devices of two kinds may round it to two sides of a
    tie. All must call this together.
    """
    config = config_of(transformer)
    if config is None:
        return chosen
    group, chosen = config.context_parallel_config._ulysses_mesh.get_group(), chosen.contiguous()
    dist.broadcast(chosen, dist.get_global_rank(group, 0), group)
    return chosen


def least(transformer: nn.Module, number: int, device: torch.device) -> int:
    """The least of the numbers that the processes have which share this transformer's sequence. All must call it."""
    config = config_of(transformer)
    if config is None:
        return number
    found = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN, config.context_parallel_config._ulysses_mesh.get_group())
    return int(found)


def attend_whole(
    processor: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, attend: AttendWhole
) -> Tensor:
    """Attend to whole sequences, exchanging heads for tokens before and tokens for heads behind it if need be.

    Args:
        processor: the stock processor, which knows of the split.
        query: `[B, S of this process, H, D]`, as are key, value and the result.
        attend: what attends; its result has its query's shape.
    """
    config = config_of(processor)
    if config is None:
        return attend(query, key, value, 0)
    split = config.context_parallel_config
    first_head = split._ulysses_local_rank * math.ceil(query.shape[2] / split.ulysses_degree)

    def forward_op(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return attend(query, key, value, first_head)

    return host._templated_context_parallel_attention(
        query, key, value, scale=scale, forward_op=forward_op, backward_op=None, _parallel_config=config
    )


def reorder(
    module: nn.Module, output: Any, order: Callable[[Any, TokenLayout], Any], layout: TokenLayout
) -> Any:
    """Bring what a module gave out into another order: where it is split, all of it, and split it again.

    Whatever is gathered here is small (a rotary table); token maps are whole where adapters reorder them.
    """
    hook = _output_split(module)
    if hook is None:
        return order(output, layout)
    parts = [hook.metadata.get(index) for index in range(len(output))]
    gathers = [
        ContextParallelOutput(part.split_dim) if part and part.expected_dims in (None, x.dim()) else None
        for x, part in zip(output, parts, strict=True)
    ]
    whole = ContextParallelGatherHook(gathers, hook.parallel_config).post_forward(module, output)
    return hook.post_forward(module, order(whole, layout))


def _output_split(module: nn.Module) -> ContextParallelSplitHook | None:
    """The hook by which diffusers splits a module's output, which is a tuple then."""
    for hook in _hooks(module):
        if isinstance(hook, ContextParallelSplitHook) and any(isinstance(key, int) for key in hook.metadata):
            return hook
    return None


def _hooks(module: nn.Module) -> list[Any]:
    registry = module.__dict__.get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks.values())


def _splits(transformer: nn.Module) -> dict[str, Any]:
    """What diffusers splits and gathers in this transformer, by the name of its hooks."""
    found = {}
    for module in transformer.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for name, hook in () if registry is None else registry.hooks.items():
            if isinstance(hook, ContextParallelSplitHook | ContextParallelGatherHook):
                found[name.rpartition("---")[2]] = hook.metadata
    return found


def _splits_of_plan(plan: dict[str, Any] | None) -> dict[str, Any]:
    return {
        name: [part] if isinstance(part, ContextParallelOutput) else part
        for name, part in (plan or {}).items()
    }
