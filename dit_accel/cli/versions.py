"""What is installed and where it runs, for run.json and `doctor`."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "dit-accel",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "triton",
    "safetensors",
    "numpy",
    "imageio",
    "av",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that bear on a result, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(pipe: Any) -> dict[str, Any]:
    """The device and dtype that a loaded pipeline really has."""
    import torch

    device = pipe._execution_device
    told = {
        "device": str(device),
        "dtype": str((pipe.transformer or pipe.transformer_2).dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        told["gpu"] = torch.cuda.get_device_name(device)
    else:
        told["threads"] = torch.get_num_threads()
    return told
