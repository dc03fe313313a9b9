"""Workflows with every node in ComfyUI's own server, with random models of the core."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import core_models
import pytest
import torch
from core_server import Server
from plain_region import Plain, watch
from running import region, sample, with_settings

_SCHEDULE = "schedule = '110100'\nmin_steps = 0"
_SPARSE = "min_tokens = 0\nblock = 16"
_REGION = "bucket = 8\nstart = 1\nerror_reset = []"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(Path(os.environ["COMFYUI_ROOT"]), tmp_path_factory.mktemp("comfy")) as server:
        yield server


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _sampled(family: str, model: list[Any], frames: int, steps: int = 6) -> dict[str, Any]:
    """The nodes behind a model: prompts, latents, a sampler ("sampled") and every bit of what it gives ("digest")."""
    rows, columns = (16, 20) if frames == 3 else (18, 14)
    return {
        "positive": node("TestRandomPrompt", family=family, seed=1),
        "negative": node("TestRandomPrompt", family=family, seed=2),
        "latents": node("TestSmallLatents", family=family, frames=frames, rows=rows, columns=columns),
        "sampled": node(
            "KSampler", model=model, positive=["positive", 0], negative=["negative", 0], latent_image=["latents", 0],
            seed=3, steps=steps, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "digest": node("TestDigest", latent=["sampled", 0]),
    }  # fmt: skip


def _sparse(model: list[Any], method: str = "rectified", **more: Any) -> dict[str, Any]:
    given = dict(keep=0.35, dense_first=0.2, dense_layers="", strict=False, options=_SPARSE) | more
    return node("DitAccelSparse", model=model, method=method, **given)


def _region(model: list[Any], **more: Any) -> dict[str, Any]:
    given = dict(selector="std", sample_ratio=0.4, unit="token", options=_REGION) | more
    return node("DitAccelRegion", model=model, **given)


def _graph(family: str, frames: int) -> dict[str, Any]:
    """Every node of the pack, beside a sampler on the model as it is."""
    plain = _sampled(family, ["model", 0], frames)
    return {
        "model": node("TestRandomModel", family=family),
        "preset": node("DitAccelPreset", model=["model", 0], preset="auto"),
        "sparse": _sparse(["preset", 0]),
        "cache": node("DitAccelCache", model=["sparse", 0], cache="latent", threshold=0.2, options=_SCHEDULE),
        "region": _region(["cache", 0], unit="block"),
        **_sampled(family, ["region", 0], frames),
        "plain": {**plain["sampled"]},
        "report": node("DitAccelReport", model=["region", 0], after=["sampled", 0]),
        "frames": node("TestLatentsAsFrames", latent=["sampled", 0]),
        "plain frames": node("TestLatentsAsFrames", latent=["plain", 0]),
        "compare": node("DitAccelCompare", images=["frames", 0], reference=["plain frames", 0], gain=4.0),
        "worst": node("PreviewImage", images=["compare", 1]),
        "masks": node(
            "DitAccelMaskView", model=["region", 0], positive=["positive", 0], latent=["sampled", 0], layer=1,
            noise=0.6, seed=5,
        ),
    }  # fmt: skip


def test_the_server_knows_every_node(server: Server) -> None:
    known = server.get("/object_info")
    for name in ("Preset", "Sparse", "Cache", "Region", "Report", "Compare", "MaskView"):
        assert known[f"DitAccel{name}"]["category"] == "DiT-Accel"
        given = known[f"DitAccel{name}"]["input"]["required"]
        assert all(len(port[1]["tooltip"]) > 20 for port in given.values())


@pytest.mark.parametrize("family", core_models.FAMILIES)
def test_a_graph_of_every_node_runs_at_two_sizes(server: Server, family: str) -> None:
    """The second run samples with the same patched model, which ComfyUI keeps: nothing of the first is left in it."""
    texts = {}
    for run, frames in enumerate((3, 5), 1):
        shown = server.run(_graph(family, frames))
        [report] = shown["report"]["text"]
        assert f"sampling {run} of this model" in report
        assert "3 of 6 forwards reused (50%)" in report
        assert "self-attention calls sparse" in report and "no fall-backs" in report
        assert "dense because: one of the first 0.2 of the steps" in report
        tokens = {3: 240, 5: 315}[frames] // (1 if family in core_models.VIDEO else frames)
        assert f"forwards with: {tokens} of {tokens} tokens (1)" in report
        [part] = re.findall(rf"forwards with: (\d+) of {tokens} tokens \(2\)", report)
        assert 0.2 < int(part) / tokens < 0.6
        assert "runs: 1," in report
        assert shown["compare"]["text"][0].startswith("PSNR ")
        assert shown["masks"]["images"] and shown["worst"]["images"]
        texts[frames] = report, shown["digest"]["text"]
    # a fresh server's first sampling at the second size, as another model object with the same weights
    other = _graph(family, 5)
    other["cache"]["inputs"]["options"] += "\ncompute_below = 0.0"
    shown = server.run(other)
    assert "sampling 1 of this model" in shown["report"]["text"][0]
    assert shown["digest"]["text"] == texts[5][1]


@pytest.mark.parametrize("family", core_models.FAMILIES)
def test_off_is_the_unpatched_model_by_the_bit(server: Server, family: str) -> None:
    plain = server.run({"model": node("TestRandomModel", family=family), **_sampled(family, ["model", 0], 3)})
    graph = {
        "model": node("TestRandomModel", family=family),
        "preset": node("DitAccelPreset", model=["model", 0], preset="off"),
        "sparse": _sparse(["preset", 0], "off"),
        "cache": node("DitAccelCache", model=["sparse", 0], cache="off", threshold=0.2, options=""),
        "region": _region(["cache", 0], selector="off"),
        "report": node("DitAccelReport", model=["region", 0], after=["sampled", 0]),
        **_sampled(family, ["region", 0], 3),
    }
    off = server.run(graph)
    assert off["digest"]["text"] == plain["digest"]["text"]
    assert off["report"]["text"][0].startswith("DiT-Accel is off")
    graph["sparse"] = _sparse(["preset", 0])
    assert server.run(graph)["digest"]["text"] != plain["digest"]["text"]


@pytest.mark.parametrize("family", core_models.FAMILIES)
@pytest.mark.parametrize("make", [_sparse, _region], ids=["sparse", "region"])
@pytest.mark.parametrize("first", ["ours", "other"])
def test_ours_and_another_override_both_act(server: Server, family: str, first: str, make: Any) -> None:
    inner, outer = ("ours", "other") if first == "ours" else ("other", "ours")

    def made(name: str, model: str) -> dict[str, Any]:
        return make([model, 0]) if name == "ours" else node("TestOtherOverride", model=[model, 0])

    base = {"model": node("TestRandomModel", family=family)}
    both = {
        **base,
        inner: made(inner, "model"),
        outer: made(outer, inner),
        **_sampled(family, [outer, 0], 3),
        "report": node("DitAccelReport", model=[outer, 0], after=["sampled", 0]),
    }
    shown = server.run(both)
    [report] = shown["report"]["text"]
    assert "through another override" in report
    assert ("executor: cpu" in report) == (make is _sparse)
    assert (" tokens (4)" in report) == (make is _region)
    digests = {shown["digest"]["text"][0]}
    for alone in ("ours", "other"):
        graph = {**base, alone: made(alone, "model"), **_sampled(family, [alone, 0], 3)}
        digests.add(server.run(graph)["digest"]["text"][0])
    digests.add(server.run({**base, **_sampled(family, ["model", 0], 3)})["digest"]["text"][0])
    assert len(digests) == 4


def test_a_sampler_that_looks_back_computes_every_token(server: Server) -> None:
    graph = {
        "model": node("TestRandomModel", family="wan"),
        "region": _region(["model", 0]),
        **_sampled("wan", ["region", 0], 3),
        "report": node("DitAccelReport", model=["region", 0], after=["sampled", 0]),
    }
    graph["sampled"]["inputs"]["sampler_name"] = "uni_pc"
    shown = server.run(graph)
    assert "sampler unipc: only euler is known" in shown["report"]["text"][0]
    graph["sampled"]["inputs"]["model"] = ["model", 0]
    del graph["report"]
    assert server.run(graph)["digest"]["text"] == shown["digest"]["text"]


@pytest.mark.parametrize(
    "family, grid, said",
    [
        ("wan-i2v", (3, 8, 10), {}),
        ("flux2", (1, 16, 20), {"text": 512, "patch": 1}),  # the core makes every prompt as long
        ("hunyuan-image", (1, 16, 20), {"text_first": False, "patch": 1}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_part_of_other_models_of_the_families(family: str, grid: tuple[int, int, int], said: dict[str, Any]) -> None:
    model, seen = watch(with_settings(core_models.build(family), region=region()))
    out = sample(core_models, model, family)
    assert [index is None for _, index in seen] == [True, False, False, False, False, True]
    plain = Plain(seen, grid, **said).on(core_models.build(family))
    torch.testing.assert_close(out, sample(core_models, plain, family), rtol=1e-4, atol=1e-4)


def test_a_mistake_stops_the_prompt_and_says_the_way_out(server: Server) -> None:
    graph = {
        "model": node("TestRandomModel", family="wan"),
        "sparse": _sparse(["model", 0], options=_SPARSE, dense_layers="7"),
        **_sampled("wan", ["sparse", 0], 3),
    }
    with pytest.raises(RuntimeError, match="dense_layers names layer 7, but this transformer has 3"):
        server.run(graph)
