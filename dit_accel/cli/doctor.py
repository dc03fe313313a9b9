"""`dit-accel doctor`: is this installation sound, and what can it run?"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated

import typer

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


@dataclass(frozen=True)
class Check:
    """One line of the answer."""

    name: str
    status: str  # "ok" | "absent": not usable here, and nothing to mend | "broken"
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check interpreter, versions and GPU, and test every kernel against the reference (a few seconds)."""
    began = time.perf_counter()
    checks = [*_interpreter(), *_packages(), *_gpus(), *_kernels(), *_models()]
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


def _kernels() -> Iterator[Check]:
    from dit_accel.options import IMPLS

    for impl in IMPLS:
        if impl == "auto":
            continue
        try:
            yield _test_kernel(impl)
        except Exception as error:  # a compiler can fail in any way; the line must come all the same
            text = str(error).strip().splitlines()
            yield Check(
                f"block_sparse/{impl}",
                "broken",
                f"{type(error).__name__}: {text[0] if text else 'no message'}",
            )


def _test_kernel(impl: str) -> Check:
    """Run one executor on a small ragged problem and compare it with the reference in fp64."""
    import torch

    from dit_accel.kernels.block_sparse import block_sparse, why_not
    from dit_accel.plan import BlockPlan

    name = f"block_sparse/{impl}"
    device = torch.device("cuda" if torch.cuda.is_available() and impl != "cpu" else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and impl == "triton" else torch.float32
    generator = torch.Generator("cpu").manual_seed(0)
    tokens, block, heads, width = 301, 64, 2, 64
    q, k, v = (torch.randn(1, tokens, heads, width, generator=generator) for _ in range(3))
    starts = [*range(0, tokens, block), tokens]
    n = len(starts) - 1
    mask = torch.rand(1, heads, n, n, generator=generator) < 0.5
    mask[..., 0] = True
    plan = BlockPlan.from_mask(mask, starts, starts)
    exact, exact_lse = block_sparse(*(x.to(dtype).double() for x in (q, k, v)), plan, impl="reference")
    inputs = [x.to(device, dtype) for x in (q, k, v)]
    there = BlockPlan.from_mask(mask.to(device), starts, starts)
    reason = why_not(impl, *inputs, there)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    out, lse = block_sparse(*inputs, there, impl=impl)
    error = (out.double().cpu() - exact).abs().max().item() / exact.abs().max().item()
    lse_error = (lse.double().cpu() - exact_lse).abs().max().item()
    seconds = time.perf_counter() - began
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
    told = f"{str(dtype).removeprefix('torch.')} on {device}: relative error {error:.1e}, lse {lse_error:.1e}"
    told += f", {seconds:.1f} s"
    # Written so that NaN is a failure.
    sound = error <= allowed and lse_error <= allowed
    return Check(
        name, "ok" if sound else "broken", told if sound else f"{told}; at most {allowed:g} is allowed"
    )


def _models() -> Iterator[Check]:
    from dit_accel.pipelines.weights import locate
    from dit_accel.presets import shipped_models

    for model in shipped_models():
        try:
            yield Check(f"model {model}", "ok", str(locate(model)))
        except DitAccelError as error:
            yield Check(f"model {model}", "broken", str(error))
