"""Time block-sparse attention side by side with dense attention, in turns, in one process.

    python scripts/bench_kernels.py --output scripts/results/bench_kernels.json         # the GPU
    python scripts/bench_kernels.py --device cpu --threads 2                            # the break-even on a CPU

Needs torch, triton (for the GPU) and numpy, and no installation. Every timed output is first checked against float64;
a shape that fails is not timed and the exit status is 1. A sample is several calls in a row on warm caches. `ideal`
is the time of the fastest dense attention times the kept fraction; `of ideal` is ideal over measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import _source_tree  # noqa: F401  first: it makes dit_accel.kernels importable
import torch
from _kernel_cases import Case, environment, judge, write_record
from _peers import peer_candidates
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.kernels.block_sparse import block_sparse, why_not
from dit_accel.kernels.counting import count_pairs
from dit_accel.plan import BlockPlan

GPU_SHAPES = (
    dict(heads=12, tokens=32768, head=128, blocks=(128,)),
    dict(heads=4, tokens=32912, head=64, blocks=(128,)),
    dict(heads=4, tokens=4352, head=64, blocks=(128,)),
    dict(heads=4, tokens=4352, head=64, blocks=(128, 96)),
)
CPU_SHAPES = tuple(dict(heads=4, tokens=n, head=64, blocks=(128, 96)) for n in (512, 1024, 2048, 4352, 8192))
KEEPS = {"cuda": (0.5, 0.25, 0.1, 0.05), "cpu": (1.0, 0.5, 0.35, 0.25, 0.15)}
SAMPLE_SECONDS = 5e-3  # calls are repeated within a sample until it lasts about this long
LAUNCH_CYCLES = 800_000  # a GPU waits this long per call of a sample, about 0.45 ms: more than a launch takes


def cut(tokens: int, blocks: tuple[int, ...]) -> list[int]:
    """Offsets of blocks whose lengths take turns, the last one ragged."""
    starts = [0]
    while starts[-1] < tokens:
        starts.append(min(tokens, starts[-1] + blocks[len(starts) % len(blocks)]))
    return starts


def random_plan(heads: int, starts: list[int], keep: float, device: str) -> BlockPlan:
    """Each query block of each head keeps its own random key blocks, the same number of them."""
    blocks = len(starts) - 1
    score = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    kept = score.topk(max(1, round(keep * blocks)), dim=-1).indices
    return BlockPlan.from_mask(
        torch.zeros_like(score, dtype=torch.bool).scatter_(-1, kept, True).to(device), starts, starts
    )


def dense_candidates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The dense kernels that run here. q, k, v: `[B, S, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = {}
    names = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for name, backend in names.items() if q.is_cuda else {"sdpa": None}.items():

        def run(backend=backend) -> Tensor:
            if backend is None:
                return scaled_dot_product_attention(q, k, v)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        try:
            run()
        except RuntimeError as error:
            print(f"dense {name} does not run here: {str(error).splitlines()[0]}")
            continue
        found[name] = run
    return found


def quantised_candidates(mode: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> dict[str, Callable]:
    """Quantised attention with its prologue and alone, if two heads of it come out right. q, k, v: `[B, S, H, D]`."""
    from dit_accel.kernels.block_sparse import hopper
    from dit_accel.kernels.quantize import quantize_blocks

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    reason = why_not("hopper", q, k, v, plan, mode)
    if reason:
        print(f"{mode} not timed: {reason}")
        return {}
    some, starts = [0, q.shape[1] - 1], plan.q_starts[0, 0]
    part = BlockPlan.from_mask(plan.to_mask()[:, some], starts, starts)
    exact, _ = block_sparse(*(x[:, some] for x in (q, k, v)), part, layout="bhsd", impl="triton")
    out, _ = block_sparse(q, k, v, plan, layout="bhsd", impl="hopper", precision=mode)
    error = float((out[:, some].float() - exact.float()).norm() / exact.float().norm())
    if not error < 0.06:
        print(f"{mode} WRONG, not timed: relative error {error:.3f}")
        return {}
    copies = quantize_blocks(q, k, v, plan, mode)
    scale = q.shape[3] ** -0.5
    return {
        mode: partial(block_sparse, q, k, v, plan, layout="bhsd", impl="hopper", precision=mode),
        f"{mode} alone": partial(hopper.block_sparse_quantised, copies, plan, scale, q),
    }


def right_peers(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Iterator[tuple[str, Callable]]:
    """The peers that give what Triton's kernel gives. q, k, v: `[B, S, H, D]`."""
    out = block_sparse(q, k, v, plan, impl="triton")[0].float()
    for name, run in peer_candidates(q, k, v, plan):
        error = float((run().float() - out).norm() / out.norm())
        if error < 0.01:
            yield name, run
        else:
            print(f"{name} WRONG, not timed: relative error {error:.3f}")


