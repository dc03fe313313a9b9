"""From command line to Request: every value resolved, its source known. No torch before `prepare`."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.pipelines import recipe
from dit_accel.pipelines.pictures import open_picture
from dit_accel.pipelines.video import IMAGE_SUFFIXES, SUFFIXES, check_writable
from dit_accel.preset import Preset, load_preset
from dit_accel.roles import spread
from dit_accel.settings import parse_setting

RECORD = "run.json"
# What stands where nothing else is asked for.
PRESET = "tiny-wan-fast"
MACHINE = {"device": "auto", "dtype": "auto", "offload": "none", "lora": ()}


@dataclass(frozen=True)
class Clip:
    """One video or image of a request."""

    prompt: str
    seed: int
    output: Path


@dataclass(frozen=True)
class Request:
    """Everything one `generate` command asks for."""

    preset: Preset
    prompts: tuple[str, ...]
    seed: int  # of the first of each prompt
    outputs: tuple[Path, ...]  # `count` of each prompt, one after the other
    machine: Mapping[str, Any]  # device, dtype, offload, loras
    sources: Mapping[str, str]  # of prompt, seed, output and the machine's values
    image: Path | None = None  # the picture at which a video begins
    picture_size: tuple[int, int] | None = None  # its width and height
    count: int = 1

    @property
    def recipe(self) -> ModuleType:
        return recipe(self.preset.pipeline)

    @property
    def clips(self) -> tuple[Clip, ...]:
        """What is to be made, in order."""
        seeds = range(self.seed, self.seed + self.count)
        asked = [(prompt, seed) for prompt in self.prompts for seed in seeds]
        return tuple(Clip(*what, output) for what, output in zip(asked, self.outputs, strict=True))

    @property
    def record(self) -> Path:
        """Where run.json goes: beside the clips."""
        return self.outputs[0].parent / RECORD

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, source) of every resolved value."""
        told = self.preset.to_dict()
        rows = [
            ("preset", self.preset.name, self.sources["preset"]),
            ("status", told["status"], self.preset.sources.get("status", "default")),
        ]
        rows += [(key, told[key], self.preset.sources[key]) for key in ("pipeline", "model")]
        first = (
            self.prompts[0]
            if len(self.prompts) == 1
            else f"{len(self.prompts)} prompts, first: {self.prompts[0]}"
        )
        rows += [("prompt", first, self.sources["prompt"]), ("seed", str(self.seed), self.sources["seed"])]
        if self.count > 1:
            rows.append(("count", str(self.count), "cli"))
        if self.image is not None:
            rows.append(("image", "{} ({}x{})".format(self.image, *self.picture_size), "cli"))
        for group in ("generate", "sparse", "cache", "region"):
            for key, value in spread(told[group] or {}):
                rows.append((f"{group}.{key}", show(value), self.preset.sources[f"{group}.{key}"]))
        if told["sparse"] is None:
            rows.append(("sparse", "none: stock dense attention", "default"))
        rows += [(key, show(value), self.sources[key]) for key, value in self.machine.items()]
        last = f" ... {self.outputs[-1].name}" if len(self.outputs) > 1 else ""
        return [*rows, ("output", f"{self.outputs[0]}{last}", self.sources["output"])]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for run.json."""
        return {
            "preset": self.preset.to_dict(),
            "seed": self.seed,
            "count": self.count,
            "prompts": list(self.prompts),
            "image": None
            if self.image is None
            else {"path": str(self.image), "size": list(self.picture_size or ())},
            "machine": dict(self.machine),
            "outputs": [str(path) for path in self.outputs],
            "sources": dict(self.sources),
        }


def show(value: Any) -> str:
    """A value as a person reads it in a table."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def build(
    *,
    preset: str | None,
    model: str | None,
    prompt: str | None,
    prompts_file: Path | None = None,
    image: Path | None = None,
    count: int = 1,
    generate: Mapping[str, Any],
    machine: Mapping[str, Any],
    settings: Sequence[str],
    size: str | None,
    seed: int | None,
    sla: Path | None = None,
    strict: bool = False,
    output: str | None = None,
) -> Request:
    """Resolve a command line. None is a flag that was not given.

    Args:
        generate: values of dedicated flags, by their names in the preset's table of that name.
        machine: device, dtype, offload and loras.
        image: a picture; its file is read here.
        count: so many of each prompt.
        settings: texts of `--set`; a dedicated flag wins over them.
        sla: a side file of trained weights of SLA; its head is read here.
    """
    chosen = load_preset(preset or PRESET)
    given = dict(parse_setting(text) for text in settings)
    values = {"model": model, **{f"generate.{key}": value for key, value in generate.items()}}
    given |= {key: value for key, value in values.items() if value is not None}
    if sla is not None:
        chosen, given = _use_sla(chosen, given, sla.expanduser())
    if size is not None:
        given["generate.width"], given["generate.height"] = parse_size(size)
    if given:
        chosen = chosen.with_values(given, "cli")
    if strict:
        if chosen.sparse is None:
            raise UsageError(
                f"--strict: preset {chosen.name!r} asks for no sparse attention, so nothing could fall back; "
                "leave it out"
            )
        chosen = chosen.with_values({"sparse.strict": True}, "cli")
    prompts = read_prompts(prompt, prompts_file)
    number = seed if seed is not None else secrets.randbelow(2**31)
    if count < 1:
        raise UsageError(f"--count {count}: at least 1 is needed")
    if not 0 <= number <= 2**63 - count:
        raise UsageError(f"seed {number}: a whole number from 0 to 2^63 - {count}")
    picture = None if image is None else open_picture(image.expanduser())
    suffix = _suffixes(chosen)[0]
    seeds = range(number, number + count)
    return Request(
        preset=chosen,
        prompts=prompts,
        seed=number,
        outputs=name_outputs(
            output, chosen.name, seeds, len(prompts), suffix, numbered=prompts_file is not None or count > 1
        ),
        image=None if image is None else image.expanduser(),
        picture_size=None if picture is None else picture.size,
        count=count,
        machine=machine,
        sources={key: "default" if value == MACHINE[key] else "cli" for key, value in machine.items()}
        | {
            "preset": "cli" if preset is not None else "default",
            "prompt": "cli" if prompts_file is None else str(prompts_file),
            "seed": "cli" if seed is not None else "random",
            "output": "cli" if output is not None else "default",
        },
    )


