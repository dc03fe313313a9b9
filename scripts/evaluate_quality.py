"""Generate held-out prompts dense and sparse, judge every clip, and record prompt accuracy and distance from dense.

    python scripts/evaluate_quality.py --model presets/models/tiny-wan --variants dense fast random steps=12 --out q
    python scripts/evaluate_quality.py --model DIR --grid large --variants dense keep=0.5 keep=0.25 random,keep=0.25 \
        --shard 0/4 --device cuda:0 --out q
    python scripts/evaluate_quality.py --model DIR --preset tiny-hunyuan-pooled --variants dense fast --out q
    python scripts/evaluate_quality.py --merge q/record-0of4.json q/record-1of4.json ... --out q

The model is one that knows the scenes of `dit_accel.quality.scenes`, a Wan or a HunyuanVideo: the preset says which.
A variant is a comma-separated list. Its first word says what runs: `dense` (stock attention), `fast` (the preset's
sparse attention), `random` (the same options with blocks drawn by lot). Then `key=value` changes a sparse option
(`keep=0.5`), the number of steps (`steps=12`), the guidance scale (`guidance=3`), the shift of the noise schedule
(`shift=5`), the kernel of dense attention (`kernel=math`: the noise floor of PSNR), or puts a step cache on it
(`cache=easy,cache.threshold=0.1`), or computes a part of the tokens (`region=0.5,region.selector=random`), or compiles
the transformer's blocks (`compile=true`: how fast dense can be at no loss). Without a first word a variant is `fast`,
or `dense` if it names no sparse option.
Every variant starts a prompt from the same noise. Figures from random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import _source_tree  # noqa: F401  (must come before dit_accel)
import numpy as np
from _quality_record import describe_environment, merge_records, print_record, summarise
from _run_arguments import add_run_arguments, choose_size

import dit_accel
from dit_accel.caches import Cache, load_cache
from dit_accel.methods import method_options
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset, load_preset
from dit_accel.quality.compare import compare_clips, draw_sheet, spread_frames
from dit_accel.quality.judge import judge_clip, judge_image, matches
from dit_accel.quality.prompt_accuracy import Prompt, held_out_prompts
from dit_accel.region import Region, load_region
from dit_accel.roles import nest

KERNELS = {
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}


@dataclass(frozen=True)
class Call:
    """How a recipe's pipeline is called, apart from what all have in common."""

    shift: str  # the scheduler's name for the shift of its noise schedule
    negative: bool  # whether there is a negative branch; else guidance is built in


CALLS = {"wan": Call("flow_shift", negative=True), "hunyuan_video": Call("shift", negative=False)}


@dataclass(frozen=True)
class Variant:
    name: str
    sparse: SparseOptions | None  # None: stock dense attention
    steps: int
    kernel: str | None  # of dense attention; None: what torch chooses
    guidance: float | None = None  # None: the preset's
    shift: float | None = None  # of the noise schedule; None: the preset's
    cache: Cache | None = None  # None: every step is computed
    region: Region | None = None  # None: every token is computed
    compiled: bool = False  # whether torch.compile has the transformer's blocks

    @property
    def options(self) -> dict[str, Any] | None:
        """What was asked for beyond stock dense attention, None if nothing was."""
        told = self.sparse.to_mapping() if self.sparse else None
        parts = {"cache": self.cache, "region": self.region}
        more = {name: part.to_mapping() for name, part in parts.items() if part}
        return {**(told or {}), **more} if more else told


class Run(Protocol):
    """Generates a batch, as `run_batch` does with its pipeline and arguments bound."""

    def __call__(
        self, variant: Variant, batch: list[Prompt], **call: Any
    ) -> tuple[np.ndarray, float, float, dict]: ...


def main() -> None:
    make_record(read_options())


def make_record(options: argparse.Namespace) -> dict:
    """Evaluate, or merge the records of shards; write what comes of it, and print it.

    Raises:
        SystemExit: neither a model nor records to merge, or no folder.
    """
    if not options.out or not (options.model or options.merge):
        raise SystemExit("--out DIR and --model DIR (or --merge RECORDS) are needed")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        record = merge_records([json.loads(Path(path).read_text()) for path in options.merge])
        finish(record, out / "record.json")
        return record
    shard, shards = choose_shard(options.shard)
    preset = load_preset(options.preset)
    steps = options.steps or preset.generate.steps
    variants = [parse_variant(text, preset, steps) for text in options.variants]
    record = evaluate(options, preset, steps, variants, (shard, shards), out)
    finish(record, out / ("record.json" if shards == 1 else f"record-{shard}of{shards}.json"))
    return record


