"""The Triton kernel where there is no GPU: interpreted, and cross-compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

# What a program may use of shared memory: sm_86 and sm_89 have the least, 99 KB.
SMALLEST_SHARED = 99 * 1024
LARGEST_SHARED = 227 * 1024  # sm_90


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def cannot_interpret() -> str:
    """Triton's interpreter before 3.7 sets array shapes in a way numpy 2.4 no longer allows."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    old = Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4.0")
    return "Triton before 3.7 cannot interpret with numpy 2.4" if old else ""


INTERPRETED = {
    "forward and plans": (
        "block_sparse",
        "feedback",
        "pv_skip",
        "tuning",
        "pooling",
        "selection",
        "counting",
        "quantize",
        "bitmaps",
        "coarse",
        "reorder",
        "kmeans",
    ),
    "backward": ("block_sparse_backward", "inversion"),
    "linear attention": ("linear_attention",),
}


WIDEST = 16  # bytes that a thread can move at once
# Kernels that move rows of a head's numbers, and so never need less.
ROWS_OF_NUMBERS = (
    "pooling",
    "coarse",
    "reordering",
    "quantising",
    "k-means, nearest",
    "k-means, rounding",
    "k-means, runs",
    "k-means, means",
)


@pytest.mark.skipif(bool(cannot_interpret()), reason=cannot_interpret() or "-")
@pytest.mark.parametrize("kernels", INTERPRETED.values(), ids=INTERPRETED)
def test_interpreted_kernel_passes_the_oracle_tests(kernels: tuple[str, ...]):
    told = run(
        *(
            "-P",
            "-m",
            "pytest",
            "-q",
            "-k",
            "triton",
            "-p",
            "no:cacheprovider",
            *(str(HERE / f"test_{kernel}.py") for kernel in kernels),
        ),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    # Ran, not skipped.
    assert " passed" in told and "skipped" not in told


@needs_triton
@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_compiles_without_spills(capability: int):
    """On the tensor cores, within the smallest chip's shared memory, asynchronous copies for 16-bit types."""
    told = run(str(HERE / "_compile_probe.py"), str(capability), "64,96,128,256")
    kernels = [json.loads(line) for line in told.splitlines()]
    assert len(kernels) == 21
    for kernel in kernels:
        # Without tensor cores (fp32), in the rarer forms and in one that was chosen by time, some compilers put a few
        # bytes on the stack.
        rare = kernel["dtype"] == "fp32" or kernel["head"] not in (64, 128)
        rare |= kernel["int8"] or kernel["pv_skip"]
        rare |= (capability, kernel["head"]) == (90, 128)
        assert kernel["stack"] <= (128 if rare else 0) and kernel["local"] == 0, kernel
        assert kernel["shared"] <= (LARGEST_SHARED if capability == 90 else SMALLEST_SHARED), kernel
        if kernel["dtype"] != "fp32":
            products = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma")
            assert kernel[products] and kernel["async"], kernel


def test_importing_kernels_imports_no_triton():
    run(
        "-P",
        "-c",
        "import sys, dit_accel.kernels, dit_accel.kernels.block_sparse as b\n"
        "import torch\n"
        "from dit_accel.plan import BlockPlan\n"
        "before = 'triton' in sys.modules\n"
        "q = torch.ones(1, 4, 1, 8)\n"
        "b.block_sparse(q, q, q, BlockPlan.full([0, 4], [0, 4]))\n"
        "assert not before and 'dit_accel.kernels.block_sparse.triton' not in sys.modules",
    )


def test_the_folder_is_not_mistaken_for_the_hub_package():
    root = HERE.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=HERE,
        check=False,
    )
    assert done.returncode != 0 and "This folder is the package dit_accel.kernels" in done.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_around_plans_compile_without_spills(capability: int):
    told = run(str(HERE / "_compile_probe.py"), str(capability), "plan")
    kernels = [json.loads(line) for line in told.splitlines()]
    assert len(kernels) == (31 if capability >= 89 else 29)
    for kernel in kernels:
        if "nearest" in kernel["kernel"] and "fp32" not in kernel["kernel"]:
            assert kernel["wgmma" if capability == 90 else "mma"] and kernel["async"], kernel
        assert kernel["stack"] == 0 and kernel["local"] == 0, kernel
        assert kernel["shared"] <= SMALLEST_SHARED, kernel
        if kernel["kernel"].startswith(ROWS_OF_NUMBERS):
            assert kernel["widest"] == WIDEST, kernel


