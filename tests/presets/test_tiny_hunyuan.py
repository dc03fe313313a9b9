"""tiny-hunyuan: small, loaded by the stock pipeline, it shows what it is asked for; its page is its records'."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.pipelines import hunyuan_video
from dit_accel.preset import GenerateOptions, load_preset
from dit_accel.presets import model_path, shipped_models
from dit_accel.quality.judge import judge_clip, matches
from dit_accel.quality.prompt_accuracy import held_out_prompts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tiny-hunyuan.md").read_text(encoding="utf-8")
MODEL = "tiny-hunyuan"


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "scripts" / "results" / name).read_text())


def row(name: str) -> list[str]:
    """The cells behind a name in the page's tables."""
    (found,) = re.findall(rf"^\| \**`?{re.escape(name)}`?\**(?: \(.*?\))? \|(.+)\|$", PAGE, re.M)
    return [cell.strip() for cell in found.split("|")]


def test_it_is_small_and_stock_diffusers_loads_it() -> None:
    import diffusers

    assert MODEL in shipped_models()
    files = [path for path in model_path(MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    pipe = diffusers.HunyuanVideoPipeline.from_pretrained(model_path(MODEL), dtype=torch.bfloat16)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert all(weight.isfinite().all() for weight in getattr(pipe, name).state_dict().values()), name
    assert pipe.transformer.config.guidance_embeds


def test_the_page_tells_what_it_draws() -> None:
    gpu, cpu = read("tiny_hunyuan_quality_h200.json"), read("tiny_hunyuan_quality_cpu.json")
    attributes = ("colour", "shape", "motion", "background", "panning", "everything")
    told = gpu["summary"]["dense"]["accuracy"]
    assert row("dense, 64 prompts") == [f"{told[x]['share']:.1%}".replace("%", " %") for x in attributes]
    names = {"dense": "dense, 10 prompts", "fast": "keep 0.35"}
    for variant, figures in cpu["summary"].items():
        right = [str(figures["accuracy"][x]["right"]) for x in attributes]
        sparse = figures["achieved_keep"]
        more = [f"{sparse:.2f}", *(f"{figures[x]:.1f} dB" for x in ("psnr_mean", "psnr_min"))] if sparse else [""] * 3
        assert row(names.get(variant, variant.replace("=", " "))) == [*right, *more], variant


def test_the_page_tells_what_pays() -> None:
    summary = read("bench_tiny_hunyuan_cpu.json")["summary"]
    names = {
        "fast": "tiny-hunyuan-pooled",
        "dense,cache=latent,cache.threshold=0.1": "tiny-hunyuan-balanced",
        "dense,cache=latent,cache.threshold=0.2": "threshold 0.2",
        "dense,cache=latent,cache.threshold=0.3": "tiny-hunyuan-fast",
        "dense,cache=latent,cache.threshold=0.4": "threshold 0.4",
        "method=rectified,dense_above=0.9": "rectified",
    }
    for variant, figures in summary.items():
        if variant == "dense":
            continue
        seconds = figures["seconds_per_prompt"]
        wanted = [
            f"{seconds:.1f}",
            f"{summary['dense']['seconds_per_prompt'] / seconds:.2f}x",
            *(f"{figures[x]:.1f} dB" for x in ("psnr_mean", "psnr_min")),
        ]
        name = names.get(variant, f"{variant.removeprefix('steps=')} steps")
        assert row(name) == wanted, variant


@pytest.mark.parametrize("level", ["", "-balanced", "-fast"])
def test_presets_make_the_clip_that_it_was_trained_on(level: str) -> None:
    preset, record = load_preset(MODEL + level), read("tiny_hunyuan_quality_cpu.json")
    options = preset.generate
    assert preset.model == MODEL and preset.pipeline == "hunyuan_video" and preset.status == "measured"
    assert (options.width, options.height, options.frames) == (record["size"], record["size"], record["frames"])
    assert (options.steps, options.guidance, options.flow_shift) == (
        record["steps"],
        record["guidance"],
        record["flow_shift"],
    )


def test_it_shows_what_it_is_asked_for(one_thread: None) -> None:
    """Four held-out prompts, half of the length and a third of the steps, dense."""
    pipe = hunyuan_video.load(model_path(MODEL))
    options = GenerateOptions(width=128, height=128, frames=29, steps=10, guidance=4.0)
    right = {"colour": 0, "shape": 0}
    for prompt in held_out_prompts(4, seed=1):
        made = hunyuan_video.generate(pipe, options, prompt.text, seed=prompt.seed)
        found = matches(judge_clip(made), prompt.expected)
        for attribute in right:
            right[attribute] += getattr(found, attribute)
    assert min(right.values()) >= 3, right
