"""`dit-accel estimate`: what a preset should gain on a GPU, told without weights, without a GPU and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

import typer

from dit_accel.cli import options
from dit_accel.cli.request import parse_size
from dit_accel.cli.terminal import remark, tables
from dit_accel.errors import UsageError
from dit_accel.estimate import Estimate, Gpu, find_gpu, gpu_names, own_gpu
from dit_accel.estimate import estimate as estimate_preset
from dit_accel.estimate.gpus import MEASURED
from dit_accel.preset import load_preset
from dit_accel.settings import parse_setting

Row = tuple[str, str, str]  # what, figure, where it comes from


def estimate(
    preset: Annotated[str, typer.Option(help="A name, FILE.toml or FILE.toml#NAME.")],
    model: options.Model = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    gpu: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(gpu_names())} (default: {MEASURED}).", show_default=False)
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Instead of --gpu: published TFLOP/s, dense, bfloat16.", show_default=False)
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Beside --tflops: GB/s.", show_default=False)] = None,
    memory: Annotated[float | None, typer.Option(help="Beside --tflops: GB.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    keep: Annotated[
        float | None,
        typer.Option(help="Share of the key blocks, for a method that says none beforehand.", show_default=False),
    ] = None,
    reused: Annotated[
        int | None, typer.Option(help="Steps that the preset's cache makes up, as a run reports.", show_default=False)
    ] = None,
    set_: options.Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell what a preset should gain: tokens, the share of attention, times and memory.

    Counts the model's operations from its configuration and divides them by rates measured on an H200; other GPUs are
    scaled by their published peaks. Needs no weights and no GPU.
    """
    chosen = load_preset(preset)
    given = dict(parse_setting(text) for text in set_ or ())
    flags = {
        "model": model,
        "generate.frames": frames,
        "generate.steps": steps,
        "generate.guidance": guidance,
    }
    given |= {name: value for name, value in flags.items() if value is not None}
    if size is not None:
        given["generate.width"], given["generate.height"] = parse_size(size)
    if given:
        chosen = chosen.with_values(given, "cli")
    told = estimate_preset(chosen, _gpu(gpu, tflops, bandwidth, memory), dtype=dtype, keep=keep, reused=reused)
    if as_json:
        print(json.dumps(told.to_dict(), indent=2))
        return
    _print(told)
    for note in told.notes:
        remark(f"note: {note}", quiet=quiet)


def _gpu(name: str | None, tflops: float | None, bandwidth: float | None, memory: float | None) -> Gpu:
    own = {"--tflops": tflops, "--bandwidth": bandwidth, "--memory": memory}
    missing = [flag for flag, value in own.items() if value is None]
    if len(missing) == len(own):
        return find_gpu(MEASURED if name is None else name)
    if missing:
        raise UsageError(f"{missing[0]} is missing: a GPU of one's own needs --tflops, --bandwidth and --memory")
    if name is not None:
        raise UsageError(f"--gpu {name} and --tflops {tflops:g}: give one or the other")
    return own_gpu(tflops, bandwidth, memory)


def _print(told: Estimate) -> None:
    from rich.markup import escape
    from rich.table import Table

    width, height, frames = told.size
    clip = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")
    title = f"{told.preset}: {told.model}, {clip}, {told.steps} steps, on {told.gpu.name} (rates {told.gpu.how})"
    table = Table("", "estimate", "from", title=escape(title), title_justify="left")
    sections = _work_rows(told), _time_rows(told), _memory_rows(told)
    for rows in sections:
        for row in rows:
            table.add_row(*map(escape, row))
        table.add_section()
    tables().print(table)
    for line in _verdicts(told):
        print(line)


def _work_rows(told: Estimate) -> Iterable[Row]:
    f, h, w = told.grid
    yield "tokens of video or image", f"{told.tokens:,} ({f} x {h} x {w})", "computed"
    yield "tokens of text", f"{told.text:,}", told.architecture
    of_step = f"{told.forwards_a_step} of {told.batch} row{'s' if told.batch > 1 else ''}"
    yield "forwards a step", of_step, "computed"
    total = sum(told.flops.values())
    yield "a dense forward computes", f"{total / 1e12:,.1f} TFLOP", "computed"
    for part, flops in sorted(told.flops.items(), key=lambda item: -item[1]):
        if flops >= 0.005 * total:
            yield f"  {part}", f"{flops / total:.0%}", "computed"
    if told.keep is not None:
        yield "keys that a sparse call reads", f"{told.keep:.1%}", "computed"
        yield "sparse steps", f"{told.sparse_steps} of {told.steps}", "computed"


def _time_rows(told: Estimate) -> Iterable[Row]:
    how = "rates measured" if told.gpu.measured else "rates scaled, not measured"
    yield "dense forward", _ms(told.dense.total), how
    yield "  of it self-attention", f"{told.dense.attention_share:.0%}", how
    if told.fast is not None:
        yield "sparse forward", f"{_ms(told.fast.total)}, {told.forward_gain:.2f}x", how
        yield "  a sparse layer's attention", f"{told.attention_gain:.2f}x", how
        yield "  of it self-attention", f"{told.fast.attention_share:.0%}", how
        yield "  of it predicting plans", _ms(told.fast.plan), how
    if told.region_ms is not None:
        yield "forward in a region step", f"{_ms(told.region_ms)}, {told.region_steps} of {told.steps} steps", how
    yield "dense generation", _seconds(told.dense_seconds), how
    yield f"{told.preset}'s", f"{_seconds(told.fast_seconds)}, {told.gain:.2f}x", how
    if told.region_ms is not None or told.reusable_steps is not None:
        yield "  sparse attention alone", f"{told.sparse_gain:.2f}x", how
    if told.region_ms is not None:
        yield "  region sampling, times", f"{told.region_gain:.2f}x", how
    if told.reusable_steps is not None:
        yield "  cache, times", f"{told.cache_gain:.2f}x ({told.reused_steps:g} steps reused)", "as given"
        yield "  a reused step saves", _seconds(told.reused_step_seconds), how


def _memory_rows(told: Estimate) -> Iterable[Row]:
    memory = told.memory
    yield "weights", _gb(memory.weights), "computed"
    yield "a forward's peak above them", _gb(memory.activations), "computed"
    if told.keep is not None:
        yield "layouts and plans", _gb(memory.plans), "computed"
    if told.reusable_steps is not None:
        yield "cache", _gb(memory.cache), "computed"
    if memory.region:
        yield "keys and values of region sampling", _gb(memory.region), "computed"
    room = f"{_gb(memory.total)} of {_gb(told.gpu.memory_gb * 1e9)}"
    yield "all", room + ("" if told.fits else ": DOES NOT FIT"), "computed; the GPU's: published"


def _verdicts(told: Estimate) -> Iterable[str]:
    if not told.fits:
        ways = ["--offload model or --offload group", "fewer frames or a smaller --size"]
        if told.memory.region:
            ways.insert(0, "region.layers or region.keys=drop")
        yield f"does not fit into {told.gpu.name}: try {', '.join(ways)}"
    if told.break_even_tokens is None and told.keep is not None:
        yield "break-even: in this shape a sparse forward gains 5 % at no size up to three times these sides"
    elif told.break_even_tokens:
        fewer = f"{told.break_even_tokens:,} tokens in this shape"
        yield f"break-even: below about {fewer} a sparse forward gains less than 5 %"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2g} MB"
