"""tiny-sd3 and tiny-flux: small, loaded by stock pipelines, they show what they are asked for; presets and pages are
their records'."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dit_accel.options import SparseOptions
from dit_accel.pipelines import flux, sd3
from dit_accel.preset import GenerateOptions, load_preset
from dit_accel.presets import model_path, shipped_models
from dit_accel.quality.judge import judge_image, matches
from dit_accel.quality.prompt_accuracy import held_out_still_prompts

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "results"


@dataclass(frozen=True)
class Image:
    """A small image model: its recipe, its parts, and what its page calls each variant of its record of quality."""

    recipe: ModuleType
    parts: tuple[str, ...]
    text: int  # tokens of T5
    variants: dict[str, str]

    @property
    def family(self) -> str:
        return self.recipe.__name__.rpartition(".")[2]

    @property
    def model(self) -> str:
        return f"tiny-{self.family}"

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((RESULTS / f"tiny_{self.family}_quality_h200.json").read_text())

    @property
    def page(self) -> str:
        return (ROOT / "docs" / f"{self.model}.md").read_text(encoding="utf-8")


SD3 = Image(
    sd3, ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"), 48,
    {"dense": "tiny-sd3", "fast": "tiny-sd3-fast", "keep=0.5": "tiny-sd3-balanced"},
)  # fmt: skip
FLUX = Image(
    flux, ("transformer", "vae", "text_encoder", "text_encoder_2"), 64,
    {"dense": "tiny-flux", "fast": "keep 0.35"},
)  # fmt: skip
EACH = pytest.mark.parametrize("image", (SD3, FLUX), ids=lambda image: image.model)


@EACH
def test_it_is_small_and_stock_diffusers_loads_it(image: Image) -> None:
    import diffusers

    assert image.model in shipped_models()
    files = [path for path in model_path(image.model).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    index = json.loads((model_path(image.model) / "model_index.json").read_text())
    stock = getattr(diffusers, index["_class_name"])
    pipe = stock.from_pretrained(model_path(image.model), dtype=torch.bfloat16)
    for name in image.parts:
        weights = getattr(pipe, name).state_dict()
        assert all(weight.isfinite().all() for weight in weights.values()), name
    assert image.recipe.text_tokens(pipe) == image.record["text_tokens"] == image.text


@pytest.mark.parametrize(
    ("image", "variant"),
    [
        (image, variant)
        for image in (SD3, FLUX)
        for variant, name in image.variants.items()
        if name.startswith("tiny")
    ],
    ids=lambda x: getattr(x, "model", x),
)
def test_presets_ask_for_what_was_measured(image: Image, variant: str) -> None:
    preset, record = load_preset(image.variants[variant]), image.record
    options = preset.generate
    assert preset.status == "measured" and preset.model == record["model"] and preset.pipeline == image.family
    assert [options.height, options.width] == record["grid"] and options.frames == 1
    assert (options.steps, options.guidance) == (record["steps"], record["guidance"])
    measured = record["options"][variant]
    if measured is None:
        assert preset.is_stock
        return
    # The record ran at this one size, and said with 0 what the preset says with the size: all of it runs sparse.
    tokens = options.height * options.width // 4**2
    assert preset.sparse.min_tokens <= tokens and measured["min_tokens"] == 0
    assert {**preset.sparse.to_mapping(), "min_tokens": 0} == SparseOptions.from_mapping(
        measured
    ).to_mapping()


@pytest.mark.parametrize(
    ("image", "variant"),
    [(image, variant) for image in (SD3, FLUX) for variant in image.record["variants"]],
    ids=lambda x: getattr(x, "model", x),
)
def test_the_page_tells_what_the_record_holds(image: Image, variant: str) -> None:
    record = image.record
    figures = record["summary"][variant]
    name = image.variants.get(variant, variant.replace("=", " "))
    (row,) = re.findall(rf"^\| `?{re.escape(name)}`?(?: \(.*?\))? \|(.+)\|$", image.page, re.M)
    told = [cell.strip() for cell in row.split("|")]
    wanted = [
        f"{figures['accuracy'][name]['share']:.1%}".replace("%", " %")
        for name in ("colour", "shape", "background", "everything")
    ]
    sparse = figures["achieved_keep"] is not None
    wanted.append(f"{figures['achieved_keep']:.2f}" if sparse else "")
    wanted.append(f"{figures['psnr_mean']:.2f} dB" if sparse else "")
    base = record["summary"]["dense"]["seconds_per_prompt"]
    wanted.append(f"{base / figures['seconds_per_prompt']:.2f}x" if sparse else "")
    assert told == wanted


def test_the_page_tells_the_time_on_a_cpu() -> None:
    told = json.loads((RESULTS / "tiny_sd3_time_cpu.json").read_text())
    assert told["preset"]["name"] == "tiny-sd3-fast" and told["machine"]["device"] == "cpu"
    ratios = [clip["dense"]["time_ratio"] for clip in told["clips"]]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times as fast" in SD3.page.replace("\n", " ")


@EACH
def test_it_shows_what_it_is_asked_for(image: Image, one_thread: None) -> None:
    """Four held-out prompts, one of two objects, at a quarter of the size and half of the steps, dense."""
    pipe = image.recipe.load(model_path(image.model))
    options = GenerateOptions(width=128, height=128, frames=1, steps=10, guidance=4.0)
    right = {"colour": 0, "shape": 0}
    for prompt in held_out_still_prompts(4, seed=1):
        made = image.recipe.generate(pipe, options, prompt.text, seed=prompt.seed)[0]
        found = matches(judge_image(made), prompt.expected)
        for attribute in right:
            right[attribute] += getattr(found, attribute)
    assert min(right.values()) >= 3, right
