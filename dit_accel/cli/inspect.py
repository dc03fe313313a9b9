"""`dit-accel inspect`: what a sparse method reads and how much of the attention that is, in figures and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import options
from dit_accel.cli import request as requests
from dit_accel.cli.terminal import remark
from dit_accel.errors import DitAccelError, UsageError
from dit_accel.pipelines.video import SUFFIXES, check_writable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from dit_accel.pipelines.staging import Stage

RECORD = "inspect.json"
_HEADS, _LAYERS = 4, 3  # most heads and layers drawn as block masks


def inspect(
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"A name, FILE.toml or FILE.toml#NAME; not a dense one (default: {requests.PRESET}).",
            show_default=False,
        ),
    ] = None,
    prompt: options.Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    image: options.Image = None,
    model: options.Model = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    rows: Annotated[
        int, typer.Option(help="Query tokens on which a call's recall is measured; 0 measures none.")
    ] = 64,
    every: Annotated[int, typer.Option(help="Measure recall at every so many steps.")] = 1,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Draw the block masks of this layer. Repeatable (default: three).", show_default=False
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    lora: options.Lora = None,
    set_: options.Set = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder: new, empty, or of an earlier inspect (default: outputs/inspect-PRESET-SEED/).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what a preset's sparse attention reads.

    Makes one clip and writes a folder: inspect.json (keep and recall of every layer, step and head), keep.png and
    recall.png (layer by step), masks-layer-N.png (which blocks are read), and the clip. Keep is the share of the
    keys that is read; recall is the share of the true attention that lies on them. The files' paths go to stdout,
    everything else to stderr. Measuring slows the run: times here say nothing about speed.
    """
    if prompt is None:
        raise UsageError("give --prompt TEXT: what a method reads depends on what is drawn")
    if rows < 0 or every < 1:
        raise UsageError(f"--rows {rows} --every {every}: rows is 0 or more, every 1 or more")
    request = requests.build(
        preset=preset,
        model=model,
        prompt=prompt,
        image=image,
        generate=dict(frames=frames, steps=steps, guidance=guidance, negative_prompt=negative_prompt),
        machine=dict(device=device, dtype=dtype, offload=offload, lora=tuple(lora or ())),
        settings=set_ or (),
        size=size,
        seed=seed,
    )
    if request.preset.sparse is None:
        raise UsageError(f"preset {request.preset.name!r} is dense: it reads everything; choose a fast one")
    name = "image.png" if request.recipe.MAKES == "image" else "clip.mp4"
    request = replace(
        request,
        outputs=(_folder(output, request) / name,),
        sources={**request.sources, "output": "default" if output is None else "cli"},
    )
    earlier = _check_folder(request.outputs[0].parent)
    check_writable(request.outputs[0])
    request, model_folder = requests.prepare(request)
    record = _run(request, model_folder, earlier, rows, every, layer, quiet, verbose)
    print(json.dumps(record, indent=2) if as_json else "\n".join(record["files"]))


def _folder(output: str | None, request: requests.Request) -> Path:
    if output is None:
        return request.outputs[0].parent.with_name(f"inspect-{request.outputs[0].parent.name}")
    folder = Path(output).expanduser()
    if folder.suffix.lower() in (*SUFFIXES, ".json") or folder.is_file():
        raise UsageError(f"-o {output}: inspect writes several files; name a folder")
    return folder


