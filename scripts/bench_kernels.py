"""Time block-sparse attention side by side with dense attention, in turns, in one process.

    python scripts/bench_kernels.py --output scripts/results/bench_kernels.json         # the GPU
    python scripts/bench_kernels.py --device cpu --threads 2 8                          # the break-even on a CPU

Needs torch, triton (for the GPU) and numpy, and no installation. Every timed output is first checked against float64;
a shape that fails is not timed and the exit status is 1. A sample is several calls in a row on warm caches. `ideal`
is the time of the fastest dense attention times the kept fraction; `of ideal` is ideal over measured. `plan` is what
choosing the blocks takes, and its share (*) that of the dense time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import _source_tree  # noqa: F401  first: it makes dit_accel.kernels importable
import numpy as np
import torch
from _kernel_cases import Case, environment, judge, write_record
from _peers import PEERS, peer_candidates
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback, why_not
from dit_accel.kernels.compaction import compact_lists
from dit_accel.kernels.counting import count_pairs
from dit_accel.kernels.pooling import block_means
from dit_accel.kernels.selection import select_blocks
from dit_accel.plan import BlockPlan

GPU_SHAPES = (
    dict(name="wan 480p", heads=12, tokens=32768, head=128, keeps=(1.0, 0.5, 0.25, 0.1, 0.05)),
    dict(name="wan 480p", heads=12, tokens=32760, head=128, keeps=(0.25, 0.1)),
    dict(name="skewed", heads=12, tokens=32768, head=128, keeps=(0.25, 0.1), family="skewed"),
    dict(name="local", heads=12, tokens=32768, head=128, keeps=(0.25, 0.1), family="local"),
    dict(name="tiny-wan", heads=24, tokens=33792, head=64, keeps=(None,), family="recorded"),
    dict(
        name="128 x 64",
        heads=12,
        tokens=32768,
        head=128,
        blocks=(64,),
        q_blocks=(128,),
        keeps=(0.5, 0.25, 0.1, 0.05),
    ),
    dict(name="64 x 64", heads=12, tokens=32768, head=128, blocks=(64,), keeps=(0.5, 0.25, 0.1, 0.05)),
    dict(name="head 64, 64 x 64", heads=24, tokens=4480, head=64, blocks=(64,), keeps=(0.5, 0.25, 0.1)),
    dict(name="head 64", heads=24, tokens=4480, head=64, keeps=(0.5, 0.25, 0.1)),
    dict(name="flux", heads=24, tokens=4096, head=128, text=512, keeps=(0.25, 0.11)),
    dict(name="flux", heads=24, tokens=4096, head=128, text=333, keeps=(0.25,)),
    dict(name="flux", heads=24, tokens=4096, head=128, text=512, keeps=(0.35,), family="dense text"),
    *(
        dict(name="dense", heads=24, tokens=n, head=head, keeps=(1.0,))
        for head in (128, 64)
        for n in (4096, 8192, 16384, 32768)
    ),
    dict(name="wan 720p", heads=40, tokens=75648, head=128, keeps=(0.5, 0.25, 0.1, 0.05)),
    dict(name="wan 720p", heads=40, tokens=75600, head=128, keeps=(0.1,)),
    dict(name="hunyuan", heads=24, tokens=118800, head=128, text=256, keeps=(0.25, 0.1)),
)
CPU_SHAPES = tuple(
    dict(name=f"cpu {n}", heads=4, tokens=n, head=64, blocks=(128, 96), keeps=(1.0, 0.5, 0.35, 0.25, 0.15))
    for n in (512, 1024, 2048, 4352, 8192)
)
RECORDED = Path(__file__).parent / "results" / "plans_tiny_wan.npz"  # by record_plans.py
SAMPLE_SECONDS = 5e-3  # calls are repeated within a sample until it lasts about this long
LAUNCH_CYCLES = 800_000  # a GPU waits this long per call of a sample, about 0.45 ms: more than a launch takes
MOST_CALLS = 20  # of a sample: more launches than a GPU keeps waiting would hold up the host
PATIENCE = 6  # samples that came late, until one counts all the same: its call waits for the GPU itself


def cut(tokens: int, blocks: tuple[int, ...]) -> list[int]:
    """Offsets of blocks whose lengths take turns, the last one ragged."""
    starts = [0]
    while starts[-1] < tokens:
        starts.append(min(tokens, starts[-1] + blocks[len(starts) % len(blocks)]))
    return starts


def random_plan(heads: int, starts: list[int], keep: float, device: str) -> BlockPlan:
    """Each query block of each head keeps its own random key blocks, the same number of them."""
    return family_plan("uniform", heads, starts, keep, device)


def family_plan(
    family: str,
    heads: int,
    starts: list[int],
    keep: float,
    device: str,
    text: int = 0,
    q_starts: list[int] | None = None,
) -> BlockPlan:
    """A plan that reads about `keep` of all pairs of blocks; the last `text` tokens are read by every query.

    Args:
        family: "uniform": each query block of each head keeps its own random key blocks, the same number of them.
            "skewed": how many they keep differs, as with top-p: half of them keep a third of the mean. "local": a band
            around the query block and the first block. "dense text": as "uniform", but text queries read everything.
        starts: offsets of the key blocks, and of the query blocks unless `q_starts` has others ("uniform" only).
    """
    q_starts = q_starts or starts
    n, rows = len(starts) - 1, len(q_starts) - 1
    column, row = torch.arange(n, device=device), torch.arange(rows, device=device)[:, None]
    score = torch.rand(1, heads, rows, n, generator=torch.Generator().manual_seed(0)).to(device)
    texts = sum(start >= starts[-1] - text for start in starts[:-1])
    score[..., n - texts :] = 2
    least = max(1, round(keep * n))
    count = torch.full((1, heads, rows, 1), least, device=device)
    if family == "skewed":
        draw = torch.rand(1, heads, n, 1, generator=torch.Generator().manual_seed(1)).to(device)
        count = (torch.where(draw < 0.5, 1 / 3, 5 / 3) * least).round().long().clamp(1, n)
    if family == "local":
        score = score.zero_() - (column - row).abs()
        score[..., 0] = 2
    if family == "dense text":
        free = (keep * n * n - texts * n) / (n - texts)
        count[:] = max(texts, round(free))
        count[:, :, n - texts :] = n
    rank = score.argsort(-1, descending=True).argsort(-1)
    known = dict(n_q_tokens=starts[-1], n_k_tokens=starts[-1])
    return BlockPlan.from_mask(rank < count, q_starts, starts, **known)


def recorded_plan(starts: list[int], device: str) -> BlockPlan:
    """What a real model's attention read: every recorded step, layer and head of it is a head of this plan."""
    with np.load(RECORDED) as file:
        bits = np.concatenate([file[name] for name in sorted(file.files) if name.startswith("step")])
    mask = np.unpackbits(bits, axis=-1, count=len(starts) - 1).astype(bool)
    return BlockPlan.from_mask(torch.from_numpy(mask)[None].to(device), starts, starts)


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
    # The mean key comes from the means that the plan was made from.
    plan = replace(plan, key_means=block_means(k.transpose(1, 2), plan.k_starts, plan.max_k_block))
    copies = quantize_blocks(q, k, v, plan, mode)
    scale = q.shape[3] ** -0.5
    return {
        mode: partial(block_sparse, q, k, v, plan, layout="bhsd", impl="hopper", precision=mode),
        f"{mode} alone": partial(hopper.block_sparse_quantised, copies, plan, scale, q),
    }


