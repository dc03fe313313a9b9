"""`dit-accel tune`: how much may it drift? A preset made to measure, and tried on clips it has not seen."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import options
from dit_accel.cli import request as requests
from dit_accel.cli.terminal import remark, tables
from dit_accel.errors import UsageError
from dit_accel.methods import method_class, method_names
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset, preset_names
from dit_accel.roles import split_roles
from dit_accel.tuning.budget import Budget, parse_budget

if TYPE_CHECKING:
    from dit_accel.tuning.plan import Plan
    from dit_accel.tuning.results import Tuned

CACHES = ("latent", "none")
# of a preset's sparse options: what tuning decides anew, or what would disturb a measurement
_DECIDED = (
    "keep", "top_p", "dense_above", "dense_below", "dense_layers", "rules", "predict_every", "predict_drift",
    "share_plans", "drift_every", "drift_limit", "strict", "tune",
)  # fmt: skip


def tune(
    budget: Annotated[
        str, typer.Option(help="psnr>=30 (dB), time<=0.5 (computed, share of dense) or error<=0.05 (of the velocity).")
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Whose model and sampling to tune for (default: {requests.PRESET}).", show_default=False
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to tune on. Repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Or a text file with one a line.")] = None,
    held_out_prompts: Annotated[
        Path | None, typer.Option(help="Prompts to try it on (default: those tuned on, with other seeds).")
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds, with commas, of the first prompt to tune on; each further prompt counts one on.")
    ] = "1",
    held_out_seeds: Annotated[str, typer.Option(help="The same for the prompts to try it on.")] = "1001",
    methods: Annotated[
        str | None, typer.Option(help="Sparse methods to choose from, with commas (default: the preset's).")
    ] = None,
    keeps: Annotated[str, typer.Option(help="Shares of blocks to choose from.")] = ".1,.2,.35,.5",
    cache: Annotated[str, typer.Option(help="latent: steps may be made up; none: all are computed.")] = "latent",
    buckets: Annotated[int, typer.Option(help="Parts of the noise levels that get keeps of their own.")] = 5,
    close: Annotated[int, typer.Option(help="Steps at which each layer is tried alone.")] = 3,
    perturbed: Annotated[int, typer.Option(help="Steps at which runs go wrong on purpose.")] = 5,
    polish: Annotated[int, typer.Option(help="Schedules at most that clips tuned on try for real, for a time.")] = 12,
    follow: Annotated[
        bool, typer.Option("--follow", help="Follow each layer, sparse alone, to the end of each clip tuned on.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Of the preset to be (default: PRESET-tuned).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for it.")] = Path("presets"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what was measured; the budget may be another.")
    ] = False,
    model: options.Model = None,
    size: options.Size = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    set_: options.Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record on stdout.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a preset that drifts as much as you allow, and no more.

    Measures once how much each layer, noise level and step matters, shares the budget out, and tries the preset on
    prompts and seeds that it was not tuned on, beside fewer steps and hand-set options of the same computed time.
    Writes NAME.toml, which generate --preset NAME finds, NAME.json, its record, and NAME-rival.toml, the best set by
    hand; measurements stay in NAME.measured for --resume. Their paths go to stdout, everything else to stderr.
    """
    asked = parse_budget(budget)
    texts = _prompts(prompt, prompts)
    request = requests.build(
        preset=preset,
        model=model,
        prompt=texts[0],
        generate=dict(frames=frames, steps=steps, guidance=guidance),
        machine=dict(device=device, dtype=dtype, offload=offload, lora=()),
        settings=set_ or (),
        size=size,
        seed=_whole(seeds, "--seeds")[0],
    )
    base = request.preset
    if base.region is not None:
        raise UsageError(f"preset {base.name!r} has region sampling, which tune does not share out; choose one without")
    told = name or f"{base.name}-tuned"
    files = _files(told, out.expanduser(), resume)
    held = texts if held_out_prompts is None else requests.read_prompts(None, held_out_prompts)
    kept = _keeps(keeps)
    chosen = [_sparse(base, method, kept) for method in _methods(methods, base)]
    if cache not in CACHES:
        raise UsageError(f"--cache {cache!r}: one of {', '.join(CACHES)}")
    for flag, value in (("--buckets", buckets), ("--close", close), ("--perturbed", perturbed)):
        if value < 1:
            raise UsageError(f"{flag} {value}: at least 1 is needed")
    if polish < 0:
        raise UsageError(f"--polish {polish}: a number from 0 on, 0 trying none")
    pairs = _pairs(texts, _whole(seeds, "--seeds"))
    others = _pairs(held, _whole(held_out_seeds, "--held-out-seeds"))
    both = [pair for pair in others if pair in pairs]
    if both:
        raise UsageError(
            f"held-out clips must be others than those tuned on: {both[0]} is among both; give other seeds"
        )
    request, folder = requests.prepare(request)
    from dit_accel.tuning.plan import Plan
    from dit_accel.tuning.runs import Clip

    plan = Plan(
        base=request.preset,
        methods=tuple(chosen),
        keeps=kept,
        clips=tuple(Clip(*pair) for pair in pairs),
        held_out=tuple(Clip(*pair) for pair in others),
        cache=cache != "none",
        buckets=buckets,
        close=close,
        perturbed=perturbed,
        polish=polish,
        follow=follow,
    )
    record, paths = _run(request, folder, plan, asked, told, files, resume, quiet, verbose)
    print(json.dumps(record, indent=2) if as_json else "\n".join(map(str, paths)))


