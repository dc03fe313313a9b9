"""What the node pack's folder holds: it loads as ComfyUI loads it, and every node has its help and its example."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dit_accel
from dit_accel.integrations.comfy_install import PACK

# Where `comfy_api` is: the core's, or the stand-in for its contract.
COMFY = os.environ.get("COMFYUI_ROOT", str(Path(__file__).parent / "comfyui" / "stub"))
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
# As ComfyUI's loader does: by the file, under a name that is no package's; then the entry point and the schemas.
LOAD = """
import asyncio, importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("of_comfyui", Path(sys.argv[1]) / "__init__.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")  # with it ComfyUI would not ask for the entry point
async def nodes():
    return await (await module.comfy_entrypoint()).get_node_list()
told = {}
for node in asyncio.run(nodes()):
    schema = node.define_schema()
    told[schema.node_id] = [[x.id, vars(x).get("said", vars(x)).get("default") is not None] for x in schema.inputs]
print(json.dumps([module.WEB_DIRECTORY, told]))
"""


@cache
def loaded() -> tuple[str, dict[str, list[tuple[str, bool]]]]:
    """The pack's web folder, and its nodes with their inputs: the name, and whether it is a widget with a default."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(PACK)],
        env={**os.environ, "PYTHONPATH": COMFY},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    web, nodes = json.loads(done.stdout.splitlines()[-1])
    return web, nodes


def test_it_loads_as_comfyui_loads_it() -> None:
    web, nodes = loaded()
    assert (PACK / web).is_dir() and len(nodes) >= 6
    assert all(name.startswith("DitAccel") for name in nodes)


def test_without_the_package_it_says_what_to_do() -> None:
    code = f"import sys, runpy; sys.modules['dit_accel'] = None; runpy.run_path({str(PACK / '__init__.py')!r})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert "dit_accel is not installed in the Python that runs ComfyUI" in last
    assert f"Run: {sys.executable} -m pip install --upgrade dit-accel" in last


def test_every_node_has_a_help_page_with_its_inputs() -> None:
    web, nodes = loaded()
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (PACK / web / "docs").glob("*.md")}
    assert set(pages) == set(nodes)
    for name, inputs in nodes.items():
        rows = re.findall(r"^\| `(\w+)` \|", pages[name], re.M)
        assert rows == [one for one, _ in inputs], name


def test_there_are_examples_and_they_show_every_node() -> None:
    shown = {node["type"] for file in WORKFLOWS for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]}
    assert set(loaded()[1]) <= shown


def widgets(inputs: list[tuple[str, bool]]) -> int:
    """How many values the page keeps of a node: one for each widget, and one for what a seed does afterwards."""
    own = [name for name, is_widget in inputs if is_widget]
    return len(own) + ("seed" in own)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_an_example_is_whole(file: Path) -> None:
    """Links join slots that are there, our nodes have the values that their schemas ask for, seeds stay as they are."""
    graph: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    ours = loaded()[1]
    for number, source, slot, target, place, kind in graph["links"]:
        given, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in given["links"] and taken["link"] == number, number
        assert "*" in (given["type"], taken["type"]) or given["type"] == taken["type"] == kind, number
    for node in nodes.values():
        if node["type"] in ours:
            inputs = ours[node["type"]]
            assert [one["name"] for one in node["inputs"]] == [name for name, _ in inputs], node["type"]
            assert len(node.get("widgets_values", ())) == widgets(inputs), node["type"]
            linked = [one["name"] for one in node["inputs"] if one["link"] is not None]
            assert linked == [name for name, is_widget in inputs if not is_widget], node["type"]
        assert "randomize" not in node.get("widgets_values", ())


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_an_example_has_a_thumbnail(file: Path) -> None:
    with Image.open(file.with_suffix(".jpg")) as picture:
        assert 400 <= picture.width <= 1000 and picture.height >= 200
    assert file.with_suffix(".jpg").stat().st_size < 100_000


def test_the_registry_is_told_the_same_release() -> None:
    told = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    assert told["project"]["name"] == "dit-accel" and told["project"]["version"] == dit_accel.__version__
    assert told["project"]["dependencies"] == ["dit-accel"] == (PACK / "requirements.txt").read_text().split()
    assert "DisplayName" in told["tool"]["comfy"]