def _use_sla(preset: Preset, given: dict[str, Any], file: Path) -> tuple[Preset, dict[str, Any]]:
    """The preset and the values given with SLA's trained weights.

    Their file says what the method is to be like (share of blocks, order, block size), so the preset's own budget is
    not for it; what is given with `--set` still is, where the weights allow it.
    """
    method = given.get("sparse.method", "sla")
    if method != "sla":
        raise UsageError(f"--sla {file} and sparse.method={method}: weights of SLA are for method sla; leave one out")
    if "sparse.weights" in given:
        raise UsageError(f"--sla {file} and sparse.weights={given['sparse.weights']}: the same twice; leave one out")
    whole = {"sparse.keep": None, "sparse.top_p": None, "sparse.method": "sla", "sparse.weights": str(file)}
    return preset.with_values(whole, "cli"), given


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` as (width, height)."""
    match = re.fullmatch(r"(\d{1,5})[xX*](\d{1,5})", text.strip())
    if not match:
        raise UsageError(f"size {text!r}: write WIDTHxHEIGHT in pixels, for example 832x480")
    return int(match[1]), int(match[2])


def read_prompts(prompt: str | None, file: Path | None) -> tuple[str, ...]:
    """The prompts: one, or the lines of a file that are not empty and do not start with `#`."""
    if (prompt is None) == (file is None):
        raise UsageError(
            "give either --prompt TEXT or --prompts-file FILE" + (", not both" if prompt is not None else "")
        )
    if file is None:
        return (prompt or "",)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UsageError(f"prompts file {file} is not text in UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read prompts file {file}: {error.strerror or error}") from None
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise UsageError(f"prompts file {file} holds no prompt; write one a line")
    return prompts


