"""Small random models in the layout of the real repositories, and the command line as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess]

# Nothing in a test may reach for the hub; a test that wants the answer of an unreachable hub unsets it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Tests run in as many processes as there are cores; threads within them would only wait for one another."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in child processes


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many cases of the laws each row of their table has been through."""
    passed = terminalreporter.stats.get("passed", [])
    ids = [report.nodeid.partition("[")[2] for report in passed if "tests/laws/" in report.nodeid]
    if not ids:
        return
    sys.path.insert(0, str(Path(__file__).parent / "laws"))
    from families import FAMILIES, MODELS
    from methods_table import METHODS

    rows = sorted((*FAMILIES, *MODELS), key=len, reverse=True)  # "wan-i2v" before "wan"
    found = Counter(next((row for row in rows if name.startswith(f"{row}-")), "no family") for name in ids)
    terminalreporter.write_line(
        f"laws: {len(ids)} cases passed, {len(METHODS)} methods; "
        + ", ".join(f"{row} {count}" for row, count in sorted(found.items()))
    )


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test that draws tensors draws the same ones in every run, alone or among others."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small operations: torch's threads would wait for one another at each, longest on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wan21_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.1: one transformer of four layers, sharded bf16 safetensors."""
    return save_wan(tmp_path_factory.mktemp("wan21"), two_experts=False)


@pytest.fixture(scope="session")
def wan22_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.2: two experts, sharded bf16 safetensors."""
    return save_wan(tmp_path_factory.mktemp("wan22"), two_experts=True)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX.1 dev of three layers, with its text encoders."""
    from dit_accel.testing import tiny_flux_with_text

    folder = tmp_path_factory.mktemp("flux")
    tiny_flux_with_text(guidance_embeds=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wan22_i2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.2 image to video: two experts that are given the picture as channels, no image encoder."""
    from diffusers import WanImageToVideoPipeline

    from dit_accel.testing import tiny_wan_pipeline

    # Wan 2.2 has the picture's channels, but no image encoder and no image tokens in its cross-attention
    parts = tiny_wan_pipeline(two_experts=True, transformer={"in_channels": 36, "num_layers": 4}).components
    pipe = WanImageToVideoPipeline(**parts, boundary_ratio=0.9)
    folder = tmp_path_factory.mktemp("wan22-i2v")
    pipe.save_pretrained(folder)
    return folder


def save_wan(folder: Path, *, two_experts: bool) -> Path:
    import torch

    from dit_accel.testing import tiny_wan_pipeline

    pipe = tiny_wan_pipeline(two_experts=two_experts, transformer={"num_layers": 4})
    pipe.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="session")
def cli_environment() -> dict[str, str]:
    """The environment of a user who is offline and whose terminal is 100 columns wide."""
    plain = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "CI")}
    return plain | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def cli(cli_environment: dict[str, str]) -> Cli:
    """Run `dit-accel` in a process of its own: `cli("generate", "--prompt", "x", cwd=folder)`."""

    def run(
        *arguments: str | Path, cwd: Path, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(*arguments),
            cwd=cwd,
            env=cli_environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="session")
def start_cli(cli_environment: dict[str, str]) -> Callable[..., subprocess.Popen]:
    """Start `dit-accel` and leave it running, with Ctrl-C as a terminal would deliver it."""

    def start(*arguments: str | Path, cwd: Path) -> subprocess.Popen:
        return subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env=cli_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
            # A test run in the background ignores SIGINT, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


@pytest.fixture(scope="session")
def terminal(cli_environment: dict[str, str]) -> Callable[..., tuple[int, str]]:
    """Run `dit-accel` on a pseudo-terminal; returns exit code and everything it showed there."""

    def run(*arguments: str | Path, cwd: Path, colours: bool = False) -> tuple[int, str]:
        environment = {
            key: value for key, value in cli_environment.items() if not (colours and key == "NO_COLOR")
        }
        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 100))
        process = subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env=environment | {"TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed: the process has ended
                break
            if not part:
                break
            shown += part
        os.close(ours)
        return process.wait(timeout=60), shown.decode(errors="replace")

    return run


def command(*arguments: str | Path) -> list[str]:
    # -P: the repository's root must not shadow Hugging Face's `kernels` when the tests run from there.
    return [sys.executable, "-P", "-m", "dit_accel.cli", *map(str, arguments)]
