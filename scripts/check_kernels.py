"""Check every kernel that runs here, at many shapes, plans and types.

    python scripts/check_kernels.py                      # the GPU, or the CPU where there is none
    python scripts/check_kernels.py --output record.json

Needs torch, triton (for the GPU) and numpy, and no installation. Block-sparse attention is checked on poisoned memory
against the float64 oracle, the kernels that build plans and linear attention against plain torch. An implementation may
err at most twice as much as plain attention computed in the same low precision, both against float64. Exits with 1 if
any case fails.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter

import _source_tree  # noqa: F401  first: it makes dit_accel.kernels importable
import torch
from _call_checks import check_calls
from _kernel_cases import Case, environment, judge, make, write_record
from _linear_checks import check_linear_attention
from _plan_kernel_checks import check_plan_kernels
from _quantised_checks import check_quantised

from dit_accel.kernels.block_sparse import block_sparse, why_not

SHAPES = {
    "even": dict(batch=1, heads=2, q_blocks=(128,) * 4, k_blocks=(128,) * 8),
    "ragged": dict(batch=2, heads=3, q_blocks=(128, 128, 77), k_blocks=(128, 128, 128, 1)),
    "tiles": dict(
        batch=1, heads=4, q_blocks=(128, 96, 128, 96, 96), k_blocks=(96, 128, 96, 128, 96, 96, 128)
    ),
    # More tiles than a GPU has multiprocessors, so that a program takes several.
    "many tiles": dict(batch=2, heads=4, q_blocks=(128,) * 70 + (40,), k_blocks=(128, 128, 128, 60)),
    "128 x 64": dict(batch=1, heads=3, q_blocks=(128,) * 3 + (77,), k_blocks=(64,) * 11 + (9,)),
    "64 x 64": dict(batch=2, heads=3, q_blocks=(64,) * 5 + (33,), k_blocks=(64,) * 11 + (9,)),
    "many 64 x 64": dict(batch=2, heads=4, q_blocks=(64,) * 130 + (40,), k_blocks=(64, 64, 64, 48)),
    "zero-length": dict(batch=2, heads=2, q_blocks=(64, 0, 33, 128, 0), k_blocks=(0, 17, 128, 0, 64, 0)),
    "tiny blocks": dict(batch=1, heads=2, q_blocks=(16,) * 7 + (5,), k_blocks=(16,) * 9 + (3,)),
    "cross": dict(batch=2, heads=2, q_blocks=(100, 28), k_blocks=(128,) * 15 + (31,)),
}
PLANS = ("random", "empty rows", "broadcast", "full", "none")


def cases(types: list[torch.dtype]) -> list[Case]:
    """Every shape, plan, head size and type; layouts and strides take turns."""
    grid = itertools.product(types, (32, 64, 96, 128, 256), SHAPES, PLANS)
    turns = itertools.cycle(("bshd", "bhsd", "bshd fused"))
    return [
        Case(dtype=dtype, head=head, shape=shape, plan=plan, layout=next(turns), **SHAPES[shape])
        for dtype, head, shape, plan in grid
        # Compiling dominates on a GPU: the largest head and the shortest blocks stand for themselves once.
        if (head != 256 or shape in ("ragged", "tiles"))
        and (head == 64 or shape != "tiny blocks")
        and (head in (64, 128) or shape not in ("many tiles", "many 64 x 64"))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--impl", nargs="+", help="reference, cpu, triton, hopper; default: what the device gets"
    )
    parser.add_argument("--output", help="write a JSON record here")
    options = parser.parse_args()
    began = time.perf_counter()
    types = [torch.bfloat16, torch.float16, torch.float32]
    rows, failures, left_out = {}, [], Counter()
    names = options.impl or (("triton", "hopper") if options.device.startswith("cuda") else ("cpu",))
    for number, case in enumerate(cases(types)):
        q, k, v, plan = make(case, options.device, seed=number)
        bare = [x.transpose(1, 2) if case.layout.startswith("bshd") else x for x in (q, k, v)]
        for name in names:
            reason = why_not(name, *bare, plan)
            if reason is not None:
                left_out[f"{name}: {reason}"] += 1
                continue
            verdict = judge(lambda *a, **kw: block_sparse(*a, impl=name, **kw), case, q, k, v, plan)  # noqa: B023
            key = (name, str(case.dtype).removeprefix("torch."), case.head)
            rows.setdefault(key, []).append(verdict)
            if verdict.problem:
                failures.append(f"{name} {case.title}: {verdict.problem}")
    print(f"{'impl':10}{'type':10}{'D':>4}{'cases':>7}{'failed':>8}{'worst error':>14}{'of allowed':>12}")
    table = []
    for (name, dtype, head), verdicts in rows.items():
        worst = max(v.error for v in verdicts)
        share = max(v.share for v in verdicts)
        failed = sum(bool(v.problem) for v in verdicts)
        table.append(dict(impl=name, dtype=dtype, head=head, cases=len(verdicts), failed=failed,
                          worst_error=worst, worst_share_of_allowed=share))  # fmt: skip
        print(f"{name:10}{dtype:10}{head:4}{len(verdicts):7}{failed:8}{worst:14.2e}{share:12.0%}")
    for reason, count in left_out.items():
        print(f"{count} cases not for {reason}")
    if not rows:
        failures.append("no implementation could run any case")
    plan_kernels = dict(check_plan_kernels(options.device))
    failures += [f"{title}: {problem}" for title, problem in plan_kernels.items() if problem]
    print(f"pooling, selection and counting: {len(plan_kernels)} cases")
    linear = dict(check_linear_attention(options.device))
    failures += [f"{title}: {problem}" for title, problem in linear.items() if problem]
    print(f"linear attention: {len(linear)} cases")
    quantised = dict(check_quantised(options.device)) if options.device.startswith("cuda") else {}
    failures += [f"{title}: {problem}" for title, problem in quantised.items() if problem]
    print(f"quantised: {len(quantised)} cases")
    calls = {}
    for name in names if options.device.startswith("cuda") else ():
        calls |= check_calls(name, options.device)
    failures += [f"{title}: {problem}" for title, problem in calls.items() if problem]
    print(f"random shapes, graph, compilations, memory: {len(calls)} cases")
    for line in failures[:20]:
        print("FAILED", line)
    seconds = time.perf_counter() - began
    total = sum(row["cases"] for row in table) + len(plan_kernels) + len(linear) + len(quantised) + len(calls)
    print(
        f"{total - len(failures)} passed, {len(failures)} failed on {environment()['device']} in {seconds:.1f} s"
    )
    if options.output:
        write_record(
            options.output,
            dict(
                table=table,
                left_out=left_out,
                plan_kernels=list(plan_kernels),
                linear=list(linear),
                quantised=list(quantised),
                calls=len(calls),
                failures=failures,
                seconds=round(seconds, 1),
            ),
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
