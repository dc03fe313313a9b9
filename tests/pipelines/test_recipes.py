"""Recipes of every family on random weights: stock pipelines, stock results, and what a model cannot do refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel import testing
from dit_accel.adapters import FAMILIES
from dit_accel.errors import UnknownModelError, UsageError
from dit_accel.pipelines import RECIPES, recipe
from dit_accel.pipelines.limits import SizeRule
from dit_accel.pipelines.weights import _wanted_files
from dit_accel.preset import GenerateOptions, load_preset, preset_names

IMAGE = GenerateOptions(width=64, height=48, frames=1, steps=2, guidance=3.5)
VIDEO = GenerateOptions(width=64, height=48, frames=5, steps=2, guidance=3.0)
SPARSE = dict(method="pooled", keep=0.5, block=16, min_tokens=0)


class Case(NamedTuple):
    """A model, the recipe that drives it and the arguments its stock pipeline is called with beside the common ones."""

    recipe: str
    make: Callable[[], Any]
    options: GenerateOptions
    call: dict[str, Any]
    begins: str = "never"  # as `start_image` says


def wan_5b() -> Any:
    """As Wan 2.2 5B: one model for both, whose tokens have noise levels of their own."""
    pipe = testing.tiny_wan_pipeline()
    pipe.register_to_config(expand_timesteps=True)
    return pipe


def wan_22_from_image() -> Any:
    from diffusers import WanImageToVideoPipeline

    parts = testing.tiny_wan_pipeline(two_experts=True, transformer={"in_channels": 36}).components
    return WanImageToVideoPipeline(**parts, boundary_ratio=0.9)


def sd3_of_short_prompts() -> Any:
    """As tiny-sd3: its T5 was trained with captions of at most so many tokens."""
    pipe = testing.tiny_sd3_with_text()
    pipe.tokenizer_3.model_max_length = 24
    return pipe


def flux_of_short_prompts() -> Any:
    """As tiny-flux."""
    pipe = testing.tiny_flux_with_text(guidance_embeds=True)
    pipe.tokenizer_2.model_max_length = 24
    return pipe


NEGATIVE = {"negative_prompt": ""}
CASES = {
    "flux dev": Case("flux", lambda: testing.tiny_flux_with_text(guidance_embeds=True), IMAGE, {}),
    "flux schnell": Case(
        "flux",
        testing.tiny_flux_with_text,
        dataclasses.replace(IMAGE, guidance=0.0),
        {"max_sequence_length": 256},
    ),
    "flux not distilled": Case(
        "flux",
        testing.tiny_flux_with_text,
        IMAGE,
        {**NEGATIVE, "true_cfg_scale": 3.5, "max_sequence_length": 256},
    ),
    "flux of short prompts": Case("flux", flux_of_short_prompts, IMAGE, {"max_sequence_length": 24}),
    "sd3.5": Case("sd3", testing.tiny_sd3_with_text, IMAGE, NEGATIVE),
    "sd3.5 without T5": Case("sd3", lambda: testing.tiny_sd3_with_text(t5=False), IMAGE, NEGATIVE),
    "sd3 of short prompts": Case(
        "sd3", sd3_of_short_prompts, IMAGE, {**NEGATIVE, "max_sequence_length": 24}
    ),
    "hunyuanvideo": Case("hunyuan_video", testing.tiny_hunyuan_video_with_text, VIDEO, {}),
    "hunyuanvideo i2v": Case("hunyuan_video", testing.tiny_hunyuan_video_from_image, VIDEO, {}, "always"),
    "wan 2.1 i2v": Case("wan", lambda: testing.tiny_wan_pipeline(i2v=True), VIDEO, NEGATIVE, "always"),
    "wan 2.2 i2v": Case("wan", wan_22_from_image, VIDEO, NEGATIVE, "always"),
    "wan 2.2 5b": Case("wan", wan_5b, VIDEO, NEGATIVE, "optional"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            CASES[name].make().save_pretrained(made[name])
        return made[name]

    return folder_of


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def load(name: str, folder: Path, from_image: bool) -> Any:
    case = CASES[name]
    extra = {"from_image": True} if case.begins == "optional" and from_image else {}
    return recipe(case.recipe).load(folder, **extra)


WAYS = [(name, case.begins != "never") for name, case in CASES.items()] + [("wan 2.2 5b", False)]


@pytest.mark.parametrize(("name", "from_image"), WAYS)
def test_the_result_is_the_stock_pipelines(
    name: str, from_image: bool, folders: Callable, picture: Image.Image, one_thread: None
) -> None:
    import diffusers

    case, folder = CASES[name], folders(name)
    assert recipe(case.recipe).start_image(folder) == case.begins
    pipe = load(name, folder, from_image)
    begins = {"image": picture} if from_image else {}
    steps: list[int] = []
    told = recipe(case.recipe).generate(
        pipe, case.options, "a red star", seed=3, callback=steps.append, **begins
    )
    assert told.dtype == np.uint8 and told.shape == (case.options.frames, 48, 64, 3) and steps == [1, 2]
    assert type(pipe) is getattr(diffusers, type(pipe).__name__)

    stock = type(pipe).from_pretrained(
        folder, **({"text_encoder_3": None, "tokenizer_3": None} if "without" in name else {})
    )
    many = {} if recipe(case.recipe).MAKES == "image" else {"num_frames": 5}
    (made,) = stock(
        prompt="a red star", width=64, height=48, num_inference_steps=2, guidance_scale=case.options.guidance,
        generator=torch.Generator().manual_seed(3), output_type="np", return_dict=False, **many, **begins, **case.call,
    )  # fmt: skip
    expected = np.rint(made[0] * 255).astype(np.uint8)
    assert np.array_equal(told if told.shape[0] > 1 else told[0], expected)


@pytest.mark.parametrize(("name", "from_image"), WAYS)
def test_it_runs_sparse_and_is_stock_afterwards(
    name: str, from_image: bool, folders: Callable, picture: Image.Image, one_thread: None
) -> None:
    case = CASES[name]
    pipe = load(name, folders(name), from_image)
    if type(pipe.transformer).__name__ not in FAMILIES:
        pytest.skip(f"no adapter describes {type(pipe.transformer).__name__}")
    begins = {"image": picture.resize((128, 96))} if from_image else {}
    options = dataclasses.replace(case.options, width=128, height=96)

    def make() -> np.ndarray:
        return recipe(case.recipe).generate(pipe, options, "a red star", seed=3, **begins)

    dense = make()
    with dit_accel.accelerate(pipe, None, **SPARSE) as handle:
        sparse = make()
        report = handle.report()
    assert report.sparse_calls > 0 and report.dense_calls == 0 and not report.fallbacks
    # text reads everything and is read by all, and these models have more of it than of anything else
    assert report.runs == 1 and 0.3 < report.keep_achieved < 0.995
    assert not np.array_equal(sparse, dense) and np.array_equal(make(), dense)


@pytest.mark.parametrize("name", CASES)
def test_the_size_rule_from_files_is_that_of_the_pipeline(name: str, folders: Callable) -> None:
    case = CASES[name]
    drives = recipe(case.recipe)
    rule = drives.size_rule(folders(name))
    pipe = load(name, folders(name), False)
    assert rule == drives.size_rule_of(pipe)
    step = {"image": None, "video": 4}[drives.MAKES]
    assert rule == SizeRule(8, 8, None) if step is None else rule == SizeRule(16, 16, 4)
    with pytest.raises(UsageError, match="the nearest is 64x48"):
        drives.generate(pipe, GenerateOptions(width=66, height=48, frames=1, steps=1), "x", seed=0)


def test_an_image_has_one_frame(folders: Callable) -> None:
    pipe = load("flux dev", folders("flux dev"), False)
    with pytest.raises(UsageError, match="81 frames: this model makes single images"):
        recipe("flux").generate(pipe, GenerateOptions(width=64, height=48), "x", seed=0)


@pytest.mark.parametrize("name", ["flux dev", "flux schnell", "flux not distilled", "hunyuanvideo", "sd3.5"])
@pytest.mark.parametrize("wrong", [{"negative_prompt": "grey"}, {"guidance_2": 3.0}])
def test_guidance_that_a_model_does_not_have_is_refused(name: str, wrong: dict, folders: Callable) -> None:
    """The pipelines would take a negative prompt and never look at it."""
    case = CASES[name]
    options = dataclasses.replace(case.options, **wrong)
    pipe = load(name, folders(name), False)
    if name in ("sd3.5", "flux not distilled") and "negative_prompt" in wrong:  # they have a negative branch
        plain, other = (recipe(case.recipe).generate(pipe, x, "x", seed=0) for x in (case.options, options))
        assert not np.array_equal(plain, other)
        return
    with pytest.raises(UsageError, match=next(iter(wrong))):
        recipe(case.recipe).generate(pipe, options, "x", seed=0)


def test_a_flow_shift_reaches_the_scheduler_or_is_refused(folders: Callable) -> None:
    assert recipe("sd3").load(folders("sd3.5"), flow_shift=5.0).scheduler.config.shift == 5.0
    with pytest.raises(UsageError, match="shifted by the size of the picture"):
        recipe("flux").load(folders("flux dev"), flow_shift=5.0)


@pytest.mark.parametrize(
    ("name", "vae"),
    [
        ("flux dev", "bfloat16"),
        ("sd3.5", "bfloat16"),
        ("hunyuanvideo", "float32"),
        ("wan 2.1 i2v", "float32"),
    ],
)
def test_in_16_bit_it_makes_about_the_same(
    name: str, vae: str, folders: Callable, picture: Image.Image, one_thread: None
) -> None:
    case = CASES[name]
    drives = recipe(case.recipe)
    begins = {"image": picture} if case.begins != "never" else {}
    half = drives.load(folders(name), dtype="bfloat16")
    assert (half.transformer.dtype, half.vae.dtype) == (torch.bfloat16, getattr(torch, vae))
    made = [
        drives.generate(pipe, case.options, "a red star", seed=3, **begins).astype(int)
        for pipe in (half, load(name, folders(name), False))
    ]
    assert 0 < np.abs(made[0] - made[1]).mean() < 3  # of 256


@pytest.mark.parametrize("name", ["flux dev", "sd3.5", "hunyuanvideo"])
def test_a_lora_changes_the_result_by_its_strength(
    name: str, folders: Callable, tmp_path: Path, one_thread: None
) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    case = CASES[name]
    drives = recipe(case.recipe)
    pipe = load(name, folders(name), False)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    for key, weight in pipe.transformer.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=3.0)
    type(pipe).save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer)
    )
    (file,) = tmp_path.glob("*.safetensors")
    made = {
        loras: drives.generate(drives.load(folders(name), loras=loras), case.options, "x", seed=3)
        for loras in ((), (f"{file}=0",), (str(file),))
    }
    plain, none, whole = made.values()
    assert np.array_equal(plain, none) and not np.array_equal(plain, whole)
    with pytest.raises(UsageError, match="this model has one transformer"):
        drives.load(folders(name), loras=[f"low:{file}"])


def test_another_familys_model_is_refused(folders: Callable) -> None:
    for name in RECIPES:
        other = "flux dev" if name != "flux" else "sd3.5"
        with pytest.raises(UnknownModelError, match=f"the recipe '{name}' drives"):
            recipe(name).find(str(folders(other)))


def test_only_a_pipelines_own_files_are_downloaded(folders: Callable) -> None:
    from fnmatch import fnmatch

    wanted = _wanted_files(folders("sd3.5 without T5"))

    def comes(file: str) -> bool:
        asked, refused = wanted["allow_patterns"], wanted["ignore_patterns"]
        return any(fnmatch(file, p) for p in asked) and not any(fnmatch(file, p) for p in refused)

    for file in (
        "model_index.json",
        "vae/config.json",
        "transformer/diffusion_pytorch_model-00001-of-2.safetensors",
    ):
        assert comes(file), file
    for file in (
        "sd3.5_large.safetensors", "text_encoders/t5xxl_fp16.safetensors", "text_encoder/model.fp16.safetensors",
        "text_encoder_3/model.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors",
    ):  # fmt: skip
        assert not comes(file), file


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_presets_that_fit_its_published_sizes(name: str) -> None:
    presets = [load_preset(preset) for preset in preset_names() if load_preset(preset).pipeline == name]
    assert presets
    for preset in presets:
        options = preset.generate
        image = recipe(name).MAKES == "image"
        SizeRule(16, 16, None if image else 4).check(options.width, options.height, options.frames)
        assert (options.guidance_2 is not None) == ("A14B" in preset.model)