def choose_shard(text: str) -> tuple[int, int]:
    shard, shards = (int(n) for n in text.split("/"))
    if not 0 <= shard < shards:
        raise SystemExit(f"--shard {text}: write i/n with 0 <= i < n")
    return shard, shards


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--preset", default="tiny-wan-fast", help="sampling and sparse options (tiny-wan-fast)"
    )
    add_evaluation_arguments(parser)
    return parser.parse_args()


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", nargs="+", default=["dense", "fast", "random"])
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts over all shards (96)")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th prompt from the i-th on")
    parser.add_argument(
        "--show", type=int, default=3, help="prompts of this shard drawn on the sheet and kept as clips"
    )
    parser.add_argument("--out", required=True, help="folder for the record, the sheet and the clips")


def parse_variant(text: str, preset: Preset, steps: int) -> Variant:
    head, *rest = text.split(",")
    if "=" in head:
        head, rest = None, [head, *rest]
    settings: dict[str, Any] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals:
            raise SystemExit(f"variant {text!r}: {item!r} is not key=value")
        settings[key] = parse_value(value)
    steps, kernel = settings.pop("steps", steps), settings.pop("kernel", None)
    guidance, shift = settings.pop("guidance", None), settings.pop("shift", None)
    compiled = settings.pop("compile", False)
    if not isinstance(compiled, bool):
        raise SystemExit(f"variant {text!r}: compile is true or false, not {compiled!r}")
    cache, region = pop_cache(settings), pop_region(settings)
    head = head or ("fast" if settings else "dense")
    if head not in ("dense", "fast", "random"):
        raise SystemExit(f"variant {text!r}: starts with dense, fast or random, not {head!r}")
    if kernel is not None and (kernel not in KERNELS or head != "dense"):
        raise SystemExit(f"variant {text!r}: kernel is for dense and one of {', '.join(KERNELS)}")
    if head == "dense":
        if settings:
            raise SystemExit(f"variant {text!r}: dense has no sparse option {', '.join(settings)}")
        return Variant(text, None, steps, kernel, guidance, shift, cache, region, compiled)
    if preset.sparse is None:
        raise SystemExit(
            f"variant {text!r}: preset {preset.name} is dense; give --preset one with sparse options"
        )
    if head == "random":
        shared = method_options("random") & preset.sparse.method_options.keys()
        settings = {
            "method": "random",
            **{name: preset.sparse.method_options[name] for name in shared},
            **settings,
        }
    sparse = preset.sparse.merged(nest(settings))
    return Variant(text, sparse, steps, None, guidance, shift, cache, region, compiled)


def pop_cache(settings: dict[str, Any]) -> Cache | None:
    """Take `cache` (its name) and `cache.option` out of a variant's settings."""
    given = {key: settings.pop(key) for key in list(settings) if key.split(".")[0] == "cache"}
    named = {key.partition(".")[2] or "name": value for key, value in given.items()}
    return load_cache(nest(named)) if named else None


def pop_region(settings: dict[str, Any]) -> Region | None:
    """Take `region` (its sample ratio) and `region.option` out of a variant's settings."""
    given = {key: settings.pop(key) for key in list(settings) if key.split(".")[0] == "region"}
    named = {key.partition(".")[2] or "sample_ratio": value for key, value in given.items()}
    return load_region(nest(named)) if named else None


def parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def evaluate(
    options, preset: Preset, steps: int, variants: list[Variant], shard: tuple[int, int], out: Path
) -> dict:
    import torch

    from dit_accel.pipelines import recipe
    from dit_accel.pipelines.loading import pick_device

    if preset.pipeline not in CALLS:
        raise SystemExit(
            f"preset {preset.name} is for {preset.pipeline}; this script drives {' and '.join(CALLS)}"
        )
    device = pick_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    drive = recipe(preset.pipeline)
    pipe = drive.load(
        options.model, device=str(device), dtype=options.dtype, flow_shift=preset.generate.flow_shift
    )
    side, frames = choose_size(options, preset.generate)
    drive.size_rule_of(pipe).check(side, side, frames)
    own = CALLS[preset.pipeline]
    call = {
        "guidance_scale": preset.generate.guidance,
        "height": side,
        "width": side,
        "num_frames": frames,
    }
    if own.negative:
        call["negative_prompt"] = preset.generate.negative_prompt
    record = {
        "environment": describe_environment(device),
        "model": Path(options.model).name,
        "preset": preset.name,
        "variants": [v.name for v in variants],
        "options": {v.name: v.options for v in variants},
        "grid": options.grid,
        "size": side,
        "frames": frames,
        "steps": steps,
        "guidance": preset.generate.guidance,
        "flow_shift": preset.generate.flow_shift,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.transformer.dtype),
        "seed": options.seed,
        "prompts": options.prompts,
        "batch": options.batch,
        "shard": list(shard),
        "rows": {v.name: [] for v in variants},
        "calls": {v.name: [] for v in variants},
    }
    prompts = held_out_prompts(options.prompts, options.seed)[shard[0] :: shard[1]]

    pipes = pipelines_for(variants, pipe)

    def run(variant: Variant, batch: list[Prompt], **more: Any):
        return run_batch(pipes[variant.compiled], variant, batch, {**call, **more}, shift=own.shift)

    shown = measure_variants(run, variants, prompts, record, options, device)
    write_pictures(shown, prompts, preset.generate.fps, out, f"{shard[0]}of{shard[1]}")
    return record


