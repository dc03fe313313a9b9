"""The wheel brings one name and all its folders; importing is cheap; mapped folders explain themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(__file__).parents[2]
MAPPED = ("kernels", "pipelines", "presets")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked() -> list[str]:
    """The files that git knows and that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_every_folder_with_python_is_listed() -> None:
    folders = {file.parent for top in ("dit_accel", *MAPPED) for file in (ROOT / top).rglob("*.py")}
    found = set()
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        found.add(".".join(parts if parts[0] == "dit_accel" else ("dit_accel", *parts)))
    assert found == set(project()["tool"]["setuptools"]["packages"])
    for folder in folders:
        assert (folder / "__init__.py").is_file(), f"{folder.relative_to(ROOT)} has no __init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git knows: leftovers of earlier builds cannot hide a gap."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        if not name.startswith(("tests/", "scripts/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_brings_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dit_accel"}


def test_the_wheel_holds_every_module_preset_and_model_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in tracked():
        top = name.split("/")[0]
        inside = f"dit_accel/{name}" if top in MAPPED else name
        ships = name.endswith((".py", ".toml", ".j2", ".css", ".js"))
        ships = ships or name.startswith(("presets/models/", "dit_accel/integrations/comfy_pack/"))
        if top in ("dit_accel", *MAPPED) and ships:
            assert inside in names, f"{name} is not in the wheel"
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_names_what_other_programs_look_for(wheel: Path) -> None:
    """vLLM-Omni finds its plugin by the installed metadata."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    told = archive.read(name).decode()
    assert "[vllm_omni.sparse_attn]\ndit_accel = dit_accel.integrations.vllm_omni:attn_fn\n" in told
    assert "dit-accel = dit_accel.cli:main" in told


def test_the_wheel_and_the_models_in_it_stay_small(wheel: Path) -> None:
    models = [i for i in zipfile.ZipFile(wheel).infolist() if i.filename.startswith("dit_accel/presets/models/")]
    folders = {info.filename.split("/")[3] for info in models}
    assert {"tiny-wan", "tiny-hunyuan", "tiny-flux", "tiny-sd3"} <= folders
    assert sum(info.file_size for info in models) <= 48e6
    assert wheel.stat().st_size <= 60e6


def test_the_version_is_one() -> None:
    assert project()["project"]["version"] == dit_accel.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(dit_accel.__version__)}\b", changes, re.M)


def test_the_oldest_diffusers_is_the_one_that_is_tested_with() -> None:
    """The floor that is promised, the one that `.ci/run` installs, and the page's; the newest is in constraints.txt."""
    (named,) = (one for one in project()["project"]["optional-dependencies"]["diffusers"] if "diffusers" in one)
    floor = named.removeprefix("diffusers>=")
    assert f"'diffusers=={floor}.*'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"oldest that is supported, {floor}." in (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    newest = re.search(r"^diffusers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert newest and float(newest[1]) > float(floor)


def test_importing_is_cheap() -> None:
    code = (
        "import sys, dit_accel, dit_accel.cli.app\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'numpy.testing'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_all_names_exist_and_are_documented() -> None:
    assert dit_accel.__all__ == sorted(dit_accel.__all__)
    for name in dit_accel.__all__:
        member = getattr(dit_accel, name)
        assert name.startswith("__") or member.__doc__, name
    assert set(dit_accel.__all__) <= set(dir(dit_accel))
    with pytest.raises(AttributeError, match="offers"):
        _ = dit_accel.acelerate


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_folder_imported_under_its_bare_name_explains_itself(name: str) -> None:
    bare = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode == 1 and "ImportError" in bare.stderr and f"dit_accel.{name}" in bare.stderr
