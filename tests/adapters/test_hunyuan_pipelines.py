"""Whole pipelines of the HunyuanVideo models, which find three ways to tell of their branches, or none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hunyuan_models import remembering
from PIL import Image

import dit_accel
from dit_accel.testing import (
    tiny_framepack_pipeline,
    tiny_hunyuan_video15_pipeline,
    tiny_hunyuan_video_pipeline,
)

STEPS = 2
IMAGE = Image.radial_gradient("L").resize((112, 80)).convert("RGB")


def embed(batch, seed, **shapes):
    """Conditioning by name, and masks that leave out some of it; rows stay the same in a larger batch."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, (*tokens, width, mask) in shapes.items():
        made[name] = torch.stack([torch.randn(*tokens, width, generator=generator) for _ in range(batch)])
        if mask:
            valid = tokens[0] * (seed + 5) // 10
            made[mask] = (torch.arange(tokens[0]) < valid).long().expand(batch, -1)
    return made


def embed_hunyuan(batch, seed):
    return embed(batch, seed, prompt_embeds=(20, 24, "prompt_attention_mask"), pooled_prompt_embeds=(8, None))


def embed_hunyuan15(batch, seed):
    kinds = {"prompt_embeds": (20, 24, "prompt_embeds_mask"), "prompt_embeds_2": (10, 12, "prompt_embeds_mask_2")}
    return embed(batch, seed, **kinds)


@dataclass(frozen=True)
class Case:
    """A tiny pipeline of 3 x 5 x 7 tokens, and how to call it."""

    make: Callable[[], Any]
    embed: Callable[[int, int], dict[str, Any]]
    branches: tuple[str, str]
    size: dict[str, Any]
    sections: int = 1
    order: str | None = None  # of its tokens, where it is not the method's
    one_image_each: bool = False  # whether several prompts ask for as many images

    def sample(self, pipe, *, batch=1, guidance=True, seed=0, prompt=0, **more):
        negative = {f"negative_{name}": value for name, value in self.embed(batch, 4).items()} if guidance else {}
        call = {
            **self.embed(batch, prompt),
            **negative,
            **self.size,
            **({"image": [IMAGE] * batch} if self.one_image_each else {}),
            "num_inference_steps": STEPS,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(seed),
            **more,
        }
        if hasattr(pipe, "guider"):
            pipe.guider.guidance_scale = 3.0 if guidance else 1.0
        else:
            call["true_cfg_scale"] = 3.0 if guidance else 1.0
        frames = pipe(**call).frames
        return frames if isinstance(frames, torch.Tensor) else frames[-1]


VIDEO = {"height": 80, "width": 112, "num_frames": 9}
CASES = {
    "t2v": Case(tiny_hunyuan_video_pipeline, embed_hunyuan, ("cond", "uncond"), VIDEO),
    "i2v, channels": Case(
        lambda: tiny_hunyuan_video_pipeline(image_condition_type="latent_concat"),
        embed_hunyuan,
        ("#0", "#1"),
        VIDEO,
        one_image_each=True,
    ),
    "i2v, tokens": Case(
        lambda: tiny_hunyuan_video_pipeline(image_condition_type="token_replace"),
        embed_hunyuan,
        ("#0", "#1"),
        VIDEO,
        one_image_each=True,
    ),
    "1.5, t2v": Case(tiny_hunyuan_video15_pipeline, embed_hunyuan15, ("pred_cond", "pred_uncond"), VIDEO),
    "1.5, i2v": Case(
        lambda: tiny_hunyuan_video15_pipeline(i2v=True),
        embed_hunyuan15,
        ("pred_cond", "pred_uncond"),
        {"num_frames": 9, "image": IMAGE},
    ),
    "framepack": Case(
        tiny_framepack_pipeline,
        embed_hunyuan,
        ("#0", "#1"),
        {**VIDEO, "num_frames": 18, "latent_window_size": 3},
        sections=2,
        order="raster: history of other scales before the video",
        one_image_each=True,
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def install(pipe, method, keep=0.4):
    return dit_accel.accelerate(pipe, None, method=remembering(method, keep), block=16, min_tokens=0, strict=True)


@pytest.mark.parametrize(("batch", "guidance"), [(1, False), (2, True)])
@cases
def test_keeping_everything_is_stock_diffusers(case, batch, guidance):
    pipe = case.make()
    true = case.sample(pipe, batch=batch, guidance=guidance)
    with install(pipe, "pooled", 1.0) as handle:
        out = case.sample(pipe, batch=batch, guidance=guidance)
        report = handle.report()
    assert float((out - true).norm() / true.norm()) < 1e-4
    assert report.sparse_calls == 2 * STEPS * case.sections * (1 + guidance) and report.dense_calls == 0


@pytest.mark.parametrize("method", ["remember", "lite"])
@cases
def test_runs_and_branches(case, method):
    """Runs are strangers to one another and are told of right; afterwards the pipeline is as it was."""
    pipe = case.make()
    true, seen = case.sample(pipe), []
    with install(pipe, method) as handle:
        first = case.sample(pipe)
        case.sample(pipe, seed=1, prompt=1)
        handle.observe(lambda call, *_: seen.append((call.run, call.step, call.branch, call.layer)))
        assert torch.equal(case.sample(pipe), first)
        report = handle.report()
    runs = range(2 * case.sections + 1, 3 * case.sections + 1)
    steps = range(STEPS)
    assert seen == [(r, s, branch, at) for r in runs for s in steps for branch in case.branches for at in (0, 1)]
    assert report.runs == 3 * case.sections and not report.stateless
    assert report.dense_calls == 0 and not torch.equal(first, true)
    own = {"remember": "tiles", "lite": "packed"}[method]
    assert set(report.token_orders) == {case.order or own}
    assert torch.equal(case.sample(pipe), true)


@pytest.mark.parametrize("at_call", [1, 2, 3], ids=["step 0, cond", "step 0, uncond", "later"])
@cases
def test_a_run_after_an_exception_is_as_fresh(case, at_call):
    class Stop(Exception):
        pass

    def stop(module, args):
        calls.append(module)
        if len(calls) == at_call:
            raise Stop

    pipe, calls = case.make(), []
    with install(pipe, "remember"):
        fresh = case.sample(pipe)
        hook = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            case.sample(pipe)
        hook.remove()
        assert torch.equal(case.sample(pipe), fresh)


@cases
def test_a_video_is_the_same_in_other_company(case):
    def sample(*seeds):
        return case.sample(pipe, batch=2, generator=[torch.Generator().manual_seed(seed) for seed in seeds])

    pipe = case.make()
    with install(pipe, "remember"):
        pair, other = sample(0, 1), sample(0, 2)
    torch.testing.assert_close(other[0], pair[0], rtol=1e-4, atol=1e-5)
    assert float((other[1] - pair[1]).norm() / pair[1].norm()) > 1e-2
