"""What a measured preset claims is what its record says, of the same model, size, steps, scheduler, chip and day."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dit_accel.presets
from dit_accel.caches import load_cache
from dit_accel.errors import UsageError
from dit_accel.preset import Preset, load_preset, preset_names
from dit_accel.presets import model_path, shipped_models
from dit_accel.provenance import Figure

sys.path.insert(0, str(Path(__file__).parent))
from documents import RECORD, WITHOUT, cut
from records import committed, follow, is_rounded, read_record

MEASURED = [name for name in preset_names() if load_preset(name).status == "measured"]
# A figure in words, as a description or a comment has it.
IN_WORDS = re.compile(r"(\d+(?:\.\d+)?)(?: times as fast|x\b(?! ?\d)| dB\b)")


def problems(preset: Preset, told: dict[str, str]) -> Iterator[str]:
    """What of a preset's provenance is not what its records say.

    Args:
        told: its figures as its file writes them, by name.
    """
    claim = preset.provenance
    for name, figure in claim.figures.items():
        if figure.record not in committed():
            yield f"{name}: {figure.record} is no record that is committed"
        elif not is_rounded(told[name], true_value(figure)):
            yield f"{name} = {told[name]}: the record has {true_value(figure)}"
    if claim.record not in committed():
        yield f"{claim.record} is no record that is committed"
        return
    record, made = read_record(claim.record), preset.generate
    chip = record.get("environment") or record["environments"][0]
    said = {
        "steps": (claim.steps, record["steps"], made.steps),
        "scheduler": (claim.scheduler, record["scheduler"]),
        "gpu": (claim.gpu, chip["chip"]),
        "date": (claim.date, chip["date"][:10]),
        "model": (preset.model, record["model"]),
        "width": (made.width, record["size"]),
        "frames": (made.frames, record["frames"]),
        "guidance": (made.guidance, record["guidance"]),
    }
    yield from (
        f"{key}: {', '.join(map(str, values))} differ" for key, values in said.items() if len({*values}) > 1
    )
    size = f"{made.width}x{made.height}"
    if size not in claim.size or (made.frames > 1 and f"{made.frames} frames" not in claim.size):
        yield f"size: {claim.size!r} does not speak of {made.frames} frames of {size}"
    if preset.model in shipped_models() and claim.revision != weights_of(preset.model):
        yield f"revision: {claim.revision}, and the weights that ship are {weights_of(preset.model)}: measure again"
    yield from (f"{key} differs from what was run" for key in changed(preset, record))


def true_value(figure: Figure) -> float:
    record = read_record(figure.record)
    value = follow(record, figure.at)
    return value if figure.over is None else value / follow(record, figure.over)


def weights_of(model: str) -> str:
    """A checksum of a shipped transformer."""
    digest = hashlib.sha256()
    for path in sorted((model_path(model) / "transformer").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def changed(preset: Preset, record: Any) -> list[str]:
    """Sparse and cache options that say something else than the options of the variant the figures are of.

    From how many tokens on a preset is sparse is not among them: records say 0 there, to have it sparse on any device.
    """
    variants = {figure.at[1] for figure in preset.provenance.figures.values() if figure.at[0] == "summary"}
    return [key for v in sorted(variants - {"dense"}) for key in changed_in(record["options"].get(v), preset)]


def changed_in(run: dict[str, Any] | None, preset: Preset) -> list[str]:
    """As `changed`, of one variant's options."""
    run = dict(run or {})
    cache = run.pop("cache", None)  # options that came later stand at their defaults
    if (cache and load_cache(cache)) != preset.cache:
        return ["cache"]
    now = json.loads(json.dumps(preset.sparse.to_mapping())) if preset.sparse else None
    if now is None:
        return ["sparse"] if run else []
    written = {key for key in now if preset.sources.get(f"sparse.{key}") != "default"} - {"min_tokens"}
    return [key for key in sorted(written & set(run)) if run[key] != now[key]]


def as_written(name: str) -> dict[str, str]:
    """A preset's figures, digit by digit."""
    for path in dit_accel.presets.FOLDER.glob("*.toml"):
        tables = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=str)
        if name in tables:
            figures = tables[name]["provenance"]["figures"]
            return {figure: str(table["value"]) for figure, table in figures.items()}
    raise AssertionError(name)


