"""`dit-accel generate`: text in, a video out, and what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import request as requests
from dit_accel.cli.terminal import remark, tables
from dit_accel.errors import EnvironmentProblem, UsageError

_PRESET = "tiny-wan-fast"


def generate(
    preset: Annotated[
        str | None,
        typer.Option(help=f"A name, FILE.toml or FILE.toml#NAME (default: {_PRESET}).", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the video shall show.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line; # starts a remark.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it shall not show.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Shipped name, folder or hub id; overrides the preset's model.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Width and height in pixels.", metavar="WxH")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 turns it off and halves the time.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise; drawn and printed if left out.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: float32 on a CPU, else bfloat16.")
    ] = "auto",
    offload: Annotated[str, typer.Option(help="none, model or group: what waits in main memory.")] = "none",
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA .safetensors as FILE or FILE=STRENGTH. Repeatable.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any option of the preset, as sparse.keep=0.3. Repeatable.", metavar="KEY=VALUE"
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="FILE.mp4, .gif or .png, or a folder (default: outputs/PRESET-SEED/).",
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
        bool, typer.Option("--no-metadata", help="Keep prompt and settings out of the video file.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="The whole report, libraries' messages, tracebacks.")
    ] = False,
) -> None:
    """Make videos from text.

    The clips' paths go to stdout, everything else to stderr. Beside them lies run.json: versions, every value
    with its source, timings and the report of what really ran.
    """
    request = requests.build(
        preset=preset or _PRESET,
        preset_given=preset is not None,
        prompt=prompt,
        prompts_file=prompts_file,
        values={
            "model": model,
            "generate.frames": frames,
            "generate.steps": steps,
            "generate.guidance": guidance,
            "generate.fps": fps,
            "generate.negative_prompt": negative_prompt,
        },
        settings=set_ or (),
        size=size,
        strict=strict,
        seed=seed,
        output=output,
        machine={
            "device": (device, device != "auto"),
            "dtype": (dtype, dtype != "auto"),
            "offload": (offload, offload != "none"),
            "lora": (tuple(lora or ()), bool(lora)),
        },
    )
    if compare_dense and request.preset.sparse is None:
        raise UsageError(
            f"--compare-dense: preset {request.preset.name!r} is dense already; choose a fast one"
        )
    if dry_run:
        _show(request, as_json)
        return
    requests.check_outputs(request, compare_dense)
    folder = _check_model(request, download=True)
    # torch and diffusers come in here; whatever could be refused without them has been.
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(f"{error}: pip install 'dit-accel[diffusers]'") from error
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


def _check_model(request: requests.Request, *, download: bool) -> Path:
    from dit_accel.pipelines import wan

    folder = wan.find(request.preset.model, download=download)
    options = request.preset.generate
    wan.size_rule(folder).check(options.width, options.height, options.frames)
    return folder


def _show(request: requests.Request, as_json: bool) -> None:
    try:
        found = str(_check_model(request, download=False))
    except EnvironmentProblem as problem:
        found = None
        remark(f"note: {problem}; sizes are checked once the model is there")
    if as_json:
        print(json.dumps({**request.to_dict(), "model_folder": found}, indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("value", "set to", "source", title="dry run: nothing is generated", title_justify="left")
    for row in request.rows():
        table.add_row(*(escape(cell) for cell in row))
    tables().print(table)
