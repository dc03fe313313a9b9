"""Nobody is asked for anything unless a model id is: importing, and every verb on the models that are shipped.

An audit hook of Python itself looks on, below every library: names looked up, connections made, and shells started are
written down and refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WATCH = """
import json, sys
def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto", "socket.gethostbyname", "os.system"):
        if not (event == "socket.connect" and isinstance(args[1], (str, bytes))):  # a file's name: no network
            with open(sys.argv[1], "a") as file:
                file.write(json.dumps([event, str(args[-1])]) + "\\n")
            raise PermissionError(f"{event} is watched")
sys.addaudithook(watch)
"""
CLI = "from dit_accel.cli.app import run; sys.exit(run(sys.argv[2:]))"
IMPORTS = (
    "import dit_accel, dit_accel.cli, dit_accel.handle, dit_accel.processor, dit_accel.integrations.vllm_omni\n"
    "[getattr(dit_accel, name) for name in dit_accel.__all__]"
)
SHORT = ("--steps", "2", "--seed", "1", "-q")
VERBS = {
    "help": ("--help",),
    "doctor": ("doctor",),
    "presets list": ("presets", "list"),
    "presets show": ("presets", "show", "tiny-wan-fast"),
    "dry run": ("generate", "--preset", "wan21-fast", "--prompt", "a star", "--dry-run"),
    "estimate": ("estimate", "--preset", "wan21-fast", "--gpu", "h100"),
    "a picture": ("generate", "--preset", "tiny-sd3-fast", "--prompt", "a star", *SHORT, "-o", "{out}/star.png"),
    "a clip": ("generate", "--preset", "tiny-wan-fast", "--prompt", "a star", *SHORT, "-o", "{out}/star.mp4"),
    "inspect": ("inspect", "--preset", "tiny-sd3-fast", "--prompt", "a star", *SHORT, "-o", "{out}/seen"),
    "compare": ("compare", "{star}", "{star}"),
}


def watched(folder: Path, code: str, *arguments: str) -> tuple[subprocess.CompletedProcess, list]:
    """Run code under the watch, with the hub's libraries free to try. Returns it, and what was tried."""
    seen = folder / "seen.jsonl"
    free = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", WATCH + code, str(seen), *arguments],
        env={**free, "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    lines = seen.read_text(encoding="utf-8").splitlines() if seen.exists() else []
    return done, [json.loads(line) for line in lines]


def test_importing_asks_nobody(tmp_path: Path) -> None:
    done, seen = watched(tmp_path, IMPORTS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not seen


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_what_is_shipped_asks_nobody(verb: str, tmp_path: Path) -> None:
    from PIL import Image

    star = tmp_path / "given.png"
    Image.new("RGB", (64, 64), "navy").save(star)
    arguments = [word.format(out=tmp_path, star=star) for word in VERBS[verb]]
    done, seen = watched(tmp_path, CLI, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not seen


def test_a_model_id_asks_the_hub_and_the_watch_sees_it(tmp_path: Path) -> None:
    """The watch can fail a test: with an id, a name is looked up."""
    words = ("generate", "--preset", "wan21-fast", "--model", "someone/some-model", "--prompt", "a star", *SHORT)
    done, seen = watched(tmp_path, CLI, *words, "-o", str(tmp_path / "star.mp4"))
    assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert any(event in ("socket.getaddrinfo", "socket.connect") for event, _ in seen)
    assert not list(tmp_path.glob("star*"))
