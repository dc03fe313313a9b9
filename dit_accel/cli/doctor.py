"""`dit-accel doctor`: is this installation sound, and what can it run?"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Annotated

import typer

from dit_accel.cli.kernel_checks import Check, check_kernels
from dit_accel.cli.terminal import tables
from dit_accel.errors import DitAccelError

_NEEDED = {
    "torch": (2, 6),
    "numpy": (),
    "safetensors": (),
    "pillow": (),
    "av": (),
    "typer": (),
    "rich": (),
    "tqdm": (),
}
_EXTRA = {"diffusers": (0, 41), "transformers": (), "accelerate": (), "ftfy": (), "sentencepiece": ()}
_OPTIONAL = ("triton", "peft")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check interpreter, versions and GPU, and test every kernel against the reference (a few seconds)."""
    began = time.perf_counter()
    checks = examine()
    broken = [check for check in checks if check.status == "broken"]
    if as_json:
        told = {"sound": not broken, "seconds": round(time.perf_counter() - began, 2)}
        print(json.dumps({**told, "checks": [asdict(check) for check in checks]}, indent=2))
        return 1 if broken else 0
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "absent": "yellow", "broken": "bold red"}
    table = Table("check", "status", "detail")
    for check in checks:
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", escape(check.detail))
    console = tables()
    console.print(table)
    seconds = f"({time.perf_counter() - began:.1f} s)"
    if broken:
        console.print(f"{len(broken)} broken: {', '.join(check.name for check in broken)} {seconds}")
        return 1
    console.print(f"Sound {seconds}. Next: dit-accel generate --prompt 'a red star moving left' -o star.mp4")
    return 0


def examine() -> list[Check]:
    """Everything that is checked, in order."""
    return [*_interpreter(), *_packages(), *_gpus(), *check_kernels(), *_models()]


def _interpreter() -> Iterator[Check]:
    fits = sys.version_info >= (3, 11)
    yield Check("python", "ok" if fits else "broken", f"{platform.python_version()} at {sys.executable}")
    yield Check("platform", "ok", platform.platform())


def _packages() -> Iterator[Check]:
    for package, least in (_NEEDED | _EXTRA).items():
        extra = package in _EXTRA
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            install = "pip install 'dit-accel[diffusers]'" if extra else f"pip install {package}"
            yield Check(package, "absent" if extra else "broken", f"not installed: {install}")
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        if numbers < least:
            wanted = ".".join(map(str, least))
            yield Check(
                package,
                "broken",
                f"{version}, at least {wanted} is needed: pip install '{package}>={wanted}'",
            )
        else:
            yield Check(package, "ok", version)
    for package in _OPTIONAL:
        try:
            yield Check(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Check(package, "absent", "not installed (optional)")


def _gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("gpu", "absent", f"torch {torch.__version__} sees none; the CPU path is used")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Check(
            f"gpu {index}",
            "ok",
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}",
        )


def _models() -> Iterator[Check]:
    from dit_accel.pipelines.weights import locate
    from dit_accel.presets import shipped_models

    for model in shipped_models():
        try:
            yield Check(f"model {model}", "ok", str(locate(model)))
        except DitAccelError as error:
            yield Check(f"model {model}", "broken", str(error))