def name_outputs(
    output: str | None, preset: str, seeds: Sequence[int], prompts: int, suffix: str, *, numbered: bool
) -> tuple[Path, ...]:
    """A path for each seed of each prompt: `{preset}-{seed}-{n}` in a folder, n being the prompt's number; or the file
    as named, numbered for several."""
    safe = re.sub(r"[^\w.-]", "_", preset)
    if output is None:
        output = f"outputs/{safe}-{seeds[0]}/"
    path = Path(output).expanduser()
    if output.endswith(("/", "\\")) or path.is_dir() or not path.suffix:
        return tuple(path / f"{safe}-{seed}-{n:04d}{suffix}" for n in range(1, prompts + 1) for seed in seeds)
    if not numbered:
        return (path,)
    return tuple(
        path.with_name(f"{path.stem}-{n:04d}{path.suffix}") for n in range(1, prompts * len(seeds) + 1)
    )


def _suffixes(preset: Preset) -> tuple[str, ...]:
    """What files a preset's recipe can be written to, the usual one first."""
    return IMAGE_SUFFIXES if recipe(preset.pipeline).MAKES == "image" else SUFFIXES


def check_outputs(request: Request, dense_too: bool) -> None:
    """Raise before any work if an output could not be written, or if run.json is somebody else's."""
    for path in dict.fromkeys(request.outputs):
        for name in (path, dense_name(path)) if dense_too else (path,):
            check_writable(name, _suffixes(request.preset))
    if request.record.exists():
        try:
            ours = json.loads(request.record.read_text(encoding="utf-8")).get("tool") == "dit_accel"
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise UsageError(
                f"{request.record} is not one of ours and would be overwritten; choose another folder"
            )


def dense_name(path: Path) -> Path:
    """Where the dense twin of a clip goes."""
    return path.with_name(f"{path.stem}-dense{path.suffix}")


def settle(request: Request, *, download: bool) -> tuple[Request, Path]:
    """The request with what depends on the model's files, and the model's folder.

    A video that begins at a picture takes its shape, with as many pixels as the preset has, unless a size was asked
    for.

    Raises:
        EnvironmentProblem: there is no such model.
        UsageError: it cannot make this size, or a picture is missing or of no use to it.
    """
    recipe = request.recipe
    folder = recipe.find(request.preset.model, download=download)
    begins = recipe.start_image(folder)
    if request.image is not None and begins == "never":
        raise UsageError(
            f"--image {request.image}: {request.preset.model} starts from text alone; leave it out, or choose a model "
            "of image to video"
        )
    if request.image is None and begins == "always":
        raise UsageError(f"{request.preset.model} makes videos that begin at a picture; give --image FILE")
    rule, options = recipe.size_rule(folder), request.preset.generate
    asked = {request.preset.sources[f"generate.{side}"] for side in ("width", "height")}
    if request.image is not None and "cli" not in asked:
        width, height = rule.in_shape(*request.picture_size, options.width * options.height)
        values = {"generate.width": width, "generate.height": height}
        request = replace(request, preset=request.preset.with_values(values, "image"))
        options = request.preset.generate
    rule.check(options.width, options.height, options.frames)
    return request, folder


def prepare(request: Request) -> tuple[Request, Path]:
    """The settled request and the model's folder, downloaded if need be, and torch and diffusers imported.

    They come in last: whatever could be refused without them has been.
    """
    request, folder = settle(request, download=True)
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(f"{error}: pip install 'dit-accel[diffusers]'") from error
    return request, folder