def time_in_turns(runs: dict[str, Callable], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call of each, one sample of each per round.

    On a GPU the calls of a sample wait behind a pause long enough to launch them all, so what is timed is the GPU's
    work; `host_microseconds` has what launching costs.
    """
    calls = {}
    for name, run in runs.items():
        _sample(run, 2, device)
        calls[name] = max(1, round(SAMPLE_SECONDS * 1e3 / _sample(run, 3, device)))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_sample(run, calls[name], device))
    return times


def _sample(run: Callable, calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(calls * LAUNCH_CYCLES)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) * 1e3 / calls


def host_microseconds(run: Callable, calls: int = 50) -> float:
    """What one call costs the host, while the GPU is busy with something else."""
    torch.cuda.synchronize()
    torch.cuda._sleep(calls * LAUNCH_CYCLES)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - began
    torch.cuda.synchronize()
    return spent * 1e6 / calls


def check(
    impl: str, heads: int, starts: list[int], head: int, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> str | None:
    """Why the output of the first and last head is wrong, or None."""
    blocks = tuple(b - a for a, b in pairwise(starts))
    # Two heads of all the tokens: enough to catch a wrong offset, and float64 stays affordable.
    some = torch.tensor([0, heads - 1], device=q.device)
    mask = plan.to_mask()[:, some]
    case = Case(q.dtype, head, "bench", 1, 2, blocks, blocks, "random", "bshd")
    run = block_sparse(q, k, v, plan, impl=impl)
    picked = run[0][:, :, some], run[1][:, some]
    verdict = judge(lambda *_a, **_kw: picked, case, *(x[:, :, some] for x in (q, k, v)),
                    BlockPlan.from_mask(mask, starts, starts))  # fmt: skip
    return verdict.problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: float32 on a CPU"
    )
    parser.add_argument("--impl", nargs="+", help="cpu, triton, hopper; default: what the device gets")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=[],
        help="also int8_fp8, fp8, int8, with quantising and (alone) without",
    )
    parser.add_argument(
        "--peers", action="store_true", help="also flash-attn-4 and FlexAttention, where installed"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", help="write a JSON record here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    print(f"{environment()['device']}, {dtype}, {options.rounds} rounds, ms: median (quartiles)")
    print(f"{'shape':36}{'keep':>6}{'dense':>20}{'sparse':>34}{'ratio':>9}{'of ideal':>10}")
    table, failures = [], 0
    for shape in GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        heads, tokens, head = shape["heads"], shape["tokens"], shape["head"]
        starts = cut(tokens, shape["blocks"])
        generator = torch.Generator().manual_seed(1)
        q, k, v = (
            torch.randn(1, tokens, heads, head, generator=generator).to(device, dtype) for _ in range(3)
        )
        title = f"H={heads} N={tokens} D={head} blocks {'/'.join(map(str, shape['blocks']))}"
        for keep in KEEPS[device]:
            plan = random_plan(heads, starts, keep, device)
            runs = dense_candidates(q, k, v)
            dense_names = list(runs)
            for impl in options.impl or (["triton"] if device == "cuda" else ["cpu"]):
                reason = why_not(impl, *(x.transpose(1, 2) for x in (q, k, v)), plan)
                if reason:
                    print(f"{title:36}{keep:6} {impl} not timed: {reason}", flush=True)
                    continue
                problem = check(impl, heads, starts, head, q, k, v, plan)
                if problem:
                    failures += 1
                    print(f"{title:36}{keep:6} {impl} WRONG, not timed: {problem}", flush=True)
                    table.append(dict(**shape, keep=keep, impl=impl, problem=problem))
                else:
                    runs[impl] = partial(block_sparse, q, k, v, plan, impl=impl)
            for mode in options.precision:
                runs |= quantised_candidates(mode, q, k, v, plan)
            if options.peers:
                runs |= dict(right_peers(q, k, v, plan))
            times = time_in_turns(runs, device, options.rounds)
            quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
            dense = min(dense_names, key=lambda name: quartiles[name][1])
            achieved = int(count_pairs(plan)) / plan.n_pairs
            baseline = f"{dense} {quartiles[dense][1]:.3f}"
            for impl in list(runs)[len(dense_names) :]:
                low, middle, high = quartiles[impl]
                ratio = statistics.median(a / b for a, b in zip(times[dense], times[impl], strict=True))
                table.append(dict(**shape, keep=keep, impl=impl, achieved_keep=achieved, dense=dense, ratio=ratio,
                                  of_ideal=ratio * achieved, milliseconds=quartiles))  # fmt: skip
                measured = f"{impl} {middle:.3f} ({low:.3f}-{high:.3f})"
                print(
                    f"{title:36}{keep:6}{baseline:>20}{measured:>34}{ratio:8.2f}x{ratio * achieved:10.0%}",
                    flush=True,
                )
    if options.output:
        write_record(options.output, dict(dtype=str(dtype), rounds=options.rounds, table=table))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
