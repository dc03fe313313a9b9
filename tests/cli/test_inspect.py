"""`dit-accel inspect`: what was read, how much attention lies there, and the pictures of both."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel.cli.app import run
from dit_accel.errors import UsageError
from dit_accel.kernels.counting import count_pairs
from dit_accel.plan import BlockPlan
from dit_accel.quality.mask_pictures import draw_heat_map, draw_masks
from dit_accel.quality.recall import attention_recall, keep_by_head, sample_rows

SMALL = (
    "inspect",
    "--preset",
    "wan21-fast",
    "--size",
    "64x64",
    "--frames",
    "5",
    "--seed",
    "7",
    "--prompt",
    "x",
)
SPARSE = ("--set", "block=16", "--set", "min_tokens=0", "--set", "dense_above=1.0")


def look(*arguments: str | Path) -> int:
    return run([*SMALL, "--steps", "3", *SPARSE, *map(str, arguments)])


def test_keep_recall_and_pictures(wan21_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert look("--model", wan21_folder, "-o", out, "--set", "keep=0.25") == 0
    told = capsys.readouterr()
    names = ["inspect.json", "keep.png", "recall.png", "masks-layer-2.png", "masks-layer-3.png", "clip.mp4"]
    assert told.out.split() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert "of the attention" in told.err.splitlines()[-1]

    record = json.loads((out / "inspect.json").read_text())
    assert record["complete"] and record["prompts"] == ["x"] and record["seed"] == 7
    # 3 steps x 2 branches x 4 layers, of which the preset keeps the first two dense
    places = {(call["branch"], call["step"], call["layer"]) for call in record["calls"]}
    assert places == {(b, s, n) for b in ("cond", "uncond") for s in range(3) for n in (2, 3)}
    assert len(record["calls"]) == 12
    assert record["summary"]["keep"] == pytest.approx(record["report"]["keep"]["achieved"], abs=1e-4)
    for call in record["calls"]:
        assert len(call["keep"]) == len(call["recall"]) == 2, "one figure a head"
        # random weights attend almost evenly, so a plan covers about as much as it keeps
        assert all(abs(r - k) < 0.15 for r, k in zip(call["recall"], call["keep"], strict=True))
    for name in names[1:5]:
        assert np.asarray(Image.open(out / name)).std() > 0, name

    # keep=1 covers everything; every second step is measured; the earlier pictures make room
    more = ("--set", "keep=1.0", "--every", "2", "--layer", "3", "--json")
    assert look("--model", wan21_folder, "-o", out, *more) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / "inspect.json").read_text())
    measured = [call for call in record["calls"] if call["recall"] is not None]
    assert {call["step"] for call in measured} == {0, 2} and len(measured) == 8
    assert all(share == 1 for call in measured for share in (*call["keep"], *call["recall"]))
    assert not (out / "masks-layer-2.png").exists() and (out / "masks-layer-3.png").exists()


def test_both_experts_are_seen(wan22_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert look("--model", wan22_folder, "-o", out, "--rows", "0", "--guidance", "1", "-q") == 0
    assert capsys.readouterr().err == ""
    record = json.loads((out / "inspect.json").read_text())
    assert {call["role"] for call in record["calls"]} == {"transformer", "transformer_2"}
    assert record["summary"]["recall"] is None and not (out / "recall.png").exists()


def test_what_cannot_be_shown(wan21_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(*arguments: str | Path, code: int = 2) -> str:
        assert look("--model", wan21_folder, *arguments) == code
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: ")
        return told

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.png").write_text("mine")
    assert "no earlier inspect wrote" in refused("-o", tmp_path / "mine")
    assert "name a folder" in refused("-o", tmp_path / "a.mp4")
    assert "layers 0 to 3" in refused("-o", tmp_path / "a", "--layer", "9")
    told = refused("-o", tmp_path / "a", "--set", "min_tokens=100000", code=1)
    assert "nothing ran sparse" in told and "fewer than 100000 tokens" in told
    assert "--every 0" in refused("--every", "0")
    assert run(["inspect", "--preset", "wan21-dense", "--prompt", "x"]) == 2
    assert "is dense" in capsys.readouterr().err
    assert run(["inspect"]) == 2
    assert "--prompt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_ctrl_c_leaves_what_was_seen(start_cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    steps = ("--steps", "3000", *SPARSE, "--model", wan21_folder, "-o", "out")
    process = start_cli(*SMALL, *steps, cwd=tmp_path)
    assert process.stderr.readline().startswith("preset wan21-fast")  # torch is there, the run begins
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "what was seen until then is in out" in told and "Traceback" not in told
    record = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert not record["complete"] and 0 < max(call["step"] for call in record["calls"]) < 2999
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        Path(file).name for file in record["files"]
    )


def test_help_names_every_option(cli: Callable, tmp_path: Path) -> None:
    told = cli("inspect", "--help", cwd=tmp_path, COLUMNS="200").stdout
    for option in "--preset --prompt --rows --every --layer --output --json --set --device".split():
        assert option in told


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "orders of its own"])
def test_recall_is_the_mass_of_the_keys_that_are_read(lead: tuple[int, int], ordered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, tokens, heads, size = 2, 50, 3, 8
    query, key = (torch.randn(batch, tokens, heads, size, generator=generator) for _ in range(2))
    mask = torch.rand(*lead, 4, 5, generator=generator) < 0.5
    # blocks of unequal size, one of them empty
    plan = BlockPlan.from_mask(mask, [0, 13, 13, 29, 50], [0, 7, 20, 33, 49, 50])
    if ordered:
        q_order, k_order = (
            torch.rand(b, heads, tokens, generator=generator).argsort(-1).int() for b in (1, batch)
        )
        plan = replace(plan, q_order=q_order, k_order=k_order)
    rows = sample_rows(tokens, 20)
    found = attention_recall(query, key, plan, rows)

    attention = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()).div(size**0.5).softmax(-1)
    true = (attention * plan.to_token_mask()).sum(-1)[..., rows]
    torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-6)
    assert keep_by_head(plan).mean().item() == pytest.approx(int(count_pairs(plan)) / plan.n_pairs)


def test_recall_refuses_what_does_not_fit() -> None:
    plan = BlockPlan.full([0, 8], [0, 8])
    query = torch.randn(1, 9, 2, 4)
    with pytest.raises(UsageError, match="covers 8 query"):
        attention_recall(query, query, plan, sample_rows(9, 4))
    assert sample_rows(10, 4).tolist() == sample_rows(10, 4).tolist()
    assert sample_rows(10, 99).tolist() == list(range(10))


def test_pictures_of_any_size() -> None:
    """Forty layers, one cell, more blocks than pixels: labels inside the picture, masks to scale."""
    many = np.linspace(0, 1, 40 * 300).reshape(40, 300)
    many[:5] = np.nan
    assert draw_heat_map(many, "keep", missing="ran dense").width < 1500
    draw_heat_map(np.array([[0.5]]), "one")
    draw_heat_map(np.full((2, 2), np.nan), "none at all")
    picture = draw_masks([[np.eye(1000, 500, dtype=bool)]], "title", ["step 1"], ["head 0"])
    assert 420 < picture.height < 600 and picture.width < picture.height
    with pytest.raises(UsageError, match="label"):
        draw_masks([], "title", [], [])