@needs_triton
def test_linear_attention_compiles_without_spills():
    told = run(str(HERE / "_compile_probe.py"), "90", "linear")
    kernels = [json.loads(line) for line in told.splitlines()]
    assert len(kernels) == 3 * 5 + 4
    for kernel in kernels:
        # Products in float32 run on the scalar units, and with heads of 128 take more registers than there are.
        scalar = kernel["dtype"] == "fp32"
        allowed = 4096 if scalar else 0 if kernel["feature"] == "softmax" else 64
        assert kernel["stack"] <= allowed and kernel["local"] == 0, kernel
        assert kernel["shared"] <= SMALLEST_SHARED, kernel
        assert scalar or kernel["wgmma"] or kernel["mma"], kernel
        assert kernel["widest"] == WIDEST, kernel


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_backward_compiles_without_spills(capability: int):
    """On the tensor cores, with two sums in registers all the same; what is spilled on sm_90 lies outside of the loops
    but for one register, and its 227 KB of shared memory may be used."""
    told = run(str(HERE / "_compile_probe.py"), str(capability), "backward")
    kernels = [json.loads(line) for line in told.splitlines()]
    assert len(kernels) == 19
    for kernel in kernels:
        padded = kernel.get("head") == 96  # and so compiled with masks that other head sizes need not
        assert kernel["stack"] <= (0 if capability != 90 else 128 if padded else 64), kernel
        assert kernel["local"] == 0, kernel
        assert kernel["shared"] <= (LARGEST_SHARED if capability == 90 else SMALLEST_SHARED), kernel
        if kernel["dtype"] in ("bf16", "fp16"):
            fast = kernel["head"] <= 128
            assert kernel["wgmma" if capability == 90 and fast else "mma"] and kernel["async"] == fast, kernel
            assert max(kernel["spills_in_loop"], default=0) <= (4 if padded else 1), kernel


@needs_triton
def test_hopper_kernel_compiles_for_speed():
    """Exponentials lie between the two waits, where products run beneath them, or there are none but those by which
    rows fade; loading and computing warps share 512 registers a lane; the ring fits; nothing of a block is spilled."""
    told = run(str(HERE / "_compile_probe.py"), "90", "hopper")
    kernels = [json.loads(line) for line in told.splitlines()]
    forms = ("bf16", "fp16", "int8_fp8", "fp8", "int8")
    plain = [(tuple(x["block"]), x["even"], x["head"], x["dtype"]) for x in kernels if not x["feedback"]]
    assert plain == [
        (block, even, head, form)
        for block in ((128, 128), (128, 64), (64, 64))
        for even in (True, False)
        for head in (64, 128)
        for form in (forms if block == (128, 128) else ("bf16",))
    ]
    assert len(kernels) == len(plain) + 12
    for kernel in kernels:
        fp8_values = kernel["dtype"] in ("int8_fp8", "fp8")
        groups = kernel["overlapped_exponentials"]  # of each computing group: within a tile, and between two
        keys = kernel["block"][1]
        if fp8_values:
            assert kernel["exponentials_in_loop"] == [2, 2] and kernel["fp8_ones"] >= 2, kernel
        else:
            assert len(groups) == 4 and (keys == 64 or min(groups[::2]) >= 4), kernel
            assert kernel["exponentials_in_loop"] == [keys // 2 + 2] * 2, kernel
        assert kernel["stack"] <= 256 and kernel["local"] == 0, kernel
        # The assembler of Triton 3.8 and later keeps the weights twice for the product with ones.
        newer = tuple(map(int, kernel["triton"].split(".")[:2])) >= (3, 8)
        assert max(kernel["spills_in_loop"]) <= (64 if fp8_values and newer else 4), kernel
        stores = [True, True] if kernel["block"][0] == 128 else []  # of 64 rows: from registers
        assert kernel["stores_after_loop"] == stores, kernel
        assert kernel["shared"] <= LARGEST_SHARED, kernel
        assert ({24, 240} if fp8_values else {40, 232}) <= set(kernel["registers_set"]), kernel
        assert kernel["wgmma"] and kernel["async"] and not kernel["mma"], kernel
        products = {"int8_fp8": ["IGMMA", "QGMMA"], "fp8": ["QGMMA"], "int8": ["HGMMA", "IGMMA"]}
        assert kernel["products"] == products.get(kernel["dtype"], ["HGMMA"]), kernel
