"""`dit-accel bench`: dense and presets side by side, and the report of what that costs and gives."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.bench.gains import STRICT
from dit_accel.bench.results import Results
from dit_accel.bench.store import check_folder
from dit_accel.cli import options
from dit_accel.cli import request as requests
from dit_accel.errors import UsageError
from dit_accel.pipelines.video import IMAGE_SUFFIXES, SUFFIXES, check_writable
from dit_accel.preset import Preset
from dit_accel.presets import shipped_models

ROUNDS = 5
_TAKEN = re.compile(r"dense(\b.*)?")  # names of what is measured beside the presets


@dataclass(frozen=True)
class Asked:
    """One `bench` command, resolved."""

    request: requests.Request  # the first preset's; its prompts are empty where held-out ones are to be taken
    presets: tuple[Preset, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    rounds: int
    fewer_steps: str
    random_weights: bool
    folder: Path


def bench(
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"The preset that is asked about; not a dense one (default: {requests.PRESET}).",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another preset beside it, at the first one's size and steps. Repeatable.", metavar="PRESET"),
    ] = None,
    prompt: options.Prompt = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", "--prompts-file", help="A text file with one prompt a line; # starts a remark."),
    ] = None,
    negative_prompt: options.NegativePrompt = None,
    image: options.Image = None,
    seeds: Annotated[str, typer.Option(help="Seeds of every prompt.", metavar="N,N")] = "1",
    rounds: Annotated[
        int, typer.Option(help="Timed runs of each; more where there are more clips. Fewer than 5 have no spread.")
    ] = ROUNDS,
    fewer_steps: Annotated[
        str,
        typer.Option(
            help="Dense with fewer steps, the rival at equal time: auto finds how many; N,N says it.",
            metavar="auto|N,N|off",
        ),
    ] = "auto",
    model: options.Model = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The model's weights are random: say nothing about quality.")
    ] = False,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    lora: options.Lora = None,
    set_: options.Set = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="A folder: new, empty, or of an earlier bench (default: outputs/bench-PRESET/).",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted bench in that folder stopped.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results on stdout, not the table.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure presets against dense, and write a report.

    Everything runs in turns on one loaded pipeline: dense by the quickest kernel here, each preset, dense again by
    another kernel, and dense with as many steps as take the preset's time. The folder holds one page to look at,
    results.json, and every clip; results.json is written after each clip, and --resume goes on from it.
    """
    shared = dict(
        model=model,
        prompt=prompt if prompt is not None or prompts_file is not None else "",
        prompts_file=prompts_file,
        image=image,
        machine=dict(device=device, dtype=dtype, offload=offload, lora=tuple(lora or ())),
        settings=set_ or (),
        size=size,
    )
    values = dict(frames=frames, steps=steps, guidance=guidance, negative_prompt=negative_prompt)
    first = requests.build(preset=preset, generate=values, seed=0, **shared)
    if prompt is None and prompts_file is None and first.preset.model not in shipped_models():
        raise UsageError(
            f"give --prompt TEXT or --prompts FILE: only shipped models have prompts of their own, not "
            f"{first.preset.model}"
        )
    presets = (first.preset, *(_beside(first.preset, name, shared) for name in against or ()))
    _check_presets(presets)
    if rounds < 1:
        raise UsageError(f"--rounds {rounds}: at least 1 is needed, {ROUNDS} for a spread worth the name")
    folder = first.outputs[0].parent.with_name(f"bench-{first.preset.name}") if out is None else out.expanduser()
    makes = first.recipe.MAKES
    suffix = ".png" if makes == "image" else ".mp4"
    earlier = check_folder(folder, resume=resume)
    check_writable(folder / f"clip{suffix}", IMAGE_SUFFIXES if makes == "image" else SUFFIXES)
    own = prompt is None and prompts_file is None
    asked = Asked(
        request=replace(first, prompts=() if own else first.prompts),
        presets=presets,
        settings=tuple(set_ or ()),
        seeds=_numbers("--seeds", seeds, 0, 2**63 - 1),
        rounds=rounds,
        fewer_steps=_check_fewer(fewer_steps, first.preset.generate.steps),
        random_weights=random_weights,
        folder=folder,
    )
    request, model_folder = requests.prepare(asked.request)
    sizes = {name: getattr(request.preset.generate, name) for name in ("width", "height")}
    presets = (request.preset, *(_sized(one, sizes) for one in presets[1:]))
    from dit_accel.cli.benching import run

    results, page = run(
        replace(asked, request=request, presets=presets),
        model_folder,
        earlier,
        resume=resume,
        quiet=quiet,
        verbose=verbose,
    )
    _show(results, page, as_json)
    return _exit_code(results)


def _beside(first: Preset, name: str, shared: dict) -> Preset:
    """Another preset, with the first one's model, size, steps and guidance: they are compared, not these."""
    told = first.to_dict()["generate"]
    values = {key: value for key, value in told.items() if value is not None}
    other = requests.build(preset=name, generate=values, seed=0, **{**shared, "model": first.model, "size": None})
    if other.preset.pipeline != first.pipeline:
        raise UsageError(
            f"--against {name} is for {other.preset.pipeline}, and {first.name} for {first.pipeline}: both must be for "
            "one model"
        )
    return other.preset


def _sized(preset: Preset, sizes: dict[str, int]) -> Preset:
    """A preset at the size that was settled with the picture."""
    return preset.with_values({f"generate.{name}": value for name, value in sizes.items()}, "cli")


def _check_presets(presets: Sequence[Preset]) -> None:
    for preset in presets:
        if preset.is_stock:
            raise UsageError(f"preset {preset.name!r} is dense, and dense is measured anyway; choose a fast one")
        if _TAKEN.fullmatch(preset.name):
            raise UsageError(f"preset {preset.name!r}: what is dense has this name in a report; rename the preset")
    names = [preset.name for preset in presets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"preset {twice[0]!r} is asked for twice; give each once")


def _numbers(option: str, text: str, least: int, most: int) -> tuple[int, ...]:
    """Whole numbers with commas between them, each once."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers) or not all(least <= n <= most for n in numbers):
        raise UsageError(f"{option} {text}: whole numbers from {least} to {most}, each once, as 1,2")
    return numbers


def _check_fewer(text: str, steps: int) -> str:
    if text in ("auto", "off"):
        return text
    if steps < 2:
        raise UsageError(f"--fewer-steps {text}: {steps} step is the fewest that there are; give auto or off")
    return ",".join(map(str, sorted(_numbers("--fewer-steps auto, off or", text, 1, steps - 1))))


def _show(results: Results, page: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results.to_dict(), indent=2))
        return
    from dit_accel.cli.bench_table import table_of
    from dit_accel.cli.terminal import tables

    console = tables()
    console.print(table_of(results))
    console.print(results.verdict, markup=False, soft_wrap=True)
    print(page)


def _exit_code(results: Results) -> int:
    """0, or that of the worst check that failed."""
    if not results.problems:
        return 0
    return 4 if any(STRICT in problem for problem in results.problems) else 1
