"""Presets: inheritance, sources, and errors that teach."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.methods import method_names
from dit_accel.preset import load_preset, preset_names
from dit_accel.presets import shipped_models
from dit_accel.settings import parse_setting

BASE = """
[slow]
pipeline = "wan"
model = "tiny-wan"
[slow.generate]
steps = 7
"""
CHILD = """
[quick]
extends = "slow"
[quick.sparse]
keep = 0.5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_load_and_know_every_source(name: str) -> None:
    preset = load_preset(name)
    told = preset.to_dict()
    assert preset.description
    for group in ("generate", "sparse"):
        for key in told[group] or {}:
            source = preset.sources[f"{group}.{key}"]
            assert source == "default" or source.startswith("preset "), (key, source)
    if preset.sparse:
        assert preset.sparse.method in method_names()


def test_the_presets_of_the_readme_are_shipped() -> None:
    assert {"tiny-wan", "tiny-wan-fast", "wan21-fast", "wan21-balanced"} <= set(preset_names())
    assert load_preset("tiny-wan").sparse is None
    assert load_preset("wan21-fast").model == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert load_preset("wan21-1.3b-fast").model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_real_weights_were_never_measured_and_the_presets_say_so() -> None:
    real = [name for name in preset_names() if load_preset(name).model not in shipped_models()]
    assert {load_preset(name).status for name in real} == {"provisional"}
    for family in ("wan22", "hunyuanvideo", "flux", "sd3"):
        assert {f"{family}-dense", f"{family}-fast", f"{family}-balanced"} <= set(real)


def test_no_two_files_define_the_same_preset() -> None:
    import tomllib

    import dit_accel.presets

    read = [tomllib.loads(file.read_text()) for file in dit_accel.presets.FOLDER.glob("*.toml")]
    assert all(tables.pop("version") == 1 for tables in read)
    names = [name for tables in read for name in tables]
    assert sorted(names) == sorted(set(names)) == list(preset_names())


def test_a_user_file_extends_in_itself_and_beyond(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + CHILD + '[mine]\nextends = "tiny-wan-fast"\n[mine.generate]\nframes = 5\n')
    quick = load_preset(f"{path}#quick")
    assert (quick.generate.steps, quick.sparse.keep, quick.model) == (7, 0.5, "tiny-wan")
    assert quick.sources["generate.steps"] == "preset slow"
    assert quick.sources["sparse.keep"] == "preset quick"
    assert quick.sources["generate.width"] == "default"
    mine = load_preset(f"{path}#mine")
    assert mine.generate.frames == 5 and mine.sparse == load_preset("tiny-wan-fast").sparse


def test_a_file_with_one_preset_needs_no_name(tmp_path: Path) -> None:
    assert load_preset(write(tmp_path, BASE)).name == "slow"


