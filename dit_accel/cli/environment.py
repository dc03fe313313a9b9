"""The environment block of a report: what `doctor` knows, and what of the chip changes its speed."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dit_accel
from dit_accel.bench.results import Check, Environment
from dit_accel.cli.versions import versions

if TYPE_CHECKING:
    import torch


def identify(device: torch.device) -> dict[str, Any]:
    """What must be alike in all parts of one measurement: `chip`, `versions` and `commit` of an `Environment`."""
    import torch

    gpu = device.type == "cuda"
    threads = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "chip": torch.cuda.get_device_name(device) if gpu else threads,
        "versions": versions(),
        "commit": find_commit(Path(dit_accel.__file__).resolve().parent.parent),
    }


def describe_environment(device: torch.device) -> Environment:
    """Examine this machine (a few seconds: every kernel is tested against its reference)."""
    import torch

    from dit_accel.cli.doctor import examine

    gpu = device.type == "cuda"
    told = _ask_driver(device) if gpu else {}
    return Environment(
        **identify(device),
        platform=platform.platform(),
        driver=told.get("driver_version"),
        cuda=torch.version.cuda if gpu else None,
        power_limit_watts=told.get("power.limit"),
        checks=tuple(Check(check.name, check.status, check.detail) for check in examine()),
    )


def find_commit(root: Path) -> str | None:
    """The commit of a checkout, with `+` when files differ from it; None where the folder is no git checkout."""
    if not (root / ".git").exists():
        return None  # an installed package may lie inside somebody else's checkout
    commit = _told_by("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit + ("+" if _told_by("git", "-C", str(root), "status", "--porcelain", "-uno") else "")


def _ask_driver(device: torch.device) -> dict[str, Any]:
    """Driver and power limit in watts, as far as the driver's own tool tells them."""
    import torch

    names = ("driver_version", "power.limit")
    # The tool counts all GPUs, torch only those that this process may see.
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _told_by("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", f"--id={gpu}")
    told: dict[str, Any] = dict(zip(names, (line or "").split(", "), strict=False))
    try:
        told["power.limit"] = float(told.get("power.limit", ""))
    except ValueError:
        told["power.limit"] = None
    return told


def _told_by(*command: str) -> str | None:
    """What a program prints; None where there is no such program, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