@pytest.mark.parametrize("name", MEASURED)
def test_every_figure_is_its_records(name: str) -> None:
    assert not list(problems(load_preset(name), as_written(name)))


def test_some_are_measured() -> None:
    of_wan = {"tiny-wan", *(f"tiny-wan-{level}" for level in ("balanced", "fast", "turbo"))}
    assert {*of_wan, "tiny-sd3", "tiny-sd3-fast", "tiny-sd3-balanced"} <= set(MEASURED)
    assert {"tiny-flux", "tiny-flux-fast", "tiny-flux-balanced", "tiny-flux-rectified"} <= set(MEASURED)
    of_hunyuan = {"tiny-hunyuan", *(f"tiny-hunyuan-{x}" for x in ("balanced", "fast", "pooled"))}
    assert {*of_hunyuan, "tiny-wan-sla"} <= set(MEASURED)


BESIDE_FEWER_STEPS = {  # preset -> the record of a run in which fewer steps stand beside it
    "tiny-flux-balanced": "bench_tiny_flux_cpu.json",
    "tiny-flux-fast": "bench_tiny_flux_cpu.json",
    "tiny-hunyuan-balanced": "bench_tiny_hunyuan_cpu.json",
    "tiny-hunyuan-fast": "bench_tiny_hunyuan_cpu.json",
    "tiny-wan-balanced": "bench_balanced_tiny_wan_cpu.json",
    "tiny-wan-fast": "bench_fast_tiny_wan_cpu.json",
    "tiny-wan-turbo": "bench_caches_tiny_wan_cpu.json",
}


@pytest.mark.parametrize("name", BESIDE_FEWER_STEPS)
def test_fewer_steps_in_the_same_time_are_farther_from_dense(name: str) -> None:
    """By 3 dB or more, in the same run. At equal time: between the runs of steps that took a little more and less."""
    from numpy import interp

    preset, record = load_preset(name), read_record(BESIDE_FEWER_STEPS[name])
    assert record["model"] == preset.model and record["size"] == preset.generate.width
    variant, summary = preset.provenance.figures["psnr_db"].at[1], record["summary"]
    assert not changed_in(record["options"][variant], preset)
    fewer = sorted(
        (x["seconds_per_prompt"], x["psnr_mean"])
        for k, x in summary.items()
        if k.removeprefix("dense,").startswith("steps=")
    )
    seconds = summary[variant]["seconds_per_prompt"]
    assert fewer[-1][0] > seconds, "a run that took at least as long"
    # where even the fewest steps took longer, they are what it stands beside
    assert summary[variant]["psnr_mean"] >= interp(seconds, *zip(*fewer, strict=True)) + 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 30}, "steps: 30, 20, 20 differ"),
        ({"scheduler": "DDIMScheduler"}, "scheduler: "),
        ({"gpu": "NVIDIA H200"}, "gpu: "),
        ({"date": "2026-11-22"}, "date: "),
        ({"size": "33 frames of 256x256"}, "size: "),
        ({"revision": "sha256:0"}, "revision: "),
        ({"record": "nowhere.json"}, "nowhere.json is no record"),
        ({"record": "bench_caches_tiny_wan_cpu.json"}, "date: "),
    ],
)
def test_a_claim_that_is_not_true_is_found(change: dict[str, Any], told: str) -> None:
    preset = load_preset("tiny-wan-fast")
    false = dataclasses.replace(preset, provenance=dataclasses.replace(preset.provenance, **change))
    (line,) = problems(false, as_written("tiny-wan-fast"))
    assert line.startswith(told)


def test_a_figure_that_is_not_true_is_found() -> None:
    preset, written = load_preset("tiny-wan-fast"), as_written("tiny-wan-fast")
    assert written["worst_psnr_db"] == "24.0" and written["times_as_fast"] == "1.44"
    (line,) = problems(preset, written | {"psnr_db": "30.2"})
    assert line.startswith("psnr_db = 30.2: the record has 30.08")
    (line,) = problems(preset.with_values({"sparse.keep": 0.3}, "preset x"), written)
    assert line == "keep differs from what was run"
    turbo = load_preset("tiny-wan-turbo")
    other = dataclasses.replace(turbo, cache=dataclasses.replace(turbo.cache, threshold=0.3))
    assert list(problems(other, as_written("tiny-wan-turbo"))) == ["cache differs from what was run"]


