"""Fine-tune a model for sparse-linear attention (SLA): make latents, train against the dense model, compare.

    python scripts/finetune_sla.py latents --scenes rendered --count 64 --out lat
    python scripts/finetune_sla.py train --latents lat --steps 200 --keep 0.1 --mix --out sla
    python scripts/finetune_sla.py evaluate --latents lat --sla sla
    dit-accel generate --preset tiny-wan --sla sla --prompt "..."

    torchrun --nproc-per-node 4 scripts/finetune_sla.py latents --preset wan21-1.3b-fast --builtin-prompts \
        --count 256 --out lat
    accelerate launch --num-processes 4 scripts/finetune_sla.py train --preset wan21-1.3b-fast --latents lat \
        --trains full --checkpointing --minutes 50 --out sla
    python scripts/finetune_sla.py train ... --out sla --resume

    python scripts/finetune_sla.py score --latents lat --out scores.json
    python scripts/finetune_sla.py train --latents lat --steps 200 --linear-layers best:2 --scores scores.json --out sla

Ctrl-C ends `train` behind the step under way, with a checkpoint, and exits 130; `latents` goes on where it was when it
is called again. docs/sla.md says what to choose.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
from _finetune_arguments import Best, read_options

from dit_accel.cli.terminal import complain, remark, tables
from dit_accel.errors import DitAccelError, EnvironmentProblem, UsageError
from dit_accel.preset import Preset, load_preset

INTERRUPTED = 130  # exit code, as of a program that Ctrl-C ends


def main() -> int:
    options = read_options(__doc__ or "")
    verbs = {"latents": make_latents, "score": score, "train": train, "evaluate": evaluate}
    try:
        return verbs[options.verb](options)
    except DitAccelError as error:
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted; what was finished is kept")
        return INTERRUPTED


# -- latents


def make_latents(options: Any) -> int:
    from tqdm import tqdm

    from dit_accel.pipelines import recipe
    from dit_accel.training import latents

    preset = preset_of(options)
    rank, world = (int(os.environ.get(name, value)) for name, value in (("RANK", 0), ("WORLD_SIZE", 1)))
    drive = recipe(preset.pipeline)
    source = source_of(options)
    pipe = drive.load(
        preset.model, device=device_of(options), dtype=options.dtype, flow_shift=preset.generate.flow_shift
    )
    changed = {"frames": options.frames, "steps": options.steps}
    if options.size:
        changed |= dict(zip(("width", "height"), options.size, strict=True))
    generate = replace(preset.generate, **{name: value for name, value in changed.items() if value is not None})
    drive.size_rule_of(pipe).check(generate.width, generate.height, generate.frames)
    with tqdm(desc="samples", unit="", disable=rank > 0) as bar:
        folder = latents.make_latents(
            pipe, source, generate, options.out, count=options.count, seed=options.seed, model=preset.model,
            share=(rank, world), after=lambda _: bar.update(),
        )  # fmt: skip
    if rank == 0:
        shape = "x".join(map(str, folder.index.shape[1:]))
        remark(f"{len(folder)} samples of {shape} in {options.out}, from {folder.index.source}")
    return 0


def source_of(options: Any) -> Any:
    from dit_accel.cli.request import read_prompts
    from dit_accel.training.sources import Prompts, Scenes, Videos

    if options.videos:
        return Videos(options.videos)
    if options.scenes:
        return Scenes(options.seed, options.first, rendered=options.scenes == "rendered")
    return Prompts(read_prompts(None, options.prompts_file)) if options.prompts_file else Prompts()


# -- score


def score(options: Any) -> int:
    from tqdm import tqdm

    from dit_accel.pipelines.loading import pick_device, pick_dtype
    from dit_accel.sla.shape import attention_shape
    from dit_accel.training.samples import LatentFolder
    from dit_accel.training.score import check_name, score_layers, write_scores

    check_name(options.out)
    preset, folder = preset_of(options), LatentFolder(options.latents)
    device = pick_device(options.device)
    transformer = load_transformer(preset, pick_dtype(options.dtype, device), options.expert).to(device)
    with tqdm(desc="layers", unit="", total=len(attention_shape(transformer).layers)) as bar:
        scores = score_layers(
            transformer, folder, count=options.count, fit=options.fit, levels=options.levels, seed=options.seed,
            feature=options.feature, role=options.expert, after=bar.update,
        )  # fmt: skip
    rows = [(str(layer), [], scores.errors[layer]) for layer in scores.ranking]
    show_errors("relative squared error of the velocity with one layer linear, by noise level", ("layer",), rows)
    told = {
        **describe(device),
        "preset": preset.name,
        "model": preset.model,
        "dtype": str(transformer.dtype),
        "samples": {"scored": options.count, "fitted": options.fit},
        "seed": options.seed,
        "index": folder.index.to_dict(),
    }
    write_scores(options.out, scores, told)
    remark(f"record: {options.out}")
    return 0


# -- train


def train(options: Any) -> int:
    import torch
    from tqdm import tqdm

    from dit_accel.training.distill import Distiller, DistillOptions, Outcome, make_accelerator
    from dit_accel.training.samples import LatentFolder
    from dit_accel.training.student import Student

    preset = preset_of(options)
    if Outcome(options.out, options.expert).checkpoint.exists() and not options.resume:
        raise UsageError(f"{options.out} holds a run already: give --resume to go on with it, or another --out")
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    precision = options.precision or ("bf16" if on_gpu else "no")
    names = DistillOptions.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in names}
    how = DistillOptions(**given | {"precision": precision})
    scores = scores_of(options)
    folder, sla = LatentFolder(options.latents), sla_of(options, scores)
    accelerator = make_accelerator(precision, cpu=not on_gpu)
    dtype = torch.bfloat16 if precision == "bf16" and options.trains != "full" else torch.float32
    transformer = load_transformer(preset, dtype, options.expert).to(accelerator.device)
    if scores is not None:
        scores.check_fits(transformer)
    student = Student(transformer, sla, options.trains, options.rank)
    if options.start is not None:
        from dit_accel.sla.spec import file_for
        from dit_accel.sla.weights import load_sla_weights

        student.start_from(load_sla_weights(file_for(options.start, options.expert)))
    if scores is not None and scores.projections is not None:
        student.start_linear_from(scores.projections)
    distiller = Distiller(student, folder, how, accelerator, options.out)
    if options.resume:
        distiller.resume()
    distiller.measure_before()
    first = accelerator.is_main_process
    with tqdm(desc="steps", unit="", initial=distiller.step, total=how.steps, disable=not first) as bar:

        def show(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3g}")

        told = {**describe(accelerator.device), "preset": preset.name, "model": preset.model, "rank": options.rank}
        record = distiller.run(told, show)
    distiller.end()
    if record["interrupted"]:
        if first:
            complain(f"interrupted after step {record['steps']}: go on with the same command and --resume")
        return INTERRUPTED
    if first:
        before, after = (record["velocity_error"][when] for when in ("before", "after"))
        told = f"{before['overall']:.4g} before, {after['overall']:.4g} after"
        if "guided" in before:
            told += f"; guided {before['guided']['overall']:.4g} before, {after['guided']['overall']:.4g} after"
        remark(
            f"{record['steps']} steps in {record['seconds']:.0f} s; velocity error on {how.held_out} held-out samples "
            f"{told}"
        )
        print(distiller.out.weights)
    return 0


def scores_of(options: Any) -> Any:
    """What `score` found, where --scores gives it.

    Raises:
        UsageError: scores without layers to use them for or the other way round, or of another transformer.
    """
    from dit_accel.training.score import read_scores

    if options.scores is None:
        if isinstance(options.linear_layers, Best):
            raise UsageError("--linear-layers best:N chooses from scores: give --scores FILE.json")
        return None
    if not options.linear_layers:
        raise UsageError("--scores is for linear layers: give --linear-layers best:N, or their numbers")
    if options.start is not None:
        raise UsageError("--scores and --from both say where linear layers start: give one of them")
    scores = read_scores(options.scores)
    if scores.role != options.expert:
        raise UsageError(f"{options.scores} is of {scores.role}, and {options.expert} is to be trained: score that")
    return scores


def sla_of(options: Any, scores: Any = None) -> Any:
    """The options of SLA: as given, else as the weights to start from were trained, else the defaults."""
    from dit_accel.sla.spec import file_for, read_spec
    from dit_accel.training.score import best_layers
    from dit_accel.training.sla import SlaOptions

    names = ("keep", "variant", "feature", "negligible", "order", "block")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given |= {"mix": options.mix, "dense_layers": options.dense_layers, "role": options.expert}
    linear = options.linear_layers
    if isinstance(linear, Best):
        linear = best_layers(scores, linear.count, options.dense_layers)
    if linear:
        given["linear_layers"] = linear
    if options.start is None:
        return SlaOptions(**given)
    return SlaOptions.of(read_spec(file_for(options.start, options.expert)), **given)


# -- evaluate


def evaluate(options: Any) -> int:
    from tqdm import tqdm

    from dit_accel.pipelines.loading import pick_device, pick_dtype
    from dit_accel.pipelines.staging import Stage
    from dit_accel.training.compare import compare_ways, share_plans, ways_of_file, ways_to_attend
    from dit_accel.training.guidance import read_guidance, why_no_guidance
    from dit_accel.training.samples import LatentFolder, need_samples

    preset, folder = preset_of(options), LatentFolder(options.latents)
    need_samples(folder, options.count, "this comparison")
    ways: dict[str, Any] = {} if options.sla else ways_to_attend(options.keep, {})
    for file in options.sla:
        for name, way in ways_of_file(file, options.expert).items():
            known = [other for other, told in ways.items() if told == way]
            if not known:  # several files of one kind share the training-free rows
                ways[name if name not in ways else f"{name} {file}"] = way
    if options.shared_plans:
        ways |= share_plans(ways)
    asked = folder, options.expert, options.guidance
    why = why_no_guidance(*asked)
    if why is not None and options.guidance is not None:
        raise UsageError(why)
    guidance = None if why is not None else read_guidance(*asked)
    device = pick_device(options.device)
    transformer = load_transformer(preset, pick_dtype(options.dtype, device), options.expert).to(device)
    places = range(len(folder) - options.count, len(folder))
    with tqdm(desc="ways", unit="", total=len(ways) + 1) as bar:
        found = compare_ways(
            transformer, ways, folder, places, levels=options.levels, seed=options.seed, role=options.expert,
            below=options.below, guidance=guidance, after=lambda _: bar.update(),
        )  # fmt: skip
    show(found)
    if why is not None:
        remark(f"no errors of the guided velocity: {why}")
    else:
        show_guided(found)
    if options.out is not None:
        record = {
            **describe(device),
            "preset": preset.name,
            "model": preset.model,
            "dtype": str(transformer.dtype),
            "samples": options.count,
            "seed": options.seed,
            "guidance": None if guidance is None else guidance.scale,
            "index": folder.index.to_dict(),
            "ways": {name: each.to_dict() for name, each in found.items()},
        }
        with Stage() as stage:
            stage.write_text(options.out, json.dumps(record, indent=1) + "\n")
        remark(f"record: {options.out}")
    return 0


def show(found: dict[str, Any]) -> None:
    rows = []
    for name, each in found.items():
        keep = each.report.keep_achieved
        rows.append((name, ["-" if keep is None else f"{keep:.1%}", str(len(each.report.linear_calls))], each.error))
    if not any(each.report.linear_calls for each in found.values()):
        rows = [(name, more[:1], error) for name, more, error in rows]
    columns = ("way", "keys read", "linear layers")[: 1 + len(rows[0][1])]
    show_errors("relative squared error of the velocity against dense, by noise level", columns, rows)


def show_guided(found: dict[str, Any]) -> None:
    rows = [(name, [], each.error.guided) for name, each in found.items()]
    show_errors("the same of the guided velocity", ("way",), rows)


# -- shared


def show_errors(title: str, columns: tuple[str, ...], rows: list[tuple[str, list[str], Any]]) -> None:
    """Print a table of velocity errors.

    Args:
        columns: what stands before the errors.
        rows: the first column, those behind it, and the errors.
    """
    from rich.table import Table

    table = Table(*columns, "overall", title=title, title_justify="left")
    for sigma, _ in rows[0][2].levels:
        table.add_column(f"{sigma:.3f}", justify="right")
    for name, more, error in rows:
        table.add_row(name, *more, f"{error.overall:.3g}", *(f"{each:.3g}" for _, each in error.levels))
    tables().print(table)


def preset_of(options: Any) -> Preset:
    preset = load_preset(options.preset)
    return preset.with_values({"model": options.model}, "cli") if options.model else preset


def device_of(options: Any) -> str:
    """The device of this process: its own GPU where torchrun started several."""
    if options.device == "auto" and "LOCAL_RANK" in os.environ:
        import torch

        return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    return options.device


def load_transformer(preset: Preset, dtype: Any, role: str) -> Any:
    """The transformer alone: text encoders and autoencoder have done their part in the latents."""
    import diffusers

    from dit_accel.pipelines import recipe
    from dit_accel.pipelines.weights import read_index

    folder = recipe(preset.pipeline).find(preset.model)
    library, name = read_index(folder).get(role, (None, None))
    if library is None:
        raise UsageError(f"{preset.model} has no {role}; leave --expert out")
    try:
        return getattr(diffusers, name).from_pretrained(
            str(folder), subfolder=role, torch_dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise EnvironmentProblem(f"cannot load the transformer of {folder}: {str(error).splitlines()[0]}") from error


def describe(device: Any) -> dict[str, Any]:
    """What a record begins with: chip, versions, date, commit, command."""
    import importlib.metadata

    from _quality_record import describe_environment

    told = describe_environment(device)
    for name in ("accelerate", "peft"):
        try:
            told["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            told["versions"][name] = None
    return told


if __name__ == "__main__":
    sys.exit(main())