def _check_folder(folder: Path) -> list[Path]:
    """The files an earlier inspect left in a folder, which are ours to replace.

    Raises:
        UsageError: a folder that holds something else.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    try:
        told = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if told["tool"] == "dit_accel":
            return [folder / Path(name).name for name in told["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"folder {folder} holds files that no earlier inspect wrote; choose a new or empty folder"
    )


def _run(
    request: requests.Request,
    model_folder: Path,
    earlier: Iterable[Path],
    rows: int,
    every: int,
    layers: Sequence[int] | None,
    quiet: bool,
    verbose: bool,
) -> dict[str, Any]:
    """Make the clip under observation, and write what was seen, also when the run ends early.

    Returns:
        What inspect.json holds.
    """
    from dit_accel import accelerate
    from dit_accel.cli.making import announce, load, open_record, picture_for, timed
    from dit_accel.pipelines.staging import Stage
    from dit_accel.pipelines.video import stage_clip
    from dit_accel.quality.recall import Recorder

    announce(request, quiet=quiet, verbose=verbose)
    preset = request.preset
    picture = picture_for(request, quiet=quiet)
    pipe = load(request, model_folder)
    record = {**open_record(request, pipe), "rows": rows, "every": every}
    recorder = Recorder(rows, lambda call: call.step % every == 0)
    keeper = _MaskKeeper(layers, preset.sparse.dense_layers, preset.generate.steps)
    clip = request.outputs[0]

    def finish(report: Any, frames: np.ndarray | None) -> None:
        """Write what was seen, and the clip if there is one, which gets its name together with the record."""
        record["complete"], record["report"] = frames is not None, report.to_dict()
        with Stage() as stage:
            more = [] if frames is None else stage_clip(stage, clip, frames, preset.generate.fps)
            files = _stage(stage, record, recorder.seen, keeper, clip.parent, more)
        for path in set(earlier) - set(files):  # what an earlier run left under other names
            path.unlink(missing_ok=True)

    with accelerate(pipe, preset.sparse) as handle:

        def watch(call: Any, layout: Any, query: Any, key: Any, value: Any, plan: Any) -> None:
            keeper(call, query.shape[2], plan)
            recorder(call, layout, query, key, value, plan)

        handle.observe(watch)
        try:
            frames, seconds = timed(pipe, request, request.clips[0], picture, "inspect", quiet)
        except BaseException:
            if recorder.seen:
                finish(handle.report(), None)
                remark(f"what was seen until then is in {clip.parent}", quiet=quiet)
            raise
        report = handle.report()
    if not recorder.seen:
        linear = ["every layer is linear attention alone"] if report.linear_calls else []
        reasons = ", ".join([*report.dense_reasons, *linear]) or "no self-attention ran"
        raise DitAccelError(f"nothing ran sparse, so there is nothing to show: {reasons}")
    record["seconds"] = seconds
    finish(report, frames)
    if verbose:
        remark(str(report))
    remark(_closing_line(record), quiet=quiet)
    return record


@dataclass
class _MaskKeeper:
    """Keeps the block masks of a few layers and heads at the first, the middle and the last sparse step."""

    layers: Sequence[int] | None  # None: three of those that may be sparse
    dense: Sequence[int]  # the preset's dense layers
    steps: int
    heads: tuple[int, ...] = ()
    masks: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)  # layer, step: bool [heads, Nq, Nk]
    branch: str | None = None  # whose: that of the first call

    def __call__(self, call: Any, heads: int, plan: Any) -> None:
        if not self.heads:
            self._settle(call, heads)
        if call.layer not in self.layers or call.branch != self.branch:
            return
        mask = plan.to_mask()[0]
        held = self.masks.setdefault(call.layer, {})
        kept = {min(held, default=call.step), self.steps // 2}  # the last one gives way to this step
        for step in [step for step in held if step not in kept]:
            del held[step]
        held[call.step] = mask.expand(heads, -1, -1)[list(self.heads)].cpu().numpy()

    def _settle(self, call: Any, heads: int) -> None:
        """Choose layers and heads, as far as they are not given, at the first call."""
        self.heads, self.branch = tuple(_spread(range(heads), _HEADS)), call.branch
        if self.layers is None:
            dense = {layer % call.n_layers for layer in self.dense}
            self.layers = _spread([n for n in range(call.n_layers) if n not in dense], _LAYERS)
        for layer in self.layers:
            if not 0 <= layer < call.n_layers:
                raise UsageError(f"--layer {layer}: this transformer has layers 0 to {call.n_layers - 1}")

    def picture(self, layer: int) -> Image.Image:
        """The masks of a layer, steps down and heads across; heads that read alike are drawn once."""
        import numpy as np

        from dit_accel.quality.mask_pictures import draw_masks

        masks = self.masks[layer]
        steps, heads = sorted(masks), [f"head {head}" for head in self.heads]
        if all(np.array_equal(mask[:1].repeat(len(mask), 0), mask) for mask in masks.values()):
            heads = [f"all {len(heads)} heads drawn are alike" if len(heads) > 1 else heads[0]]
        of = "" if self.branch is None else f", branch {self.branch}"
        return draw_masks(
            [list(masks[step][: len(heads)]) for step in steps],
            f"blocks read in layer {layer}{of}",
            [f"step {step}" for step in steps],
            heads,
        )


def _stage(
    stage: Stage,
    record: dict[str, Any],
    seen: Sequence[Any],
    keeper: _MaskKeeper,
    folder: Path,
    clip: list[Path],
) -> list[Path]:
    """Complete the record, and write it and the pictures to the stage.

    Returns:
        All files that there will be.
    """
    record["summary"] = _summarise(seen)
    record["calls"] = [call.to_dict() for call in seen]
    pictures = _draw(seen, keeper)
    for name, picture in pictures.items():
        picture.save(stage.add(folder / name), format="PNG")
    files = [folder / RECORD, *(folder / name for name in pictures), *clip]
    record["files"] = [str(path) for path in files]
    stage.write_text(files[0], json.dumps(record, indent=2) + "\n")
    return files


def _summarise(seen: Sequence[Any]) -> dict[str, Any]:
    """Means over calls and heads: of all, of each layer, of each step."""

    def figures(calls: list[Any]) -> dict[str, float | None]:
        measured = [share for call in calls for share in call.recall or ()]
        return {
            "keep": round(mean(share for call in calls for share in call.keep), 4),
            "recall": round(mean(measured), 4) if measured else None,
        }

    def grouped(name: str) -> dict[str, Any]:
        numbers = sorted({getattr(call, name) for call in seen})
        return {str(n): figures([call for call in seen if getattr(call, name) == n]) for n in numbers}

    return {**figures(list(seen)), "per_layer": grouped("layer"), "per_step": grouped("step")}


def _draw(seen: Sequence[Any], keeper: _MaskKeeper) -> dict[str, Image.Image]:
    """Pictures by the names of their files."""
    from dit_accel.quality.mask_pictures import draw_heat_map

    n_layers = 1 + max(call.layer for call in seen)
    n_layers = max(n_layers, 1 + max(keeper.layers, default=0))
    pictures = {}
    for name, title, missing in (
        ("keep", "keep: share of the keys that is read, %", "ran dense or linear"),
        ("recall", "recall: share of the true attention on the keys read, %", "ran dense or linear, or not measured"),
    ):
        shares = _table(seen, name, (n_layers, keeper.steps))
        if shares is not None:
            pictures[f"{name}.png"] = draw_heat_map(shares, title, missing=missing)
    for layer in sorted(keeper.masks):
        pictures[f"masks-layer-{layer}.png"] = keeper.picture(layer)
    return pictures


def _table(seen: Sequence[Any], name: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Means over branches and heads, `[layers, steps]`; NaN where there are none. None if there are none at all."""
    import numpy as np

    found: dict[tuple[int, int], list[float]] = {}
    for call in seen:
        if getattr(call, name) is not None:
            found.setdefault((call.layer, call.step), []).extend(getattr(call, name))
    table = np.full((shape[0], max(shape[1], 1 + max((step for _, step in found), default=0))), math.nan)
    for place, shares in found.items():
        table[place] = mean(shares)
    return table if found else None


def _closing_line(record: dict[str, Any]) -> str:
    summary = record["summary"]
    line = f"reads {summary['keep']:.1%} of the keys"
    if summary["recall"] is not None:
        line += (
            f", on which lies {summary['recall']:.1%} of the attention ({record['rows']} query tokens a call)"
        )
    calls = record["report"]["self_attention_calls"]
    return f"{line} · {calls['sparse']} of {sum(calls.values())} self-attention calls sparse"


def _spread(among: Sequence[int], most: int) -> list[int]:
    """At most so many of some numbers, evenly spaced, first and last included."""
    count = min(most, len(among))
    return [among[round(i * (len(among) - 1) / max(count - 1, 1))] for i in range(count)]