def _prompts(prompts: Sequence[str] | None, file: Path | None) -> tuple[str, ...]:
    if bool(prompts) == (file is not None):
        raise UsageError("give either --prompt TEXT, as often as you like, or --prompts FILE")
    return tuple(prompts) if prompts else requests.read_prompts(None, file)


def _whole(text: str, flag: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise UsageError(f"{flag} {text!r}: whole numbers from 0 with commas between them, say 1,2")
    return tuple(dict.fromkeys(map(int, words)))


def _pairs(texts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Prompts with seeds, one further on for each prompt: clips that begin at one noise have much in common."""
    return [(text, seed + place) for place, text in enumerate(texts) for seed in seeds]


def _keeps(text: str) -> tuple[float, ...]:
    try:
        found = {float(word) for word in text.split(",")}
    except ValueError:
        found = set()
    if not found or not all(0 < keep < 1 for keep in found):
        raise UsageError(f"--keeps {text!r}: shares above 0 and below 1 with commas between them, say .1,.2,.35")
    return tuple(sorted(found, reverse=True))


def _methods(text: str | None, base: Preset) -> tuple[str, ...]:
    own = base.sparse.method if base.sparse is not None else SparseOptions().method
    found = (own,) if text is None else tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    able = [name for name in method_names() if _has_keep(name)]
    for method in found:
        if method not in able:
            raise UsageError(
                f"--methods {method!r}: tune shares out how many blocks are read, and serves {', '.join(able)}"
            )
    return found


def _has_keep(name: str) -> bool:
    cls = method_class(name)
    return "keep" in cls.__dataclass_fields__ and not hasattr(cls, "learn") and not hasattr(cls, "weights_for")


def _sparse(base: Preset, method: str, keeps: Sequence[float]) -> SparseOptions:
    """The options of a method that hold everywhere: the base preset's own, where it has the method."""
    common: dict[str, Any] = {}
    if base.sparse is not None:
        common, _ = split_roles(base.sparse.to_mapping())
        if base.sparse.method != method:
            common = {key: common[key] for key in ("impl", "precision", "min_tokens", "dense")}
    kept = {key: value for key, value in common.items() if key not in _DECIDED}
    return SparseOptions.from_mapping({**kept, "method": method, "keep": keeps[-1]})


def _files(name: str, out: Path, resume: bool) -> Path:
    """The folder of measurements, once it is sure that nothing of others is in the way."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"--name {name!r}: letters, digits, - and _")
    if name in preset_names():
        raise UsageError(f"--name {name!r} is the name of a preset that ships with dit-accel; choose another")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: name a folder")
    if not resume:
        for path in (out / f"{name}.toml", out / f"{name}.json", out / f"{name}-rival.toml"):
            if path.exists():
                raise UsageError(f"{path} exists; choose another --name or --out, or make it anew with --resume")
    return out / f"{name}.measured"


def _run(
    request: requests.Request,
    folder: Path,
    plan: Plan,
    budget: Budget,
    name: str,
    measured: Path,
    resume: bool,
    quiet: bool,
    verbose: bool,
) -> tuple[dict[str, Any], list[Path]]:
    import sys

    from tqdm import tqdm

    from dit_accel.cli.environment import identify
    from dit_accel.cli.making import announce, load, open_record
    from dit_accel.tuning.shelf import open_shelf
    from dit_accel.tuning.tune import Tuner
    from dit_accel.tuning.write import make_record, revision_of, write_preset

    clips = f"{len(plan.clips)} clip{'s' * (len(plan.clips) > 1)} to tune on, {len(plan.held_out)} held out"
    announce(request, quiet=quiet, verbose=verbose, seeds=clips)
    pipe = load(request, folder)
    opened = open_record(request, pipe) | {
        "scheduler": type(pipe.scheduler).__name__, "commit": identify(pipe._execution_device)["commit"],
    }  # fmt: skip
    shelf = open_shelf(measured, plan.settings(opened["machine"]), resume)
    watched = sys.stderr.isatty() and not quiet
    try:
        with tqdm(unit="forward", file=sys.stderr, leave=False, dynamic_ncols=True, disable=not watched) as bar:
            tuner = Tuner(pipe, request.recipe, plan, budget, shelf, bar, lambda text: remark(text, quiet=quiet))
            tuned = tuner.tune(name)
    except BaseException:
        remark(f"what was measured is in {measured}; --resume goes on with it", quiet=quiet)
        raise
    record = make_record(opened, plan, budget, tuned)
    _, paths = write_preset(measured.parent, name, plan, budget, tuned, record, revision_of(folder))
    if not quiet:
        _show(record, tuned)
    return record, paths


def _show(record: dict[str, Any], tuned: Tuned) -> None:
    from rich.markup import escape
    from rich.table import Table

    columns = ("held-out clips", "computed time", "time", "PSNR", "worst", "SSIM")
    table = Table(*columns, title="against dense", title_justify="left")
    for one in (tuned.chosen, *tuned.rivals):
        told = one.to_dict()
        likeness = (told["psnr"], told["worst_psnr"], told.get("ssim"))
        cells = [f"{one.cost:.3f}", f"{told['time']:.3f}", *(f"{x:.4g}" if x is not None else "" for x in likeness)]
        table.add_row(escape(one.name), *cells)
    tables(stderr=True).print(table)
    summary = record["summary"]
    if summary["best_hand_set"] is not None:
        remark(f"{summary['gain_db_over_best_hand_set']:+.2f} dB over the best hand-set: {summary['best_hand_set']}")
    else:
        remark("nothing set by hand takes about as long, so that none is the tuned preset's rival")
