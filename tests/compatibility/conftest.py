"""The table behind the compatibility tests: what diffusers offers beside us must work for every family of it.

A new family adds a line to `FAMILIES` and, if it has a tiny pipeline, one to `PIPELINES`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel import SparseProcessor
from dit_accel.adapters import find_adapter
from dit_accel.testing import (
    tiny_flux2_inputs,
    tiny_flux2_transformer,
    tiny_flux_inputs,
    tiny_flux_pipeline,
    tiny_flux_transformer,
    tiny_hunyuan_video15_inputs,
    tiny_hunyuan_video15_transformer,
    tiny_hunyuan_video_inputs,
    tiny_hunyuan_video_transformer,
    tiny_sd3_inputs,
    tiny_sd3_transformer,
    tiny_wan_inputs,
    tiny_wan_pipeline,
    tiny_wan_transformer,
)

sys.path.insert(0, str(Path(__file__).parent))  # what several tests share: `from ip_adapters import HOSTS`

SPARSE = {"block": 16, "min_tokens": 0, "strict": True}  # strict: a fall-back nobody planned ends the test
FEW = 0.3  # a keep at which every family's result differs from the dense one
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def layers_of(transformer: nn.Module) -> int:
    """Self-attentions in one forward."""
    return len(find_adapter(transformer).self_attentions(transformer))


@dataclass(frozen=True)
class Family:
    """A tiny transformer and the arguments of a forward."""

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]

    def run(self, transformer: nn.Module, **changes: Any) -> Tensor:
        """A forward; floating inputs take the dtype that the transformer computes in."""
        dtype = changes.pop("dtype", torch.float32)
        inputs = {**self.inputs(transformer), **changes}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_ids"):
                inputs[name] = value.to(dtype)
        with torch.no_grad():
            return transformer(**inputs, return_dict=False)[0]

    def install(self, transformer: nn.Module, keep: float = 1.0, **options: Any) -> SparseProcessor:
        processor = SparseProcessor(transformer, keep=keep, **{**SPARSE, **options})
        transformer.set_attn_processor(processor)
        return processor

    def compare(
        self,
        feature: Callable[[nn.Module], Any],
        when: str,
        *,
        dtype: torch.dtype = torch.float32,
        tolerance: dict[str, float] = TOLERANCE,
    ) -> Tensor:
        """Stock with a feature against ours with it, the feature applied "before" or "after" the installation.

        Keeping everything must equal stock, keeping little must not, and no call may be dense. Returns stock's output.
        """
        stock = self.make()
        feature(stock)
        true = self.run(stock, dtype=dtype)
        for keep in (1.0, FEW):
            transformer = self.make()
            if when == "before":
                feature(transformer)
            processor = self.install(transformer, keep)
            if when == "after":
                feature(transformer)
            out = self.run(transformer, dtype=dtype)
            report = processor.report
            assert (report.sparse_calls, report.dense_calls) == (layers_of(transformer), 0)
            if keep == 1:
                torch.testing.assert_close(out, true, **tolerance)
            else:
                assert float((out - true).norm() / true.norm()) > 1e-3 and report.keep_achieved < 0.7
        return true


@dataclass(frozen=True)
class Pipeline:
    """A tiny pipeline, the arguments of a short run and what turns classifier-free guidance on."""

    name: str
    make: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]]  # takes batch
    guided: Callable[[int], dict[str, Any]]  # takes batch
    several: str  # the argument for several results per prompt

    def run(self, pipe: Any, *, batch: int = 1, guidance: bool = True, seed: int = 0, **changes: Any) -> Tensor:
        """Latents `[batch, ...]` of a run of three steps."""
        arguments = {
            "num_inference_steps": 3,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(seed),
            **self.arguments(batch),
            **(self.guided(batch) if guidance else {}),
            **changes,
        }
        return pipe(**arguments, return_dict=False)[0]

    def accelerate(self, pipe: Any, keep: float = 1.0, **options: Any) -> dit_accel.Handle:
        return dit_accel.accelerate(pipe, None, keep=keep, **{**SPARSE, **options})

    def compare(self, prepare: Callable[[Any], Any] = lambda pipe: None, **call: Any) -> None:
        """Stock against ours on a prepared pipeline, keeping everything and keeping little."""
        stock, ours = self.make(), self.make()
        prepare(stock), prepare(ours)
        true = self.run(stock, **call)
        with self.accelerate(ours) as handle:
            torch.testing.assert_close(self.run(ours, **call), true, **TOLERANCE)
            report = handle.report()
            assert report.sparse_calls > 0 and report.dense_calls == 0 and report.runs == 1
        with self.accelerate(ours, FEW) as handle:
            out = self.run(ours, **call)
            assert float((out - true).norm() / true.norm()) > 1e-3
            assert handle.report().sparse_calls == report.sparse_calls and handle.report().dense_calls == 0


FAMILIES = [
    Family("wan", tiny_wan_transformer, tiny_wan_inputs),
    Family("flux", tiny_flux_transformer, tiny_flux_inputs),
    Family("hunyuan-video", tiny_hunyuan_video_transformer, tiny_hunyuan_video_inputs),
    Family("hunyuan-video15", tiny_hunyuan_video15_transformer, tiny_hunyuan_video15_inputs),
    Family("flux2", tiny_flux2_transformer, tiny_flux2_inputs),
    Family("sd3", tiny_sd3_transformer, tiny_sd3_inputs),
]


def _wan_arguments(batch: int) -> dict[str, Any]:
    prompts = ["a red star moves left", "a small blue circle spins"][:batch]
    return {"prompt": prompts, "guidance_scale": 1.0, "height": 96, "width": 112, "num_frames": 9}


def _wan_guided(batch: int) -> dict[str, Any]:
    return {"negative_prompt": ["blurry"] * batch, "guidance_scale": 5.0}


def _embeddings(batch: int, text: int, width: int, pooled: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {  # drawn for two, so that the first is the same alone
        "prompt_embeds": torch.randn(2, text, width, generator=generator)[:batch],
        "pooled_prompt_embeds": torch.randn(2, pooled, generator=generator)[:batch],
    }


def _flux_arguments(batch: int) -> dict[str, Any]:
    return {**_embeddings(batch, 19, 32, 24, seed=7), "height": 18, "width": 22}


def _flux_guided(batch: int) -> dict[str, Any]:
    negative = _embeddings(batch, 19, 32, 24, seed=8)  # the pipeline refuses one of another length
    return {"true_cfg_scale": 3.0, **{f"negative_{name}": value for name, value in negative.items()}}


def _hunyuan_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    pipe = HunyuanVideoPipeline(
        transformer=tiny_hunyuan_video_transformer(seed=1), scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _hunyuan_prompt(batch: int, valid: int, seed: int) -> dict[str, Any]:
    mask = (torch.arange(19) < valid).long().expand(batch, 19)
    return {**_embeddings(batch, 19, 24, 8, seed), "prompt_attention_mask": mask}


def _hunyuan_arguments(batch: int) -> dict[str, Any]:
    return {**_hunyuan_prompt(batch, 16, seed=7), "height": 80, "width": 112, "num_frames": 9}


def _hunyuan_guided(batch: int) -> dict[str, Any]:
    negative = _hunyuan_prompt(batch, 5, seed=8)  # of another length than the prompt
    return {"true_cfg_scale": 3.0, **{f"negative_{name}": value for name, value in negative.items()}}


PIPELINES = [
    Pipeline("wan", tiny_wan_pipeline, _wan_arguments, _wan_guided, "num_videos_per_prompt"),
    Pipeline("flux", tiny_flux_pipeline, _flux_arguments, _flux_guided, "num_images_per_prompt"),
    Pipeline(
        "hunyuan-video", _hunyuan_pipeline, _hunyuan_arguments, _hunyuan_guided, "num_videos_per_prompt"
    ),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny models gain nothing from a second one."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rows of the tables for every test that takes a `family` or a `pipeline`, if it is marked `of` some only those."""
    mark = metafunc.definition.get_closest_marker("of")
    for name, rows in (("family", FAMILIES), ("pipeline", PIPELINES)):
        if name in metafunc.fixturenames:
            chosen = [row for row in rows if mark is None or row.name in mark.args]
            assert mark is None or len(chosen) == len(mark.args), f"{mark.args}: a name is in no table"
            metafunc.parametrize(name, chosen, ids=[row.name for row in chosen])


@pytest.fixture(params=["before", "after"])
def when(request: pytest.FixtureRequest) -> str:
    """Whether a feature comes before our installation or after it."""
    return request.param