def right_peers(
    names: Iterable[str], q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> Iterator[tuple[str, Callable]]:
    """The peers that give what Triton's kernel gives. q, k, v: `[B, S, H, D]`."""
    out = block_sparse(q, k, v, plan, impl="triton")[0].float()
    for name, run in peer_candidates(names, q, k, v, plan):
        error = float((run().float() - out).norm() / out.norm())
        if error < PEERS[name].error:
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
        calls[name] = min(MOST_CALLS, max(1, round(SAMPLE_SECONDS * 1e3 / _sample(run, 3, device))))
    times = {name: [] for name in runs}
    lot = random.Random(0)
    for _ in range(rounds):
        # In an order drawn by lot: on a chip at its power limit it matters who went before.
        for name in lot.sample(list(runs), len(runs)):
            times[name].append(_sample(runs[name], calls[name], device))
    return times


def _sample(run: Callable, calls: int, device: str) -> float:
    """Milliseconds per call. On a GPU a sample counts if the host had launched it all while the GPU still waited."""
    if device == "cuda":
        cycles = calls * LAUNCH_CYCLES
        for _ in range(PATIENCE):
            milliseconds, in_time = _sample_gpu(run, calls, cycles)
            if in_time:
                break
            cycles *= 2  # a busy host: wait longer for it
        return milliseconds
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) * 1e3 / calls


