"""Cross-compile the Triton kernels for a GPU that is not here; prints one JSON line per configuration.

Run as a script: a process that interprets Triton kernels cannot compile them.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_accel.kernels.bitmaps import triton as bitmaps
from dit_accel.kernels.block_sparse import triton as kernel
from dit_accel.kernels.block_sparse.backward import key_kernel, query_kernel
from dit_accel.kernels.block_sparse.backward import triton as backward
from dit_accel.kernels.coarse import triton as coarse
from dit_accel.kernels.compaction import triton as compaction
from dit_accel.kernels.counting import triton as counting
from dit_accel.kernels.inversion import triton as inversion
from dit_accel.kernels.kmeans import triton as kmeans
from dit_accel.kernels.linear_attention import backward_kernels, forward_kernels
from dit_accel.kernels.linear_attention import triton as linear
from dit_accel.kernels.pooling import triton as pooling
from dit_accel.kernels.quantize import MODES
from dit_accel.kernels.quantize import triton as quantize
from dit_accel.kernels.reorder import triton as reorder
from dit_accel.kernels.selection import triton as selection

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLOATS = ("scale_log2", "threshold")
POINTERS = dict.fromkeys(("lse", "q_scale", "k_scale", "shift"), "*fp32") | {"needed": "*u8"}
POINTERS |= dict.fromkeys(("counts", "indices", "q_starts", "k_starts"), "*i32")


def compile_for(
    capability: int,
    head: int,
    dtype: torch.dtype,
    feedback: bool,
    int8: bool = False,
    pv_skip: bool = False,
) -> dict:
    """Registers, stack bytes, shared bytes and matrix instructions of one configuration."""
    config = kernel.config_for(head, dtype, capability)
    constants = {
        **{"HEAD": head, "BLOCK_D": kernel.padded_head(head), "BLOCK_M": config.block_m},
        **{"BLOCK_N": config.block_n, "STEPS": -(-128 // config.block_n), "UPCAST": False},
        **{"FEEDBACK": feedback, "PV_SKIP": pv_skip, "RESERVED": 128 if int8 else 0},
        "STAGES": config.stages,
        # A launch specialises on these: the head dimension is contiguous in every layout.
        **{f"stride_{x}d": 1 for x in "qkvo"},
    }
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.block_sparse_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("q", "k", "v", "out"):
            signature[name] = "*i8" if int8 and name in "qk" else "*" + TYPES[dtype]
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in FLOATS else "i32")
        if name not in FLOATS and name not in kernel.UNSPECIALIZED:
            aligned[(position,)] = [["tt.divisibility", 16]]
    told = compile_source(
        kernel.block_sparse_kernel, signature, constants, aligned, config.warps, config.stages, capability
    )
    form = {"feedback": feedback, "int8": int8, "pv_skip": pv_skip}
    return {"head": head, "dtype": TYPES[dtype], **form, **told}


def compile_backward(capability: int) -> Iterator[dict]:
    """The kernels of the backward in every configuration, and those that invert plans."""
    forms = [(head, torch.bfloat16, longest) for head in (64, 128) for longest in (64, 128)]
    forms += [
        (64, torch.float16, 128),
        (128, torch.float32, 128),
        (96, torch.bfloat16, 64),
        (256, torch.bfloat16, 128),
    ]
    for head, dtype, longest in forms:
        for name, launched, free, table in (
            ("queries", query_kernel.query_gradients_kernel, query_kernel.UNSPECIALIZED, backward.QUERIES),
            ("keys", key_kernel.key_gradients_kernel, key_kernel.UNSPECIALIZED, backward.KEYS),
        ):
            config = backward.config_for(table, head, dtype, longest, capability)
            sides = ("ROWS", "COLUMNS") if name == "queries" else ("COLUMNS", "ROWS")
            constants = dict(zip(sides, (config.rows, config.step), strict=True))
            constants |= {"HEAD": head, "BLOCK_D": backward.padded_head(head), "UPCAST": False}
            constants |= {"STEPS": -(-longest // config.step), "STAGES": config.stages}
            constants |= {x: 1 for x in launched.arg_names if x.startswith("stride_") and x.endswith("d")}
            pointers = dict.fromkeys(("grad_out", "q", "k", "v", "out", "dq", "dk", "dv"), f"*{TYPES[dtype]}")
            pointers |= dict.fromkeys(("grad_lse", "lse", "delta", "chunks"), "*fp32")
            pointers |= dict.fromkeys(("counts", "indices", "q_starts", "k_starts", "lists", "items"), "*i32")
            pointers |= {"scale": "fp32", "scale_log2": "fp32"}
            signature, aligned = sign(launched, pointers, constants, free)
            told = compile_source(
                launched, signature, constants, aligned, config.warps, config.stages, capability
            )
            yield {"kernel": name, "head": head, "dtype": TYPES[dtype], "longest": longest, **told}
    pointers = {"chunks": "*fp32", "dk": "*bf16", "dv": "*bf16", "items": "*i32", "k_starts": "*i32"}
    constants = {"HEAD": 128, "BLOCK_D": 128, "COLUMNS": backward.SUM_ROWS, "stride_dd": 1, "stride_ed": 1}
    others = [
        ("sums of chunks", key_kernel.sum_chunks_kernel, key_kernel.SUM_UNSPECIALIZED, pointers, constants)
    ]
    pointers = dict.fromkeys(("bits", "counts", "lists", "items"), "*i32")
    constants = {"ROWS": inversion.ROWS}
    others.append(
        ("columns", inversion.read_columns_kernel, inversion.READ_UNSPECIALIZED, pointers, constants)
    )
    constants = {"SHORTEST": inversion.SHORTEST, "FIELDS": inversion.FIELDS, "BLOCK_K": 1024, "BLOCK_W": 2048}
    others.append(("cuts", inversion.cut_columns_kernel, inversion.CUT_UNSPECIALIZED, pointers, constants))
    for name, launched, free, pointers, constants in others:
        signature, aligned = sign(launched, pointers, constants, free)
        told = compile_source(launched, signature, constants, aligned, 4, 3, capability)
        yield {"kernel": name, "dtype": "", **told}


def compile_plan_kernels(capability: int) -> Iterator[dict]:
    """The kernels that build plans, in the forms in which the methods launch them."""
    for dim, dtype in ((64, "bf16"), (128, "bf16"), (128, "fp32")):
        of = "values" if dtype == "fp32" else "deviations" if dim == 64 else "directions"
        constants = {"STEPS": 2, "DIM": dim, "BLOCK_D": dim, "ROWS": pooling.ROWS, "stride_xd": 1}
        constants |= {"OF": of, "CENTERED": of != "values"}
        pointers = {"x": f"*{dtype}", "starts": "*i32", "out": "*fp32", "center": "*fp32"}
        signature, aligned = sign(pooling.block_means_kernel, pointers, constants, pooling.UNSPECIALIZED)
        told = compile_source(pooling.block_means_kernel, signature, constants, aligned, 4, 3, capability)
        yield {"kernel": f"pooling D={dim} {dtype}", **told}
    pointers = dict.fromkeys(("counts", "indices", "q_starts", "k_starts"), "*i32") | {"pairs": "*i64"}
    constants = {"ENTRIES": counting.ENTRIES}
    signature, aligned = sign(counting.count_pairs_kernel, pointers, constants, counting.UNSPECIALIZED)
    told = compile_source(counting.count_pairs_kernel, signature, constants, aligned, 1, 3, capability)
    yield {"kernel": "counting", **told}
    pointers = dict.fromkeys(("counts", "indices", "new_counts", "new_indices"), "*i32")
    pointers |= dict.fromkeys(("needed", "forced"), "*i1")
    constants = {"ENTRIES": compaction.ENTRIES, "FORCED": True}
    signature, aligned = sign(compaction.compact_lists_kernel, pointers, constants, compaction.UNSPECIALIZED)
    told = compile_source(compaction.compact_lists_kernel, signature, constants, aligned, 1, 3, capability)
    yield {"kernel": "compaction", **told}
    pointers = dict.fromkeys(("counts", "indices", "bits"), "*i32")
    constants = {"BLOCK_W": 32, "ENTRIES": bitmaps.ENTRIES}
    signature, aligned = sign(bitmaps.pack_kernel, pointers, constants, bitmaps.PACK_UNSPECIALIZED)
    told = compile_source(bitmaps.pack_kernel, signature, constants, aligned, 1, 3, capability)
    yield {"kernel": "bitmaps, packing", **told}
    constants = {"WORDS": bitmaps.WORDS}
    signature, aligned = sign(bitmaps.unpack_kernel, pointers, constants, ("n_k", "words"))
    told = compile_source(bitmaps.unpack_kernel, signature, constants, aligned, 1, 3, capability)
    yield {"kernel": "bitmaps, unpacking", **told}
    pointers = {"out": "*bf16", "starts": "*i32", "above": "*fp32", "mixed_in": "*fp32"}
    constants = {"STEPS": 4, "DIM": 128, "BLOCK_D": 128, "ROWS": coarse.MIXED_ROWS, "stride_od": 1}
    signature, aligned = sign(coarse.mix_kernel, pointers, constants, coarse.UNSPECIALIZED)
    told = compile_source(coarse.mix_kernel, signature, constants, aligned, 4, 3, capability)
    yield {"kernel": "coarse, mixing", **told}
    for dim in (64, 128):
        pointers = dict.fromkeys(("out", "q", "keys", "values"), "*bf16") | {"starts": "*i32"}
        pointers |= {"lse": "*fp32", "coarse": "*fp32", "scale_log2": "fp32"}
        constants = {"DIM": dim, "BLOCK_D": dim, "ROWS": coarse.ROWS, "MEANS": coarse.MEANS}
        constants |= {"LOG2_E": coarse.LOG2_E, "stride_od": 1, "stride_qd": 1}
        signature, aligned = sign(coarse.attend_on_kernel, pointers, constants, coarse.ON_UNSPECIALIZED)
        warps, stages = coarse.launch_of(dim)
        told = compile_source(
            coarse.attend_on_kernel, signature, constants, aligned, warps, stages, capability
        )
        yield {"kernel": f"coarse, attending D={dim}", **told}
    for take in (True, False):
        pointers = {"x": "*bf16", "order": "*i32", "out": "*bf16"}
        constants = {"TAKE": take, "DIM": 128, "BLOCK_D": 128, "ROWS": reorder.rows_for(128)}
        constants |= {"stride_xd": 1, "stride_on": 1}
        signature, aligned = sign(reorder.copy_rows_kernel, pointers, constants, reorder.UNSPECIALIZED)
        told = compile_source(reorder.copy_rows_kernel, signature, constants, aligned, 4, 3, capability)
        yield {"kernel": f"reordering, {'taking' if take else 'putting'}", **told}
    pointers = {"x": "*bf16", "out": "*fp32", "starts": "*i32"}
    constants = {"ROWS": quantize.ROWS, "HEAD": 128, "stride_xd": 1}
    signature, aligned = sign(quantize.channel_peaks_kernel, pointers, constants, quantize.UNSPECIALIZED)
    told = compile_source(
        quantize.channel_peaks_kernel, signature, constants, aligned, quantize.WARPS, 3, capability
    )
    yield {"kernel": "quantising, peaks", **told}
    for mode in MODES.values():
        if capability < 89 and torch.float8_e4m3fn in (mode.scores, mode.values):
            continue
        pointers = dict.fromkeys(("q", "k", "v"), "*bf16") | dict.fromkeys(("q_starts", "k_starts"), "*i32")
        pointers |= dict.fromkeys(("mean", "peaks", "q_scale", "shift", "k_scale", "v_scale"), "*fp32")
        names = {torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv", None: "*bf16"}
        pointers |= {"q8": names[mode.scores], "k8": names[mode.scores], "v8": names[mode.values]}
        constants = {"INTEGERS": mode.scores == torch.int8, "FP8_VALUES": mode.values is not None}
        constants |= {"SMALLEST": quantize.SMALLEST_SCALE, "ROWS": quantize.ROWS, "HEAD": 128}
        constants |= {f"stride_{x}d": 1 for x in "qkv"}
        signature, aligned = sign(quantize.quantize_kernel, pointers, constants, quantize.UNSPECIALIZED)
        told = compile_source(
            quantize.quantize_kernel, signature, constants, aligned, quantize.WARPS, 3, capability
        )
        yield {"kernel": f"quantising, {mode.name}", **told}
    for padded, forced, top_p in ((64, True, False), (1024, True, True), (4096, False, True)):
        constants = {"FORCED": forced, "TOP_P": top_p, "PADDED": padded}
        constants |= {"LEAST_THERE": False, "TOP_P_THERE": False, "ABOVE_THERE": False, "ABOVE": top_p}
        pointers = {"scores": "*fp32", "forced": "*i1" if forced else "*fp32", "shares": "*fp32"}
        pointers |= {"counts": "*i32", "indices": "*i32", "top_p": "fp32", "above": "fp32"}
        signature, aligned = sign(
            selection.select_blocks_kernel, pointers, constants, selection.UNSPECIALIZED
        )
        warps = selection.warps_for(padded)
        told = compile_source(
            selection.select_blocks_kernel, signature, constants, aligned, warps, 3, capability
        )
        yield {"kernel": f"selection of {padded}", **told}
    yield from compile_kmeans(capability)


def compile_kmeans(capability):
    """Of the kernels that cluster tokens, the forms that a model in bf16 launches, and their products in fp32."""
    for dim, dtype in (
        (64, torch.bfloat16),
        (128, torch.float16),
        (256, torch.bfloat16),
        (64, torch.float32),
    ):
        config = kmeans.config_for(dim, dtype)
        pointers = {
            "x": f"*{TYPES[dtype]}",
            "rounded": f"*{TYPES[dtype]}",
            "halves": "*fp32",
            "labels": "*i32",
        }
        constants = {"DIM": dim, "BLOCK_D": dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        constants |= {"UPCAST": False, "stride_xd": 1}
        signature, aligned = sign(kmeans.nearest_kernel, pointers, constants, kmeans.NEAREST_UNSPECIALIZED)
        told = compile_source(
            kmeans.nearest_kernel, signature, constants, aligned, config.warps, config.stages, capability
        )
        yield {"kernel": f"k-means, nearest of D={dim} {TYPES[dtype]}", **told}
    shape = {"DIM": 128, "BLOCK_D": 128, "BINS": 1024, "RUN": kmeans.RUN, "ROWS": kmeans.ROWS}
    lanes, chunk = {"DIM": 128, "BLOCK_D": 128}, {"CHUNK": kmeans.CHUNK}
    sort, runs = kmeans.SORT_UNSPECIALIZED, kmeans.RUNS_UNSPECIALIZED
    kernels = {
        "rounding": (
            kmeans.round_kernel,
            {**lanes, "ROWS": kmeans.ROWS, "stride_cd": 1},
            kmeans.ROUND_UNSPECIALIZED,
        ),
        "counts": (kmeans.count_labels_kernel, {"BINS": 1024, **chunk}, sort),
        "chunks": (kmeans.sum_chunks_kernel, {"COLUMNS": kmeans.COLUMNS, "CHUNKS": kmeans.CHUNKS}, sort),
        "clusters": (kmeans.sum_clusters_kernel, {"BINS": 1024}, sort),
        "places": (kmeans.place_tokens_kernel, {"COMPARED": kmeans.COMPARED, **chunk}, sort),
        "runs": (kmeans.sum_runs_kernel, {**shape, "stride_xd": 1}, runs),
        "overlaps": (
            kmeans.overlaps_kernel,
            {"CLUSTERS": kmeans.CLUSTERS, "COLUMNS": 128},
            kmeans.OVERLAPS_UNSPECIALIZED,
        ),
        "means": (kmeans.sum_means_kernel, {**shape, "stride_pd": 1}, kmeans.MEANS_UNSPECIALIZED),
    }
    for name, (launched, constants, free) in kernels.items():
        integers = ("labels", "counts", "totals", "starts", "before", "order", "edges")
        pointers = dict.fromkeys(integers, "*i32") | dict.fromkeys(("sums", "out", "halves"), "*fp32")
        pointers |= dict.fromkeys(("x", "centroids", "rounded", "previous"), "*bf16")
        signature, aligned = sign(launched, pointers, constants, free)
        warps = 8 if name == "places" else 4
        told = compile_source(launched, signature, constants, aligned, warps, 3, capability)
        yield {"kernel": f"k-means, {name}", **told}


def compile_linear(capability: int) -> Iterator[dict]:
    """Linear attention forward and backward, in the forms that a model launches."""
    backs = backward_kernels
    kernels = {
        "states": (forward_kernels.states_kernel, forward_kernels.STATES_UNSPECIALIZED, {"STEPS": 2}),
        "read": (forward_kernels.read_kernel, forward_kernels.READ_UNSPECIALIZED, {"STEPS": 2}),
        "read_backward": (backs.read_backward_kernel, backs.READ_BACKWARD_UNSPECIALIZED, {"STEPS": 2}),
        "states_backward": (backs.states_backward_kernel, backs.STATES_BACKWARD_UNSPECIALIZED, {"STEPS": 2}),
    }
    forms = [(64, torch.bfloat16, "softmax"), (128, torch.bfloat16, "softmax")]
    forms += [(128, torch.float16, "elu"), (128, torch.float32, "softmax")]
    for (head, dtype, feature), (name, (launched, free, more)) in itertools.product(forms, kernels.items()):
        # In float32 the states are projected instead.
        for projected in (False, True) if name == "read" and dtype != torch.float32 else (False,):
            operands = torch.float32 if dtype == torch.float32 else torch.bfloat16
            config = linear.config_for(name, head, operands)
            constants = {"FEATURE": feature, "DIM": head, "ROWS": config.rows, "INTERPRETED": False, **more}
            constants |= {"OPERANDS": linear.NAMES[operands]}
            constants |= {"WEIGHT": projected, "BIAS": projected, "ADD": projected} if name == "read" else {}
            names = set(launched.arg_names)
            ends = ("qd", "kd", "vd", "od", "gd", "dd", "dkd", "dvd")
            constants |= {f"stride_{end}": 1 for end in ends if f"stride_{end}" in names}
            pointers = dict.fromkeys(("q", "k", "v", "out", "grad", "d_q", "d_k", "d_v"), f"*{TYPES[dtype]}")
            pointers |= dict.fromkeys(("states", "d_states", "weight"), f"*{TYPES[operands]}")
            pointers |= dict.fromkeys(("sums", "d_sums", "bias"), "*fp32") | {"starts": "*i32", "eps": "fp32"}
            signature, aligned = sign(launched, pointers, constants, free)
            told = compile_source(
                launched, signature, constants, aligned, config.warps, config.stages, capability
            )
            form = {"head": head, "dtype": TYPES[dtype], "feature": feature, "projected": projected}
            yield {"kernel": name, **form, **told}


def compile_hopper() -> Iterator[dict]:
    """The Gluon kernel for sm_90, in every form in which it is launched."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from dit_accel.kernels.block_sparse import hopper
    from dit_accel.kernels.block_sparse.hopper_kernel import block_sparse_kernel
    from dit_accel.kernels.block_sparse.hopper_tiles import UNSPECIALIZED

    forms = {"bf16": (torch.bfloat16,) * 3, "fp16": (torch.float16,) * 3}
    forms |= {m.name: (torch.bfloat16, m.scores, m.values or torch.bfloat16) for m in MODES.values()}
    names = {**TYPES, torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}
    rows = hopper.ROWS.value
    shapes = ((128, 128), (128, 64), (64, 64))  # query and key rows of a block
    grid = itertools.product(shapes, (True, False), hopper.HEADS, forms.items(), (False, True))
    for block, even, head, (form, (dtype, scores, values)), feedback in grid:
        if (feedback and (form == "fp16" or not even)) or (block[1] == 64 and form != "bf16"):
            continue
        fp8_values = values == torch.float8_e4m3fn
        config = hopper.config_for(head, scores, values, *block)
        constants = {
            **{"HEAD": head, "BLOCK_N": config.block_n},
            "STAGES": config.stages,
            **{"PIECES": 1, "EVEN": even},
            **{"SCALED": form in MODES, "INTEGERS": scores == torch.int8, "FP8_VALUES": fp8_values},
            **{"FEEDBACK": feedback, "ALONE": config.alone},
            "CONSUMER_REGISTERS": config.consumer_registers,
            "PRODUCER_REGISTERS": config.producer_registers,
        }
        pointers = {"scale_log2": "fp32", "threshold": "fp32", "out": f"*{names[dtype]}", "needed": "*i8"}
        pointers |= dict.fromkeys(("lse", "q_scale", "k_scale", "v_scale", "shift"), "*fp32")
        pointers |= dict.fromkeys(("counts", "indices", "q_starts", "k_starts", "drawn"), "*i32")
        key_block = (config.block_n, head)
        value_block = key_block[::-1] if fp8_values else key_block
        blocks = {
            "q": ((rows, head), scores),
            "k": (key_block, scores),
            "v": (value_block, values),
            "o": ((rows, head), dtype),
        }
        for x, (copied, type_) in blocks.items():
            layout = hopper.shared_layout(copied, type_)
            pointers[f"{x}_desc"] = f"tensordesc<{names[type_]}[1, 1, {copied[0]}, {copied[1]}],{layout!r}>"
        free = (*UNSPECIALIZED, "scale_log2", *(f"{x}_desc" for x in blocks))
        signature, aligned = sign(block_sparse_kernel, pointers, constants, free)
        told = compile_source(
            block_sparse_kernel, signature, constants, aligned, 4, 3, 90, source=GluonASTSource
        )
        yield {"block": block, "even": even, "head": head, "dtype": form, "feedback": feedback, **told}


