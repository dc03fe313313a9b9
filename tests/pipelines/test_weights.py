"""Model folders are judged without torch: what is missing, cut, foreign or pickled is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_accel.errors import EnvironmentProblem, UnknownModelError, UsageError
from dit_accel.pipelines import wan
from dit_accel.pipelines.limits import SizeRule
from dit_accel.pipelines.weights import locate

SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def model(wan21_folder: Path, tmp_path: Path) -> Path:
    """A copy of the random Wan 2.1, to be damaged."""
    return Path(shutil.copytree(wan21_folder, tmp_path / "model"))


def shard_of(model: Path) -> Path:
    return sorted((model / "transformer").glob("*-00001-of-*.safetensors"))[0]


def test_the_folder_has_the_layout_of_the_real_repositories(wan21_folder: Path, wan22_folder: Path) -> None:
    for folder, experts in (
        (wan21_folder, ["transformer"]),
        (wan22_folder, ["transformer", "transformer_2"]),
    ):
        for expert in experts:
            assert len(list((folder / expert).glob("*.safetensors"))) > 1
        header = json.loads(shard_of(folder).read_bytes()[8:].split(b"}}")[0] + b"}}")
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"BF16", "F32"}
        assert wan.find(str(folder)) == folder


def test_a_cut_shard(model: Path) -> None:
    shard = shard_of(model)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(EnvironmentProblem, match=r"corrupt weights: .*bytes where its header declares"):
        wan.find(str(model))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\x00" * 64, b"\xff" * 64, b"not weights at all" * 9])
def test_a_file_that_is_no_safetensors(model: Path, content: bytes) -> None:
    shard_of(model).write_bytes(content)
    with pytest.raises(EnvironmentProblem, match="corrupt weights"):
        wan.find(str(model))


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": 3}', b'{"a": {"data_offsets": 5}}', b'{"a": {"data_offsets": []}}']
)
def test_a_header_of_the_wrong_shape(model: Path, header: bytes) -> None:
    shard_of(model).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(EnvironmentProblem, match="corrupt weights"):
        wan.find(str(model))


def test_a_missing_shard(model: Path) -> None:
    shard_of(model).unlink()
    with pytest.raises(EnvironmentProblem, match="weights missing: .*-00001-of-"):
        wan.find(str(model))


def test_pickled_weights_are_not_opened(model: Path) -> None:
    for file in (model / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(EnvironmentProblem, match="only pickled weights .*can run code"):
        wan.find(str(model))


def test_missing_parts(model: Path) -> None:
    shutil.rmtree(model / "vae")
    with pytest.raises(EnvironmentProblem, match=r"vae/ \(AutoencoderKLWan\) is missing"):
        wan.find(str(model))
    (model / "model_index.json").write_text("{")
    with pytest.raises(EnvironmentProblem, match="not valid JSON"):
        wan.find(str(model))
    (model / "model_index.json").unlink()
    with pytest.raises(EnvironmentProblem, match=r"model_index\.json is missing"):
        wan.find(str(model))
    with pytest.raises(EnvironmentProblem, match="is a file"):
        locate(str(model / "vae.txt" if (model / "vae.txt").write_text("x") else ""))


def test_another_family(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps(index | {"transformer": ["diffusers", "HunyuanDiT2D"]})
    )
    with pytest.raises(UnknownModelError, match=r"its transformer is a HunyuanDiT2D.*WanTransformer3DModel"):
        wan.find(str(model))
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UnknownModelError, match="is a FluxPipeline; the recipe 'wan' drives WanPipeline"):
        wan.find(str(model))


def test_no_such_model() -> None:
    with pytest.raises(EnvironmentProblem, match="no model at ./nowhere"):
        locate("./nowhere")


def test_an_unreachable_hub_is_given_up_in_time(tmp_path: Path) -> None:
    """The hub's address is a local port that accepts and never answers: the worst a network can do."""
    code = (
        "import socket, sys, os\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "os.environ |= {'HF_ENDPOINT': f'http://127.0.0.1:{server.getsockname()[1]}', 'HF_HOME': sys.argv[1]}\n"
        "os.environ['HF_HUB_OFFLINE'] = sys.argv[2]\n"
        "from dit_accel.cli.app import run\n"
        "sys.exit(run(['generate', '--preset', 'wan21-fast', '--prompt', 'x', '-o', sys.argv[1] + '/x.mp4']))\n"
    )

    def ask(online: bool) -> tuple[float, subprocess.CompletedProcess[str]]:
        command = [sys.executable, "-P", "-c", code, tmp_path, str(int(not online))]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        return time.monotonic() - began, done

    without, _ = ask(online=False)  # what the program itself takes, on a machine that may be busy
    seconds, done = ask(online=True)
    assert done.returncode == 3
    assert done.stderr.startswith("error: Wan-AI/Wan2.1-T2V-14B-Diffusers is not in the local cache")
    assert "hub cannot be used" in done.stderr and done.stderr.count("\n") == 1
    assert seconds < 2 * without + 6
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((130, 128, 9), "nearest is 128x128"),
        ((128, 121, 9), "nearest is 128x128"),
        ((3, 3, 9), "nearest is 16x16"),
        ((128, 128, 10), "nearest are 9 and 13"),
        ((128, 128, 12), "nearest are 9 and 13"),
        ((128, 128, 2), "nearest are 1 and 5"),
    ],
)
def test_the_nearest_legal_size_is_told(given: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SizeRule(16, 16, 4).check(*given)


def test_legal_sizes_pass() -> None:
    for frames in (1, 5, 81):
        SizeRule(16, 16, 4).check(832, 480, frames)


def test_the_size_rule_from_files_is_that_of_the_pipeline(wan21_folder: Path) -> None:
    assert wan.size_rule(wan21_folder) == wan.size_rule_of(wan.load(wan21_folder)) == SizeRule(16, 16, 4)