def _sample_gpu(run: Callable, calls: int, cycles: int) -> tuple[float, bool]:
    """Milliseconds per call, and whether no launch came late: the GPU's pause outlasted them all."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    for _ in range(calls):
        run()
    in_time = not start.query()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls, in_time


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
    impl: str,
    head: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    q_starts: list[int],
    starts: list[int],
) -> str | None:
    """Why the output of the first and last head is wrong, or None."""
    q_blocks, k_blocks = (tuple(b - a for a, b in pairwise(x)) for x in (q_starts, starts))
    if q.shape[1] > 40000:  # float64 would not fit: against Triton's kernel, which smaller shapes check
        out, lse = block_sparse(q, k, v, plan, impl=impl)
        exact, exact_lse = block_sparse(q, k, v, plan, impl="triton")
        error = float((out.float() - exact.float()).norm() / exact.float().norm())
        gap = float((lse - exact_lse).abs().max())
        return None if error < 5e-3 and gap < 1e-3 else f"differs from Triton's: {error:.1e}, lse {gap:.1e}"
    # Two heads of all the tokens: enough to catch a wrong offset, and float64 stays affordable.
    some = torch.tensor([0, q.shape[2] - 1], device=q.device)
    mask = plan.to_mask()[:, some]
    case = Case(q.dtype, head, "bench", 1, 2, q_blocks, k_blocks, "random", "bshd")
    run = block_sparse(q, k, v, plan, impl=impl)
    picked = run[0][:, :, some], run[1][:, some]
    verdict = judge(lambda *_a, **_kw: picked, case, *(x[:, :, some] for x in (q, k, v)),
                    BlockPlan.from_mask(mask, q_starts, starts))  # fmt: skip
    return verdict.problem


def time_shape(shape: dict, options: argparse.Namespace, dtype: torch.dtype) -> tuple[list[dict], int]:
    """Rows of the table for one shape, and how many implementations were wrong."""
    device = options.device
    heads, tokens, head, text = shape["heads"], shape["tokens"], shape["head"], shape.get("text", 0)
    starts = cut(tokens, shape.get("blocks", (128,)))
    starts += [tokens + start for start in cut(text, (128,))[1:]] if text else []
    q_starts = cut(tokens, shape["q_blocks"]) if "q_blocks" in shape else starts
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = (
        torch.randn(1, starts[-1], heads, head, generator=generator, device=device).to(dtype)
        for _ in range(3)
    )
    family = shape.get("family", "uniform")
    title = f"{shape['name']} H={heads} N={tokens}{f'+{text}' if text else ''} D={head} {family}"
    table, failures, spent = [], 0, {}
    for keep in shape["keeps"]:
        if family == "recorded":
            plan = recorded_plan(starts, device)
            keep = round(float(plan.to_mask().float().mean()), 3)
        else:
            plan = family_plan(family, heads, starts, keep, device, text, q_starts)
        runs = dense_candidates(q, k, v)
        if len(runs) > 1 and tokens > 40000:
            runs.pop("flash", None)
        dense_names = list(runs)
        for impl in options.impl or (["hopper"] if device == "cuda" else ["cpu"]):
            reason = why_not(impl, *(x.transpose(1, 2) for x in (q, k, v)), plan)
            if reason:
                print(f"{title:48}{keep:6} {impl} not timed: {reason}", flush=True)
                continue
            problem = check(impl, head, q, k, v, plan, q_starts, starts)
            if problem:
                failures += 1
                print(f"{title:48}{keep:6} {impl} WRONG, not timed: {problem}", flush=True)
                table.append(dict(shape=title, keep=keep, impl=impl, problem=problem))
            else:
                runs[impl] = partial(block_sparse, q, k, v, plan, impl=impl)
                if (
                    options.feedback
                    and why_not(impl, *(x.transpose(1, 2) for x in (q, k, v)), plan, feedback=True) is None
                ):
                    runs[f"{impl} + next plan"] = partial(attend_and_shorten, q, k, v, plan, impl)
        for mode in options.precision if tokens > 30000 and plan.max_k_block == 128 else ():
            runs |= quantised_candidates(mode, q, k, v, plan)
        if options.peers is not None:
            runs |= dict(right_peers(options.peers or PEERS, q, k, v, plan))
        if family == "uniform" and device == "cuda" and q_starts is starts:
            runs["plan"] = partial(predict, q, k, plan, keep)
        with Gauge(device) as gauge:
            times = time_in_turns(runs, device, options.rounds)
        quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
        dense = min(dense_names, key=lambda name: quartiles[name][1])
        achieved = int(count_pairs(plan)) / plan.n_pairs
        baseline = f"{dense} {quartiles[dense][1]:.3f}"
        for impl in [name for name in runs if name not in dense_names]:
            low, middle, high = quartiles[impl]
            paired = [a / b for a, b in zip(times[dense], times[impl], strict=True)]
            worst, ratio, best = statistics.quantiles(paired, n=4)
            row = dict(shape=title, keep=keep, achieved_keep=achieved, impl=impl, dense=dense)
            row |= dict(dense_milliseconds=quartiles[dense], milliseconds=quartiles[impl])
            row |= dict(ratio=ratio, ratio_quartiles=(worst, best), of_ideal=ratio * achieved)
            row["against"] = {  # how many times as fast as a peer, round by round
                peer: statistics.quantiles(
                    [b / a for a, b in zip(times[impl], times[peer], strict=True)], n=4
                )
                for peer in PEERS
                if peer in times and impl not in (peer, "plan")
            }
            if device == "cuda":
                row["host_microseconds"] = host_microseconds(runs[impl])
            table.append(row | gauge.read())
            measured = f"{impl} {middle:.3f} ({low:.3f}-{high:.3f})"
            share = f"{1 / ratio:9.2%}*" if impl == "plan" else f"{ratio * achieved:10.0%}"
            beside = "".join(f", {r[1]:.3f}x {peer}" for peer, r in row["against"].items())
            print(f"{title:48}{keep:6}{baseline:>14}{measured:>38}{ratio:8.2f}x{share}{beside}", flush=True)
            spent.setdefault(impl, []).append((achieved, middle))
        if gauge.seen:
            print(f"{'':54}{gauge}", flush=True)
    for impl, points in spent.items():
        if len(points) > 3 and impl != "plan":
            slope, start = statistics.linear_regression(*zip(*points, strict=True))
            row = dict(shape=title, impl=impl, slope=slope, intercept=start)
            told = (
                f"{slope:.2f} ms for all pairs ({quartiles[dense][1] / slope:.0%} of ideal) + {start:.3f} ms"
            )
            if device == "cuda":
                processors = torch.cuda.get_device_properties(device).multi_processor_count
                row["tile_microseconds"] = start * 1e3 * processors / (heads * (len(q_starts) - 1))
                told += f", {row['tile_microseconds']:.2f} us a tile"
            print(f"{title}: {impl} takes {told}", flush=True)
            table.append(row)
    return table, failures


def predict(q: Tensor, k: Tensor, plan: BlockPlan, keep: float) -> BlockPlan:
    """From queries and keys to a plan of as many blocks: pool, score, select, compact."""
    scores = block_means(q, plan.q_starts, 128) @ block_means(k, plan.k_starts, 128).transpose(2, 3)
    counts, indices = select_blocks(scores, None, max(1, round(keep * plan.n_k)))
    return replace(plan, counts=counts, indices=indices)


def attend_and_shorten(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, impl: str) -> BlockPlan:
    """A call that also tells which entries mattered, and the plan made of it."""
    needed = block_sparse_feedback(q, k, v, plan, -10.0, impl=impl)[2]
    return compact_lists(plan, needed)


class Gauge:
    """Mean clock and power of the GPU while it is entered. Read only."""

    def __init__(self, device: str) -> None:
        self.seen: list[tuple[float, float]] = []
        self.over = threading.Event()
        self.library = None
        if device != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle, self.library = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml
        except Exception:  # no library or no driver: nothing to read
            pass

    def __enter__(self) -> Gauge:
        self.thread = threading.Thread(target=self._watch)
        if self.library:
            self.thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self.over.set()
        if self.library:
            self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            clock = self.library.nvmlDeviceGetClockInfo(self.handle, self.library.NVML_CLOCK_SM)
            self.seen.append((clock, self.library.nvmlDeviceGetPowerUsage(self.handle) / 1e3))

    def read(self) -> dict[str, float]:
        if not self.seen:
            return {}
        clock, power = (statistics.mean(values) for values in zip(*self.seen, strict=True))
        return dict(mean_clock_mhz=round(clock), mean_power_w=round(power))

    def __str__(self) -> str:
        found = self.read()
        return f"{found['mean_clock_mhz']} MHz, {found['mean_power_w']} W on average" if found else ""


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
        "--peers",
        nargs="*",
        help=f"also these where installed: {', '.join(PEERS)}; without a name, all",
    )
    parser.add_argument(
        "--feedback",
        action="store_true",
        help="also calls that tell which entries mattered, and the next plan",
    )
    parser.add_argument("--only", nargs="+", help="names of shapes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads, one table for each number")
    parser.add_argument("--output", help="write a JSON record here")
    options = parser.parse_args()
    device = options.device
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    print(f"{environment()['device']}, {dtype}, {options.rounds} rounds, ms: median (quartiles)")
    print(f"{'shape':48}{'keep':>6}{'dense':>14}{'sparse':>38}{'ratio':>9}{'of ideal':>10}")
    table, failures = [], 0
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    for threads, shape in product(options.threads or [torch.get_num_threads()], shapes):
        if options.only and shape["name"] not in options.only:
            continue
        torch.set_num_threads(threads)
        if options.threads:
            print(f"{threads} threads", flush=True)
        rows, wrong = time_shape(shape, options, dtype)
        table += [row | dict(threads=threads) for row in rows] if device == "cpu" else rows
        failures += wrong
        if options.output:  # after every shape: a run that is cut short leaves what it has
            write_record(options.output, dict(dtype=str(dtype), rounds=options.rounds, table=table))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
