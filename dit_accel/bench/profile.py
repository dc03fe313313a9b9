"""Where the time of a generation goes. Clocks around every part slow it, so that no timed run has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel import accelerate
from dit_accel.bench.results import Breakdown
from dit_accel.bench.stopwatch import Stopwatch, timed
from dit_accel.errors import DitAccelError
from dit_accel.handle import Handle
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset
from dit_accel.roles import ROLES

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Seen:
    """Seconds of the parts of one generation, and what its attention is like."""

    whole: float
    text_encoder: float
    transformer: float
    attention: float
    vae_decode: float
    forwards: int  # of transformers
    shape: tuple[int, int, int, int]  # of the first self-attention's queries `[B, S, H, D]`
    grid: tuple[int, int, int]  # its tokens of video: frames, rows, columns
    attended: int  # tokens that meet in it, text included


def profile(pipe: Any, preset: Preset | None, generate: Callable[[], Any]) -> Seen:
    """One generation with clocks around its parts.

    Attention is timed where diffusers' dispatcher hands it over, for dense as for sparse: the dense run attends through
    the same place, by diffusers' own backend.

    Args:
        preset: None profiles stock diffusers.
        generate: makes one clip.

    Raises:
        DitAccelError: no self-attention ran.
    """
    device = pipe._execution_device
    watch = Stopwatch(device)
    with _installed(pipe, preset) as handle, contextlib.ExitStack() as stack:
        first = _watch_attention(handle, watch, stack)
        for name, modules in (("text", _TEXT_ENCODERS), ("transformer", ROLES)):
            for part in modules:
                module = getattr(pipe, part, None)
                if isinstance(module, nn.Module):
                    _watch_module(module, name, watch, stack)
        _replace(pipe.vae, "decode", timed(pipe.vae.decode, watch, "vae"), stack)
        start = watch.now()
        generate()
        watch.note("whole", start)
    if not first:
        raise DitAccelError(f"no self-attention of {type(pipe).__name__} ran, so there is nothing to measure")
    laps = watch.read()
    seconds = {name: sum(laps.get(name, ())) / 1e3 for name in ("whole", "text", "transformer", "attention", "vae")}
    return Seen(
        whole=seconds["whole"],
        text_encoder=seconds["text"],
        transformer=seconds["transformer"],
        attention=seconds["attention"],
        vae_decode=seconds["vae"],
        forwards=len(laps.get("transformer", ())),
        **first,
    )


def break_down(seen: Seen, median: float) -> Breakdown:
    """The shares of a profiled run, of the seconds of a median one."""
    scale = median / seen.whole
    parts = {
        "text_encoder": seen.text_encoder,
        "attention": seen.attention,
        "rest_of_transformer": seen.transformer - seen.attention,
        "vae_decode": seen.vae_decode,
        "other": seen.whole - seen.text_encoder - seen.transformer - seen.vae_decode,
    }
    return Breakdown(**{name: part * scale for name, part in parts.items()}, profiled_seconds=seen.whole)


def _installed(pipe: Any, preset: Preset | None) -> Handle:
    """The preset on the pipeline, with an engine on every transformer in any case: attention is timed there."""
    # Dense at every noise level: what was planned dense is diffusers' own.
    stock = SparseOptions.from_mapping({"method": "pooled", "keep": 1.0, "dense_above": 0.0})
    if preset is None:
        return accelerate(pipe, stock)
    if preset.sparse is None:
        return accelerate(pipe, stock, cache=preset.cache or False, region=preset.region or False)
    return accelerate(pipe, preset)


def _watch_attention(handle: Handle, watch: Stopwatch, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Clocks around the self-attentions.

    Returns:
        A table that is filled at the first one: shape, grid and attended, of `Seen`.
    """
    first: dict[str, Any] = {}
    for engine in handle.engines:
        attend = timed(engine.attend, watch, "attention")

        def run(seat: Any, query: torch.Tensor, *args: Any, attend: Any = attend, engine: Any = engine, **call: Any):
            if not first and engine.call is not None:
                segments = engine.call.segments
                first.update(shape=tuple(query.shape), grid=tuple(engine.call.grid), attended=segments[-1][2])
            return attend(seat, query, *args, **call)

        _replace(engine, "attend", run, stack)
    return first


def _watch_module(module: nn.Module, name: str, watch: Stopwatch, stack: contextlib.ExitStack) -> None:
    started: list[Any] = []

    def enter(*_: Any) -> None:
        started.append(watch.now())

    def leave(*_: Any) -> None:
        watch.note(name, started.pop())

    stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _replace(owner: Any, name: str, value: Any, stack: contextlib.ExitStack) -> None:
    """Put a function in a method's place on one object, until the stack closes."""
    before = vars(owner).get(name)

    def restore() -> None:
        vars(owner).pop(name, None)
        if before is not None:
            vars(owner)[name] = before

    vars(owner)[name] = value
    stack.callback(restore)