def pipelines_for(variants: list[Variant], pipe: Any) -> dict[bool, Any]:
    """The pipeline as it is (False) and, if a variant wants it, one whose transformer's blocks are compiled (True)."""
    if not any(variant.compiled for variant in variants):
        return {False: pipe}
    transformer = copy.deepcopy(pipe.transformer)
    transformer.compile_repeated_blocks(fullgraph=True)
    other = type(pipe)(**{**pipe.components, "transformer": transformer})
    other.set_progress_bar_config(disable=True)
    return {False: pipe, True: other}


def measure_variants(
    run: Run, variants: list[Variant], prompts: list[Prompt], record: dict, options, device
) -> dict[str, list[np.ndarray]]:
    """Generate and judge every prompt with every variant.

    Args:
        record: its `rows` and `calls` are filled, its `summary` is added.

    Returns:
        The first `options.show` clips of each variant.
    """
    for variant in variants:  # compile and tune kernels outside the timing
        if device.type == "cuda" or variant.compiled:
            run(variant, prompts[: options.batch], num_inference_steps=2)
    shown: dict[str, list[np.ndarray]] = {v.name: [] for v in variants}
    with open_judges(options.judges) as judges:
        waiting = []
        for start in range(0, len(prompts), options.batch):
            batch = prompts[start : start + options.batch]
            dense = None
            for variant in variants:
                wait_for([row for _, row in waiting])  # judges would share the cores with what is timed next
                clips, seconds, denoise, calls = run(variant, batch)
                if variant.name == "dense":
                    dense = clips
                record["calls"][variant.name].append(calls)
                shown[variant.name] += list(clips[: max(0, options.show - start)])
                for i, prompt in enumerate(batch):
                    reference = dense[i] if dense is not None and variant.name != "dense" else None
                    cost = {"seconds": seconds / len(batch), "denoise_seconds": denoise / len(batch)}
                    waiting.append(
                        (variant.name, submit_clip(judges, device, prompt, clips[i], reference, cost))
                    )
            print(f"{min(start + options.batch, len(prompts))} of {len(prompts)} prompts", flush=True)
        for name, row in waiting:
            record["rows"][name].append(row.result())
    record["summary"] = summarise(record)
    return shown


def run_batch(
    pipe,
    variant: Variant,
    batch: list[Prompt],
    call: dict,
    *,
    guidance: str = "guidance_scale",
    shift: str = "flow_shift",
) -> tuple[np.ndarray, float, float, dict]:
    """Generate a batch.

    Args:
        call: arguments of the pipeline.
        guidance: the pipeline's name for the guidance scale.
        shift: the scheduler's name for the shift of its noise schedule.

    Returns:
        uint8 `[B, F, H, W, 3]` or, of images, `[B, H, W, 3]`; seconds of the whole generation; seconds until the last
        step was done (text encoding included, decoding not); and what attention ran.
    """
    import torch

    def wait() -> None:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize(pipe.device)

    steps = call.get("num_inference_steps", variant.steps)
    if variant.guidance is not None:
        call = {**call, guidance: variant.guidance}
    denoised = 0.0

    def after_step(_, step: int, __, kwargs: dict) -> dict:
        nonlocal denoised
        if step == steps - 1:
            wait()
            denoised = time.perf_counter()
        return kwargs

    with contextlib.ExitStack() as stack:
        handle = None
        if variant.sparse or variant.cache or variant.region:
            parts = dict(cache=variant.cache or False, region=variant.region or False)
            handle = stack.enter_context(dit_accel.accelerate(pipe, variant.sparse, **parts))
        if variant.shift is not None:
            stack.callback(setattr, pipe, "scheduler", pipe.scheduler)
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{shift: variant.shift})
        if variant.kernel:
            backends = torch.nn.attention.SDPBackend
            # Attention with a mask, as in the text encoder, is not for all kernels: `math` takes what another cannot.
            chosen = [getattr(backends, KERNELS[variant.kernel]), backends.MATH]
            stack.enter_context(torch.nn.attention.sdpa_kernel(chosen))
        wait()
        began = time.perf_counter()
        (video,) = pipe(
            prompt=[prompt.text for prompt in batch],
            # CPU generators, one a prompt: the same noise for every variant, device, batch size and shard.
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in batch],
            output_type="np",
            return_dict=False,
            callback_on_step_end=after_step,
            **{**call, "num_inference_steps": steps},
        )
        seconds = time.perf_counter() - began
        report = handle.report() if handle else None
    video = np.asarray(video)
    if not np.isfinite(video).all():
        raise SystemExit(f"variant {variant.name}: the pipeline returned values that are not finite")
    calls = {
        "sparse": report.sparse_calls if report else 0,
        "dense": report.dense_calls if report else 0,
        "keep": report.keep_achieved if report else None,
        "fallbacks": dict(report.fallbacks) if report else {},
        "executors": dict(report.executors) if report else {},
        "forwards": dict(report.forwards) if report else {},
        "regions": dict(report.regions) if report else {},
    }
    return np.rint(video * 255).astype(np.uint8), seconds, denoised - began, calls


