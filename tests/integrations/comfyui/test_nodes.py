"""The nodes: what users see of them, and what each gives."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import LARGE, cache, report_of, sample, sparse, with_settings

from dit_accel.errors import UsageError
from dit_accel.integrations.comfyui import NODES, comfy_entrypoint
from dit_accel.integrations.comfyui.nodes.cache import CacheNode
from dit_accel.integrations.comfyui.nodes.compare import CompareNode
from dit_accel.integrations.comfyui.nodes.mask_view import MaskViewNode
from dit_accel.integrations.comfyui.nodes.preset import PresetNode
from dit_accel.integrations.comfyui.nodes.report import ReportNode
from dit_accel.integrations.comfyui.nodes.sparse import SparseNode
from dit_accel.integrations.comfyui.patch import patch_on
from dit_accel.integrations.comfyui.settings import (
    cache_choices,
    cache_of,
    method_choices,
    preset_choices,
    sparse_options,
)
from dit_accel.preset import load_preset

NAMES = {
    "DitAccelPreset": "DiT-Accel Preset",
    "DitAccelSparse": "DiT-Accel Sparse",
    "DitAccelCache": "DiT-Accel Cache",
    "DitAccelRegion": "DiT-Accel Region",
    "DitAccelReport": "DiT-Accel Report",
    "DitAccelCompare": "DiT-Accel Compare",
    "DitAccelMaskView": "DiT-Accel Mask View",
}


def _results(output: Any) -> tuple:
    return tuple(output.args)


# -- what is seen


def test_the_loader_gets_every_node() -> None:
    extension = asyncio.run(comfy_entrypoint())
    assert tuple(asyncio.run(extension.get_node_list())) == NODES
    schemas = [node.define_schema() for node in NODES]
    assert {schema.node_id: schema.display_name for schema in schemas} == NAMES
    assert {schema.category for schema in schemas} == {"DiT-Accel"}


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_every_input_says_what_it_is(node: Any) -> None:
    schema = node.define_schema()
    assert schema.description.endswith(".")
    for port in schema.inputs:
        assert len(port.tooltip) > 20, port.id
    taken = list(inspect.signature(node.execute).parameters)
    assert [port.id for port in schema.inputs] == taken


@pytest.mark.parametrize("node, port", [(PresetNode, "preset"), (SparseNode, "method"), (CacheNode, "cache")])
def test_every_patch_can_be_off(node: Any, port: str) -> None:
    offered = {"preset": preset_choices, "method": method_choices, "cache": cache_choices}[port]()
    assert offered[0] == "off"


def test_presets_offered_are_for_models_that_comfyui_loads() -> None:
    names = preset_choices()
    assert {"off", "auto", "wan21-fast", "flux-balanced", "sd3-fast", "hunyuanvideo-turbo"} <= set(names)
    assert not [name for name in names if name.startswith("tiny-") or name.endswith("-dense")]
    assert "sla" not in method_choices()
    assert cache_choices() == ("off", "easy", "latent")


# -- what each gives


@pytest.mark.parametrize(
    "family, expected",
    [("wan", "wan21"), ("hunyuan", "hunyuanvideo"), ("flux", "flux"), ("sd3", "sd3")],
)
def test_auto_reads_the_models_class(host: Any, family: str, expected: str) -> None:
    [model] = _results(PresetNode.execute(host.build(family), "auto"))
    settings, preset = patch_on(model).settings, load_preset(f"{expected}-balanced")
    assert settings.title == preset.name
    assert (settings.sparse, settings.cache) == (preset.sparse, preset.cache)


@pytest.mark.parametrize(
    "dim, kind, expected",
    [(1536, "t2v", "wan21-1.3b-balanced"), (3072, "ti2v", "wan22-5b-balanced"), (5120, "i2v", "wan21-i2v-balanced")],
)
def test_auto_tells_wans_by_width_and_kind(host: Any, dim: int, kind: str, expected: str) -> None:
    model = host.build("wan")
    model.model.diffusion_model.dim, model.model.diffusion_model.model_type = dim, kind
    [patched] = _results(PresetNode.execute(model, "auto"))
    assert patch_on(patched).settings.title == expected


def test_a_later_node_changes_its_part_alone(host: Any) -> None:
    [model] = _results(PresetNode.execute(host.build("wan"), "wan21-turbo"))
    turbo = patch_on(model).settings
    [model] = _results(SparseNode.execute(model, "pooled", 0.5, 0.2, "0, -1", True, ""))
    settings = patch_on(model).settings
    assert settings.cache == turbo.cache is not None
    assert (settings.sparse.keep, settings.sparse.dense_first, settings.sparse.dense_layers) == (0.5, 0.2, (0, -1))
    assert settings.sparse.strict
    assert settings.title == "set by hand"
    [model] = _results(CacheNode.execute(model, "off", 0.05, ""))
    assert patch_on(model).settings.cache is None
    assert patch_on(model).settings.sparse == settings.sparse
    [model] = _results(PresetNode.execute(model, "off"))
    assert patch_on(model) is None


def test_options_are_lines_of_toml() -> None:
    options = sparse_options("pooled", 0.3, 0.0, "", False, 'order = "tiles"\nblock = 64\nkeep = 0.4')
    assert (options.order, options.block, options.keep) == ("tiles", 64, 0.4)
    assert cache_of("latent", 0.1, "max_consecutive = 2").max_consecutive == 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sparse_options("radial", 0.3, 0.0, "", False, ""), "Method 'radial' has no keep.*set keep to 0"),
        (lambda: sparse_options("pooled", 0.3, 0.0, "one", False, ""), "dense_layers='one'.*0, 1, -1"),
        (lambda: sparse_options("pooled", 0.3, 0.0, "", False, "order = tiles"), "cannot be read as TOML"),
        (lambda: sparse_options("pooled", 0.3, 0.0, "", False, "ordr = 'tiles'"), "ordr.*order"),
        (lambda: cache_of("easy", 0.3, "[transformer_2]\nthreshold = 1.0"), "one transformer"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_report_shows_and_gives_a_text(host: Any) -> None:
    model = with_settings(host.build("wan"), sparse=sparse())
    after = sample(host, model, "wan")
    output = ReportNode.execute(model, after)
    [text] = _results(output)
    assert output.ui.value == text
    assert "self-attention calls sparse" in text


def test_compare_names_the_worst_frame() -> None:
    reference = torch.rand(3, 16, 24, 3)
    images = reference.clone()
    images[1, :4] += 0.25
    text, picture = _results(CompareNode.execute(images, reference, 2.0))
    assert "worst frame: 1, 18.06 dB" in text
    assert "PSNR 22.83 dB over 3 frames" in text
    assert picture.shape == (1, 16, 72, 3)
    torch.testing.assert_close(picture[0, :4, 48:], torch.full((4, 24, 3), 0.5))
    assert picture[0, 4:, 48:].max() == 0
    equal, _ = _results(CompareNode.execute(reference, reference, 2.0))
    assert "equal, bit for bit" in equal


def test_compare_refuses_frames_of_another_size() -> None:
    with pytest.raises(UsageError, match="3 frames of 24x16.*2 frames of 24x16"):
        CompareNode.execute(torch.rand(3, 16, 24, 3), torch.rand(2, 16, 24, 3), 1.0)


def test_mask_view_draws_what_is_read(host: Any, family: str) -> None:
    # dense at every level, and cached: the look is sparse and computed all the same
    model = with_settings(host.build(family), sparse=sparse(more="dense_below = 1.0"), cache=cache(0.2))
    output = MaskViewNode.execute(model, host.conditioning(family), host.latents(family, LARGE), -1, 0.5, 7)
    [picture] = _results(output)
    assert output.ui is not None
    assert picture.shape[0] == 1 and picture.shape[3] == 3
    assert 0.02 < (picture < 0.2).float().mean() < 0.9
    assert patch_on(model).report is None, "the look is no sampling of the model it looks at"


def test_mask_view_needs_sparse_attention_and_a_layer(host: Any) -> None:
    given = host.conditioning("wan"), host.latents("wan", LARGE)
    with pytest.raises(UsageError, match="put a DiT-Accel Sparse or Preset node before it"):
        MaskViewNode.execute(host.build("wan"), *given, 0, 0.5, 7)
    model = with_settings(host.build("wan"), sparse=sparse(more="dense_layers = [1]"))
    with pytest.raises(UsageError, match="layer=40, but this model has"):
        MaskViewNode.execute(model, *given, 40, 0.5, 7)
    with pytest.raises(UsageError, match="Layer 1 read every key in this look(.|\n)*dense layer"):
        MaskViewNode.execute(model, *given, 1, 0.5, 7)


def test_a_report_is_of_the_latest_sampling(host: Any) -> None:
    model = with_settings(host.build("wan"), sparse=sparse())
    sample(host, model, "wan", steps=2)
    first = report_of(model).sparse_calls
    sample(host, model.clone(), "wan", steps=4)  # as a LoRA's node behind it would
    assert report_of(model).sparse_calls == 2 * first


def test_the_pack_needs_no_diffusers() -> None:
    code = (
        "import sys\n"
        "sys.modules['diffusers'] = sys.modules['transformers'] = None\n"
        "import stub_models as host, running\n"
        "import dit_accel.integrations.comfyui as pack\n"
        "model = running.with_settings(host.build('wan'), sparse=running.sparse(), cache=running.cache(0.1))\n"
        "running.sample(host, model, 'wan')\n"
        "assert running.report_of(model).sparse_calls > 0\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here / "stub"), str(here), str(Path(__file__).parents[3])])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