def test_settings_win_over_the_preset_and_say_so() -> None:
    preset = load_preset("tiny-wan-fast").with_values({"sparse.keep": 0.75, "generate.steps": 3}, "cli")
    assert (preset.sparse.keep, preset.generate.steps) == (0.75, 3)
    assert preset.sources["sparse.keep"] == preset.sources["generate.steps"] == "cli"
    assert preset.sparse.order == load_preset("tiny-wan-fast").sparse.order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nmodel = 'm'\n", "pipeline is missing"),
        ("[a]\npipeline = 'wan'\n", "model is missing"),
        ("[a]\npipeline = 'van'\nmodel = 'm'\n", "Did you mean 'wan'"),
        ("[a]\npipeline = 'wan'\nmodel = 'm'\nmodle = 'x'\n", "Did you mean 'model'"),
        ("[a]\nextends = 'b'\n[b]\nextends = 'a'\n", "a -> b -> a"),
        ("[a]\nextends = 'tiny-wam'\n", "Did you mean 'tiny-wan'"),
        ("[a]\nextends = ['tiny-wan', 'b']\n", "takes one name"),
        ("[a]\nextends = 'tiny-wan'\nstatus = 'good'\n", "Allowed: measured, provisional"),
        ("[a]\nextends = 'tiny-wan'\ngenerate = 3\n", "must be a table"),
        ("[a]\nextends = 'tiny-wan'\n[a.generate]\nstep = 3\n", "Did you mean 'steps'"),
        (
            "[a]\nextends = 'tiny-wan'\n[a.generate]\nsteps = 'many'\n",
            "steps = 'many': a whole number is needed",
        ),
        ("[a]\nextends = 'tiny-wan'\n[a.generate]\nsteps = true\n", "a whole number is needed"),
        ("[a]\nextends = 'tiny-wan'\n[a.generate]\nsteps = 0\n", "at least 1"),
        ("[a]\nextends = 'tiny-wan'\n[a.generate]\nfps = -1\n", "positive"),
        ("[a]\nextends = 'tiny-wan'\n[a.generate]\nfps = inf\n", "finite"),
        ("[a]\nextends = 'tiny-wan'\n[a.sparse]\nkep = 0.5\n", "Did you mean 'keep'"),
        ("[a]\nextends = 'tiny-wan'\n[a.sparse]\nkeep = 1.5\n", "keep"),
        ("[a]\nextends = 'tiny-wan'\n[a.sparse]\nkeep = 0.5\nmethod = 'poolet'\n", "Did you mean 'pooled'"),
        ("[a]\nextends = 'tiny-wan'\n[a.sparse]\nkeep = nan\n", "sparse.keep = nan"),
        ("[a]\nextends = 'tiny-wan-fast'\n[a.sparse]\nneighbours = 0.5\n", "neighbours = 0.5: a whole number"),
        ("[a]\nextends = 'tiny-wan-fast'\n[a.sparse]\nfirst_frame = 'no'\n", "first_frame = 'no': true or false"),
        ("[a]\nextends = 'tiny-wan-sla'\n[a.sparse]\nweights = 0\n", "weights = 0: a text is needed"),
        ("[a]\nextends = 'tiny-wan-fast'\n[a.sparse]\ndense_layers = 3\n", "a list of whole numbers"),
        ("[a]\nextends = 'tiny-wan-fast'\n[a.sparse]\ndense_layers = ''\n", "a list of whole numbers"),
        ("[a]\nextends = 'tiny-wan-fast'\n[[a.sparse.rules]]\nlayers = 3\nkeep = 1\n", "a list of whole numbers"),
        ("[a]\nextends = 'tiny-wan-turbo'\n[a.cache]\norder = 1.0\n", "0, 1 or 2"),
        ("[a]\nextends = 'tiny-wan'\n[a.generate]\nguidance = 1" + "0" * 400 + "\n", "too large"),
        ("version = 2\n[a]\nextends = 'tiny-wan'\n", "is of version 2, and dit-accel 0.1.0 reads version 1: upgrade"),
        ("version = '1'\n[a]\nextends = 'tiny-wan'\n", "write version = 1, or nothing"),
        ("[a]\nextends = 'tiny-wan'\nlevel = 'fats'\n", "Did you mean 'fast'"),
        ("[a]\nextends = 'tiny-wan-fast'\nlevel = 'exact'\n", "say one of balanced, fast, turbo"),
        ("[a]\nextends = 'tiny-wan'\nstatus = 'measured'\n", "needs a [provenance] table"),
        ("x = 1\n", "outside a table"),
        ("[a\n", "not valid TOML"),
    ],
)
def test_bad_files_teach_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_preset(f"{write(tmp_path, text)}#a")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny-wan-fast'"):
        load_preset("tiny-wan-fats")
    with pytest.raises(UsageError, match="cannot read preset file"):
        load_preset(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="holds 2 presets; name one"):
        load_preset(write(tmp_path, BASE + CHILD))
    with pytest.raises(UnknownNameError, match="Did you mean 'quick'"):
        load_preset(f"{tmp_path / 'mine.toml'}#quik")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparse.keep=0.3", ("sparse.keep", 0.3)),
        ("keep=.3", ("sparse.keep", 0.3)),
        ("steps = 4", ("generate.steps", 4)),
        ("sparse.dense_layers=[0, 1]", ("sparse.dense_layers", [0, 1])),
        ("order=raster", ("sparse.order", "raster")),
        ("neighbours=2", ("sparse.neighbours", 2)),  # the method's own
        ("cache.name=easy", ("cache.name", "easy")),
        ("negative_prompt=a = b", ("generate.negative_prompt", "a = b")),
        ("model=some/where", ("model", "some/where")),
        ("sparse.strict=true", ("sparse.strict", True)),
        ("negative_prompt=1\nx=2", ("generate.negative_prompt", "1\nx=2")),
    ],
)
def test_settings_are_read_as_toml_or_text(text: str, expected: tuple[str, object]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["keep", "=3", "kep=3", "generate.kep=3", "foo.bar=1"])
def test_settings_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError):
        parse_setting(text)


def test_presets_are_read_without_torch() -> None:
    code = (
        "import sys, dit_accel.preset as p; [p.load_preset(n) for n in p.preset_names()]; "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