def submit_clip(
    judges: Executor, device: Any, prompt: Prompt, clip: np.ndarray, dense: np.ndarray | None, cost: dict
) -> Future:
    """Have a clip judged by another process, and compared with the dense one: here if there is a GPU to do it.

    Comparing 65 frames of 256x256 takes seconds on a core.
    """
    compared = None
    if device.type == "cuda" and dense is not None:
        compared = compare_on(device, dense, clip)
        dense = None
    return judges.submit(measure_clip, prompt, clip, dense, cost, compared)


def compare_on(device: Any, dense: np.ndarray, clip: np.ndarray) -> dict:
    import torch

    return compare_clips(*(torch.from_numpy(x).to(device) for x in (dense, clip))).to_dict()


def measure_clip(
    prompt: Prompt, clip: np.ndarray, dense: np.ndarray | None, cost: dict, compared: dict | None = None
) -> dict:
    """Judge one clip and compare it with the dense one, if it was not yet. Runs in a judging process.

    One of a single frame is an image.
    """
    import torch

    torch.set_num_threads(1)
    reading = judge_clip(clip) if len(clip) > 1 else judge_image(clip[0])
    objects = [
        {"colour": o.colour, "shape": o.shape, "motion": o.motion, "presence": o.presence, "fit": o.fit}
        for o in reading.objects
    ]
    return {
        "prompt": prompt.index,
        "text": prompt.text,
        "seed": prompt.seed,
        "objects": len(prompt.expected.objects),
        "asked": asdict(prompt.expected),
        "read": {"objects": objects, "background": reading.background, "panning": reading.panning},
        "match": asdict(matches(reading, prompt.expected)),
        "compared": compared if dense is None else compare_clips(dense, clip).to_dict(),
        **cost,
    }


def open_judges(count: int) -> Executor:
    import torch

    # A thread each: as many as there are cores, in every process, would keep all of them waiting.
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    # Spawned, not forked: a forked child of a process with a GPU context would hang.
    return ProcessPoolExecutor(max_workers=max(count, 1), mp_context=get_context("spawn"), **one_thread)


def write_pictures(
    shown: dict[str, list[np.ndarray]], prompts: list[Prompt], fps: float, out: Path, tag: str
) -> None:
    """A contact sheet of the first prompts and, for each, a clip with the variants side by side."""
    from dit_accel.pipelines.video import write_clip

    suffix = ".gif"
    with contextlib.suppress(ImportError):
        import av  # noqa: F401

        suffix = ".mp4"
    rows = {}
    for i, prompt in enumerate(prompts[: len(next(iter(shown.values())))]):
        for name, clips in shown.items():
            chosen = spread_frames(len(clips[i]), 8)
            rows[f"{prompt.index} {name}: {prompt.text}"] = clips[i][chosen]
        side_by_side = np.concatenate([clips[i] for clips in shown.values()], axis=2)
        form = suffix if len(side_by_side) > 1 else ".png"
        write_clip(out / f"prompt-{prompt.index}{form}", side_by_side, fps, ", ".join(shown))
    if rows:
        draw_sheet(rows, [f"frame {i}" for i in chosen]).save(out / f"sheet-{tag}.png")


def finish(record: dict, path: Path) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")
    print_record(record)
    print(f"\nrecord: {path}")


if __name__ == "__main__":
    main()