@pytest.mark.parametrize("name", preset_names())
def test_a_description_has_no_figure_of_its_own(name: str) -> None:
    preset = load_preset(name)
    known = as_written(name).values() if preset.provenance else ()
    assert [figure for figure in IN_WORDS.findall(preset.description) if figure not in known] == []


@pytest.mark.parametrize("path", sorted(dit_accel.presets.FOLDER.glob("*.toml")), ids=lambda path: path.name)
def test_figures_in_comments_are_published_or_on_record(path: Path) -> None:
    """Each block of comments with a figure says that others published it, or names a record."""
    comments = "\n".join(
        line.removeprefix("#").strip() if line.startswith("#") else ""
        for line in path.read_text().splitlines()
    )
    for block in cut(comments):
        if IN_WORDS.search(block.text):
            named = RECORD.findall(block.text)
            assert (named and set(named) <= committed()) or WITHOUT.search(block.text), block.text


GOOD = """
[a]
extends = "tiny-wan"
status = "measured"
[a.provenance]
record = "r.json"
revision = "0123"
size = "one frame"
steps = 4
scheduler = "S"
gpu = "G"
date = "2026-11-21"
[a.provenance.figures]
psnr_db = { value = 30, at = ["rows", 0], over = ["x"], record = "other.json" }
"""


def test_a_users_provenance_is_read(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(GOOD)
    claim = load_preset(tmp_path / "my.toml").provenance
    assert claim.figures["psnr_db"] == Figure(30.0, "other.json", ("rows", 0), ("x",))
    assert claim.to_mapping()["figures"]["psnr_db"]["at"] == ["rows", 0] and claim.date == "2026-11-21"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('record = "r.json"\n', "", "lacks record"),
        ('gpu = "G"', "", "lacks gpu"),
        ('gpu = "G"', 'gpu = " "', "gpu is empty"),
        ('gpu = "G"', "gpu = 3", "gpu = 3: a text is needed"),
        ('gpu = "G"', 'gpu = "G"\ncuda = 1', "Unknown key of preset 'a': provenance 'cuda'"),
        ("2026-11-21", "21.11.2026", "write it as 2026-11-21"),
        ('"r.json"', '"../r.json"', "the name of a JSON file in scripts/results"),
        ("steps = 4", "steps = 0", "at least 1"),
        ("psnr_db = {", "# {", "figures is a table of at least one number"),
        ("value = 30,", "", "lacks value"),
        ("value = 30,", "value = 'x',", "a number is needed"),
        ('at = ["rows", 0]', "at = []", "a list of keys is needed"),
        ('at = ["rows", 0]', "at = [true]", "a list of keys is needed"),
        (
            'at = ["rows", 0], over',
            "ov = 1, over",
            "Unknown key of preset 'a': provenance: figure 'psnr_db' 'ov'",
        ),
        ('status = "measured"\n', "", "is provisional and has a provenance"),
        ('status = "measured"', 'status = "provisional"', "is provisional and has a provenance"),
    ],
)
def test_a_provenance_of_another_shape_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    (tmp_path / "my.toml").write_text(GOOD.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_preset(tmp_path / "my.toml")
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_claims_are_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[a]\nextends = 'tiny-wan-fast'\n[b]\nextends = 'tiny-wan'\n")
    a, b = (load_preset(f"{tmp_path / 'my.toml'}#{name}") for name in "ab")
    assert (a.status, a.level, a.provenance) == ("provisional", None, None)
    assert (b.status, b.level) == ("provisional", "exact")  # it asks for nothing that diffusers does not do


def test_replaced_values_leave_no_false_level() -> None:
    dense = load_preset("tiny-wan")
    assert dense.with_values({"generate.steps": 3}, "cli").level == "exact"
    assert dense.with_values({"sparse.keep": 0.5}, "cli").level is None
    assert load_preset("tiny-wan-fast").with_values({"sparse.keep": 0.5}, "cli").level == "fast"


def test_every_shipped_preset_says_its_level() -> None:
    endings = {"dense": "exact", "balanced": "balanced", "fast": "fast", "turbo": "turbo"}
    for name in preset_names():
        level = load_preset(name).level
        assert level is not None, name
        assert endings.get(name.rpartition("-")[2], level) == level, name
