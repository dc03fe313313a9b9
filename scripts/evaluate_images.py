"""Generate held-out prompts with a text-to-image model, dense and sparse, judge every image and record what it shows.

    python scripts/evaluate_images.py --model presets/models/tiny-flux --out q
    python scripts/evaluate_images.py --model presets/models/tiny-sd3 --variants dense keep=0.5 steps=12 \
        --prompts 96 --shard 0/4 --device cuda:0 --out q
    python scripts/evaluate_images.py --merge q/record-0of4.json q/record-1of4.json ... --out q

For models that know the scenes of `dit_accel.quality.scenes`: a FluxPipeline or a StableDiffusion3Pipeline. Variants
are written as for evaluate_quality.py, and so is the record; images have no motion to judge and no flicker. Figures
from random weights say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
from _quality_record import describe_environment, merge_records
from evaluate_quality import (
    Variant,
    add_evaluation_arguments,
    choose_shard,
    finish,
    measure_variants,
    parse_variant,
    pipelines_for,
    run_batch,
    write_pictures,
)

from dit_accel.options import SparseOptions
from dit_accel.preset import GenerateOptions, Preset, load_preset
from dit_accel.quality.prompt_accuracy import Prompt, held_out_still_prompts

GUIDANCE = {"FluxPipeline": "true_cfg_scale", "StableDiffusion3Pipeline": "guidance_scale"}
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What `fast` is without --preset. Speed is not the question here: so small a model runs sparse at any length.
SPARSE = {
    "method": "pooled",
    "keep": 0.35,
    "neighbours": 1,
    "order": "tiles",
    "dense_above": 0.96,
    "min_tokens": 0,
}


def main() -> None:
    options = read_options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        record = merge_records([json.loads(Path(path).read_text()) for path in options.merge])
        finish(record, out / "record.json")
        return
    if not options.model:
        raise SystemExit("--model DIR is needed (or --merge RECORDS)")
    shard = choose_shard(options.shard)
    preset = read_preset(options)
    variants = [parse_variant(text, preset, preset.generate.steps) for text in options.variants]
    record = evaluate(options, preset, variants, shard, out)
    finish(record, out / ("record.json" if shard[1] == 1 else f"record-{shard[0]}of{shard[1]}.json"))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the model, or a shipped model's name")
    parser.add_argument("--preset", help="sampling and sparse options; without one those below")
    parser.add_argument("--size", type=int, help="side in pixels instead of the preset's (256)")
    parser.add_argument("--steps", type=int, help="denoising steps instead of the preset's (20)")
    parser.add_argument("--guidance", type=float, help="guidance scale instead of the preset's (4)")
    parser.add_argument(
        "--text-tokens", type=int, help="length that prompts are padded to (what the model's T5 was trained with)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise (1)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--judges", type=int, default=2, help="processes that judge (2)")
    parser.add_argument(
        "--merge", nargs="+", metavar="RECORD", help="merge the records of all shards and print"
    )
    add_evaluation_arguments(parser)
    parser.set_defaults(variants=["dense", "fast", "keep=0.5", "keep=0.25", "keep=0.1"])
    return parser.parse_args()


def read_preset(options: argparse.Namespace) -> Preset:
    """The preset that was asked for, or sampling and sparse options for the small models; options override it."""
    asked = {"steps": options.steps, "guidance": options.guidance}
    asked |= {"width": options.size, "height": options.size}
    asked = {name: value for name, value in asked.items() if value is not None}
    if options.preset:
        return load_preset(options.preset).with_values({f"generate.{k}": v for k, v in asked.items()}, "cli")
    generate = GenerateOptions(
        **{"width": 256, "height": 256, "frames": 1, "steps": 20, "guidance": 4.0, **asked}
    )
    return Preset(
        name="none",
        description="what scripts/evaluate_images.py takes without a preset",
        pipeline="none",
        model=options.model,
        status="provisional",
        generate=generate,
        sparse=SparseOptions.from_mapping(SPARSE),
        cache=None,
        region=None,
        level=None,
        provenance=None,
        origin="scripts/evaluate_images.py",
        sources={},
        layers=(),
    )


def evaluate(
    options: argparse.Namespace, preset: Preset, variants: list[Variant], shard: tuple[int, int], out: Path
) -> dict:
    import torch

    from dit_accel.pipelines import wan

    device = wan.pick_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    pipe = load_pipeline(options.model, device, options.dtype)
    guidance, sampling = GUIDANCE[type(pipe).__name__], preset.generate
    tokens = options.text_tokens or text_tokens(pipe)
    call = {
        guidance: sampling.guidance,
        "height": sampling.height,
        "width": sampling.width,
        "max_sequence_length": tokens,
    }
    record = {
        "environment": describe_environment(device),
        "model": Path(options.model).name,
        "preset": preset.name,
        "variants": [v.name for v in variants],
        "options": {v.name: v.options for v in variants},
        "grid": [sampling.height, sampling.width],
        "size": sampling.width,
        "frames": 1,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "text_tokens": tokens,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.transformer.dtype),
        "seed": options.seed,
        "prompts": options.prompts,
        "batch": options.batch,
        "shard": list(shard),
        "rows": {v.name: [] for v in variants},
        "calls": {v.name: [] for v in variants},
    }
    prompts = held_out_still_prompts(options.prompts, options.seed)[shard[0] :: shard[1]]

    pipes = pipelines_for(variants, pipe)

    def run(variant: Variant, batch: list[Prompt], **more: Any):
        # FLUX wants one negative prompt for each prompt.
        own = {**call, "num_inference_steps": variant.steps, **more}
        own["negative_prompt"] = [sampling.negative_prompt] * len(batch)
        images, *rest = run_batch(pipes[variant.compiled], variant, batch, own, guidance=guidance, shift="shift")
        return images[:, None], *rest  # clips of one frame

    shown = measure_variants(run, variants, prompts, record, options, device)
    write_pictures(shown, prompts, sampling.fps, out, f"{shard[0]}of{shard[1]}")
    return record


def text_tokens(pipe: Any) -> int:
    """Tokens that the T5 was trained with; padding is read like words."""
    return getattr(pipe, "tokenizer_3", pipe.tokenizer_2).model_max_length


def load_pipeline(model: str, device: Any, dtype: str) -> Any:
    """A stock pipeline, all of it in one type: it gives its latents to the autoencoder as they are."""
    import torch
    from diffusers import DiffusionPipeline

    from dit_accel.pipelines.weights import locate

    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    folder = locate(model, download=False)
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if kind not in GUIDANCE:
        raise SystemExit(f"{model} is a {kind}; this script drives {' and '.join(GUIDANCE)}")
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


if __name__ == "__main__":
    main()
