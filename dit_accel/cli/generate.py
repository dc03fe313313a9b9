"""`dit-accel generate`: text in, a video or an image out, and what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import options
from dit_accel.cli import request as requests
from dit_accel.cli.terminal import remark, tables
from dit_accel.errors import EnvironmentProblem, UsageError


def generate(
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"A name, FILE.toml or FILE.toml#NAME (default: {requests.PRESET}).", show_default=False
        ),
    ] = None,
    prompt: options.Prompt = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line; # starts a remark.")
    ] = None,
    negative_prompt: options.NegativePrompt = None,
    image: options.Image = None,
    model: options.Model = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    count: Annotated[
        int, typer.Option(help="So many of each prompt, with seeds SEED, SEED + 1, and so on.")
    ] = 1,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    lora: options.Lora = None,
    sla: options.Sla = None,
    set_: options.Set = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="FILE.mp4, .gif or .png (images: .png), or a folder (default: outputs/PRESET-SEED/).",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every value and its source; needs no weights.")
    ] = False,
    compare_dense: Annotated[
        bool,
        typer.Option(
            "--compare-dense", help="Run dense too, with the same seed; report time ratio and PSNR."
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail (exit 4) rather than fall back to dense unplanned.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's record on stdout.")] = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Keep prompt and settings out of the file.")
    ] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make videos or images from text, or videos from a first picture and text.

    Their paths go to stdout, everything else to stderr. Beside them lies run.json: versions, every value
    with its source, timings and the report of what really ran.
    """
    request = requests.build(
        preset=preset,
        model=model,
        prompt=prompt,
        prompts_file=prompts_file,
        image=image,
        count=count,
        generate=dict(
            frames=frames, steps=steps, guidance=guidance, fps=fps, negative_prompt=negative_prompt
        ),
        machine=dict(device=device, dtype=dtype, offload=offload, lora=tuple(lora or ())),
        settings=set_ or (),
        sla=sla,
        size=size,
        seed=seed,
        strict=strict,
        output=output,
    )
    if compare_dense and request.preset.is_stock:
        raise UsageError(
            f"--compare-dense: preset {request.preset.name!r} is dense already; choose a fast one"
        )
    if dry_run:
        _show(request, as_json)
        return
    requests.check_outputs(request, compare_dense)
    request, folder = requests.prepare(request)
    from dit_accel.cli.run import run

    record = run(
        request,
        folder,
        compare_dense=compare_dense,
        metadata=not no_metadata,
        print_files=not as_json,
        quiet=quiet,
        verbose=verbose,
    )
    if as_json:
        print(json.dumps(record, indent=2))


def _show(request: requests.Request, as_json: bool) -> None:
    try:
        request, found = requests.settle(request, download=False)
    except EnvironmentProblem as problem:
        found = None
        remark(
            f"note: {problem}; {'sizes and --image' if request.image else 'sizes'} are checked once the model is there"
        )
    if as_json:
        print(
            json.dumps({**request.to_dict(), "model_folder": None if found is None else str(found)}, indent=2)
        )
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("value", "set to", "source", title="dry run: nothing is generated", title_justify="left")
    for row in request.rows():
        table.add_row(*(escape(cell) for cell in row))
    tables().print(table)