def sign(function, pointers: dict[str, str], constants: dict, unspecialized: tuple[str, ...]):
    """Argument types and the alignment that a launch would specialise on."""
    signature, aligned = {}, {}
    for position, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name not in constants and name not in unspecialized:
            aligned[(position,)] = [["tt.divisibility", 16]]
    return signature, aligned


def compile_source(
    function,
    signature,
    constants,
    aligned,
    warps: int,
    stages: int,
    capability: int,
    source: type = ASTSource,
) -> dict:
    """Registers, stack bytes, shared bytes and instructions."""
    source = source(function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    numbers = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        **{"triton": triton.__version__, "capability": capability},
        **{**numbers, "shared": compiled.metadata.shared},
        **{
            "wgmma": "wgmma" in ptx,
            "mma": "mma.sync" in ptx,
            "tcgen05": "tcgen05.mma" in ptx,
            "async": "cp.async" in ptx,
            "widest": widest_access(ptx),
        },
        **loop_facts(sass),
        "stores_after_loop": stores_after_loop(compiled.asm.get("ttgir", "")),
    }


def widest_access(ptx: str) -> int:
    """Bytes that a thread moves at once between registers or shared memory and device memory, at most."""
    found = [int(many or 1) * int(bits) // 8 for many, bits in re.findall(
        r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v([248]))?\.[bfsu](\d+)", ptx
    )]  # fmt: skip
    found += [int(size) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x(\d+)", ptx)]
    return max(found, default=0)


def stores_after_loop(ttgir: str) -> list[bool]:
    """Of each bulk store that stands behind a computing group's loop over tiles: is its place a result of that loop?

    Triton carries a name through a loop only if the value it enters with is no other name's. Left behind, the name
    would still mean the first tile, and nothing but a GPU that works on several would notice.
    """
    places = re.findall(r"async_tma_copy_local_to_global \S+\[(\S+), (\S+), ", ttgir)
    return ["#" in batch and "#" in head for batch, head in places[1::2]]


def loop_facts(sass: str) -> dict:
    """Of a kernel that issues two products at once: what lies between the wait for the first and for the second; and of
    the loops over blocks themselves."""
    between = re.findall(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0 ;", sass, re.DOTALL)
    loops = product_loops(sass)[:2]  # of the two groups
    return {
        "overlapped_exponentials": [part.count("MUFU.EX2") for part in between],
        "exponentials_in_loop": [sum("MUFU.EX2" in line for line in loop) for loop in loops],
        "spills_in_loop": [sum(bool(re.search(r"\b(?:LDL|STL)", line)) for line in loop) for loop in loops],
        "fp8_ones": sass.count("0x38383838"),
        "products": sorted(set(re.findall(r"\b[HIQ]GMMA", sass))),
        "registers_set": sorted({int(n, 16) for n in re.findall(r"USETMAXREG\S* (?:UP\d, )?(0x\w+)", sass)}),
    }


def product_loops(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop that holds matrix products, in their order."""
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(\S.*?);", sass)
    number = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = set()
    for i, (_, text) in enumerate(lines):
        target = re.search(r"BRA.*?(0x[0-9a-f]+)", text)
        begin = number.get(int(target[1], 16)) if target else None
        if begin is not None and begin < i and any("GMMA" in x for _, x in lines[begin:i]):
            spans.add((begin, i))
    inner = [
        (a, b) for a, b in sorted(spans) if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    return [[text for _, text in lines[a:b]] for a, b in inner]


if __name__ == "__main__":
    if sys.argv[2] == "hopper":
        for told in compile_hopper():
            print(json.dumps(told), flush=True)
        sys.exit()
    if sys.argv[2] == "linear":
        for told in compile_linear(int(sys.argv[1])):
            print(json.dumps(told), flush=True)
        sys.exit()
    for capability in map(int, sys.argv[1].split(",")):
        for told in compile_backward(capability) if sys.argv[2] == "backward" else ():
            print(json.dumps(told), flush=True)
        for told in compile_plan_kernels(capability) if sys.argv[2] == "plan" else ():
            print(json.dumps(told), flush=True)
        for dtype in TYPES if sys.argv[2] not in ("plan", "backward") else ():
            for head in map(int, sys.argv[2].split(",")):
                for feedback in (False, True) if head == 128 else (False,):
                    print(json.dumps(compile_for(capability, head, dtype, feedback)), flush=True)
                if head in (64, 128) and dtype != torch.float32:
                    print(json.dumps(compile_for(capability, head, dtype, False, int8=True)), flush=True)
                if head in (64, 128) and dtype == torch.bfloat16:
                    print(json.dumps(compile_for(capability, head, dtype, False, pv_skip=True)), flush=True)
