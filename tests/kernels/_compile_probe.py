"""Cross-compile the Triton kernel for a GPU that is not here; prints one JSON line per configuration.

Run as a script: a process that interprets Triton kernels cannot compile them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_accel.kernels.block_sparse import triton as kernel

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {"lse": "*fp32", "counts": "*i32", "indices": "*i32", "q_starts": "*i32", "k_starts": "*i32"}


def compile_for(capability: int, head: int, dtype: torch.dtype) -> dict:
    """Registers, stack bytes, shared bytes and matrix instructions of one configuration."""
    config = kernel.config_for(head, dtype)
    constants = {
        **{"HEAD": head, "BLOCK_D": kernel.padded_head(head), "BLOCK_M": config.block_m},
        **{"BLOCK_N": config.block_n, "STEPS": -(-128 // config.block_n), "UPCAST": False},
        # A launch specialises on these: the head dimension is contiguous in every layout.
        **{f"stride_{x}d": 1 for x in "qkvo"},
    }
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.block_sparse_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("q", "k", "v", "out"):
            signature[name] = "*" + TYPES[dtype]
        else:
            signature[name] = POINTERS.get(name, "fp32" if name == "scale_log2" else "i32")
        if name != "scale_log2" and name not in kernel.UNSPECIALIZED:
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.block_sparse_kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        **{"triton": triton.__version__, "capability": capability, "head": head, "dtype": TYPES[dtype]},
        **{**numbers, "shared": compiled.metadata.shared},
        **{"wgmma": "wgmma" in ptx, "mma": "mma.sync" in ptx, "async": "cp.async" in ptx},
    }


if __name__ == "__main__":
    for capability in map(int, sys.argv[1].split(",")):
        for dtype in TYPES:
            for head in map(int, sys.argv[2].split(",")):
                print(json.dumps(compile_for(capability, head, dtype)), flush=True)
