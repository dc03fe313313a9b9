"""tiny-sd3: small, loaded by a stock pipeline, it shows what it is asked for; its presets are those of its record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dit_accel.options import SparseOptions
from dit_accel.pipelines import sd3
from dit_accel.preset import GenerateOptions, load_preset
from dit_accel.presets import model_path, shipped_models
from dit_accel.quality.judge import judge_image, matches
from dit_accel.quality.prompt_accuracy import held_out_still_prompts

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "results"
RECORD = json.loads((RESULTS / "tiny_sd3_quality_h200.json").read_text())
PAGE = (ROOT / "docs" / "tiny-sd3.md").read_text(encoding="utf-8")
VARIANTS = {"dense": "tiny-sd3", "fast": "tiny-sd3-fast", "keep=0.5": "tiny-sd3-balanced"}


def test_it_is_small_and_stock_diffusers_loads_it() -> None:
    from diffusers import StableDiffusion3Pipeline

    assert "tiny-sd3" in shipped_models()
    files = [path for path in model_path("tiny-sd3").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    pipe = StableDiffusion3Pipeline.from_pretrained(model_path("tiny-sd3"), dtype=torch.bfloat16)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        weights = getattr(pipe, name).state_dict()
        assert all(weight.isfinite().all() for weight in weights.values()), name
    assert pipe.transformer.config.sample_size * pipe.vae_scale_factor == 256
    assert sd3.text_tokens(pipe) == RECORD["text_tokens"] == 48


@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_ask_for_what_was_measured(variant: str) -> None:
    preset = load_preset(VARIANTS[variant])
    options = preset.generate
    assert preset.status == "measured" and preset.model == RECORD["model"] and preset.pipeline == "sd3"
    assert [options.height, options.width] == RECORD["grid"] and options.frames == 1
    assert (options.steps, options.guidance) == (RECORD["steps"], RECORD["guidance"])
    measured = RECORD["options"][variant]
    if measured is None:
        assert preset.is_stock
        return
    # The record ran at this one size, and said with 0 what the preset says with the size: all of it runs sparse.
    tokens = options.height * options.width // 4**2
    assert preset.sparse.min_tokens <= tokens and measured["min_tokens"] == 0
    assert {**preset.sparse.to_mapping(), "min_tokens": 0} == SparseOptions.from_mapping(measured).to_mapping()


@pytest.mark.parametrize("variant", RECORD["variants"])
def test_the_page_tells_what_the_record_holds(variant: str) -> None:
    figures = RECORD["summary"][variant]
    name = VARIANTS.get(variant, variant.replace("=", " "))
    (row,) = re.findall(rf"^\| `?{re.escape(name)}`?(?: \(.*?\))? \|(.+)\|$", PAGE, re.M)
    told = [cell.strip() for cell in row.split("|")]
    wanted = [
        f"{figures['accuracy'][name]['share']:.1%}".replace("%", " %")
        for name in ("colour", "shape", "background", "everything")
    ]
    sparse = figures["achieved_keep"] is not None
    wanted.append(f"{figures['achieved_keep']:.2f}" if sparse else "")
    wanted.append(f"{figures['psnr_mean']:.2f} dB" if sparse else "")
    base = RECORD["summary"]["dense"]["seconds_per_prompt"]
    wanted.append(f"{base / figures['seconds_per_prompt']:.2f}x" if sparse else "")
    assert told == wanted


def test_the_page_tells_the_time_on_a_cpu() -> None:
    told = json.loads((RESULTS / "tiny_sd3_time_cpu.json").read_text())
    assert told["preset"]["name"] == "tiny-sd3-fast" and told["machine"]["device"] == "cpu"
    ratios = [clip["dense"]["time_ratio"] for clip in told["clips"]]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times as fast" in PAGE.replace("\n", " ")


def test_it_shows_what_it_is_asked_for(one_thread: None) -> None:
    """Four held-out prompts, one of two objects, at a quarter of the size and half of the steps, dense."""
    pipe = sd3.load(model_path("tiny-sd3"))
    options = GenerateOptions(width=128, height=128, frames=1, steps=10, guidance=4.0)
    right = {"colour": 0, "shape": 0}
    for prompt in held_out_still_prompts(4, seed=1):
        image = sd3.generate(pipe, options, prompt.text, seed=prompt.seed)[0]
        found = matches(judge_image(image), prompt.expected)
        for attribute in right:
            right[attribute] += getattr(found, attribute)
    assert min(right.values()) >= 3, right
