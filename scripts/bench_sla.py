"""Time a layer of SLA, part by part, side by side with dense attention, in turns, in one process.

    python scripts/bench_sla.py --output scripts/results/bench_sla.json

Needs a GPU, torch, triton and numpy, and no installation. Forward: choosing the blocks (plan), the sparse part, the
linear part over unread blocks (complement) and over all keys (all), each projected and added to the sparse part in one
pass, and the whole layer with its plan, both ways. Backward: the forward and its gradients together, of each part and
of the layer, whose plan has none but is made; then again with a sink, a block of keys that every query reads.
With `--peer` the SLA authors' own layer runs beside, if their package can be imported.
Every timed output is first checked against float64 on two heads; what is wrong is not timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import _source_tree  # noqa: F401  first: it makes dit_accel.kernels importable
import torch
from _kernel_cases import environment, write_record
from _linear_checks import compare, with_gradients
from _sla_peer import BLOCKS, authors_layer
from bench_kernels import Gauge, cut, dense_candidates, predict, random_plan, time_in_turns
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from dit_accel.kernels.block_sparse import block_sparse, block_sparse_trainable
from dit_accel.kernels.linear_attention import linear_attention
from dit_accel.plan import BlockPlan

ROOM = 2**31  # bytes of states that float64 may take


def layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    weight: Tensor,
    bias: Tensor,
    variant: str,
    impl: str,
    trained: bool = False,
    workspace: int = ROOM,
) -> Tensor:
    """SLA's output, `[B, H, S, D]`: attention to the plan's blocks and what the rest gives, projected."""
    rest = None if variant == "all" else plan
    if trained:
        out, _ = block_sparse_trainable(q, k, v, plan, layout="bhsd", impl=impl)
        rows = linear_attention(q, k, v, rest, impl=impl, workspace=workspace)
        return out + linear(rows, weight.to(rows.dtype), bias.to(rows.dtype))
    out, _ = block_sparse(q, k, v, plan, layout="bhsd", impl=impl)
    return linear_attention(
        q, k, v, rest, projection=(weight, bias), into=out, impl=impl, workspace=workspace
    )


def why_wrong(
    tensors: list[Tensor], plan: BlockPlan, weight: Tensor, bias: Tensor, variant: str, trained: bool
) -> str | None:
    """Why the first and last head's output (and gradients) are wrong, or None."""
    some = [0, tensors[0].shape[1] - 1]
    starts = plan.q_starts
    part = BlockPlan.from_mask(
        plan.to_mask()[:, some], starts, plan.k_starts, n_q_tokens=plan.n_q_tokens, n_k_tokens=plan.n_k_tokens,
        max_q_block=plan.max_q_block, max_k_block=plan.max_k_block,
    )  # fmt: skip
    q, k, v, grad = (x[:, some] for x in tensors)

    def run(impl: str, wide: bool) -> list[Tensor]:
        given = [x.double() for x in (q, k, v, weight, bias)] if wide else [q, k, v, weight, bias]

        def attend(*qkv: Tensor) -> Tensor:
            return layer(*qkv, part, *given[3:], variant, impl, trained)

        if trained:
            return with_gradients(attend, *given[:3], grad.to(given[0].dtype))
        return [attend(*given[:3])]

    return compare(run("auto", False), run("reference", False), run("reference", True))


def candidates(
    tensors: list[Tensor], plan: BlockPlan, keep: float, weight: Tensor, bias: Tensor
) -> tuple[dict[str, Callable], list[str]]:
    """What is timed forward, dense attention first; and what was wrong."""
    q, k, v, _ = tensors
    by_token = [x.transpose(1, 2) for x in (q, k, v)]
    runs, problems = dense_candidates(*by_token), []
    runs["plan"] = lambda: predict(by_token[0], by_token[1], plan, keep)
    out = torch.zeros_like(q)
    for variant in ("complement", "all"):
        problem = why_wrong(tensors, plan, weight, bias, variant, False)
        if problem:
            problems.append(f"{variant}: {problem}")
            continue
        rest = None if variant == "all" else plan
        runs["sparse"] = lambda: block_sparse(q, k, v, plan, layout="bhsd")
        runs[f"linear, {variant}"] = lambda rest=rest: linear_attention(
            q, k, v, rest, projection=(weight, bias), into=out
        )
        runs[f"layer, {variant}"] = lambda variant=variant: layer(
            q, k, v, predict(by_token[0], by_token[1], plan, keep), weight, bias, variant, "auto",
            workspace=2**28,
        )  # fmt: skip
    return runs, problems


def add_sink(plan: BlockPlan) -> BlockPlan:
    """The plan with the first key block among what every query block reads, in the place of one that it read."""
    mask = plan.to_mask()
    last = mask.shape[3] - 1 - mask.flip(3).int().argmax(3, keepdim=True)
    mask.scatter_(3, torch.where(mask[..., :1], 0, last), False)
    mask[..., 0] = True
    return BlockPlan.from_mask(
        mask, plan.q_starts, plan.k_starts, n_q_tokens=plan.n_q_tokens, n_k_tokens=plan.n_k_tokens,
        max_q_block=plan.max_q_block, max_k_block=plan.max_k_block,
    )  # fmt: skip


def trained_candidates(
    tensors: list[Tensor], plan: BlockPlan, keep: float | None, weight: Tensor, bias: Tensor
) -> tuple[dict[str, Callable], list[str]]:
    """What is timed forward and backward, dense attention first; and what was wrong.

    Args:
        keep: of the plan that the whole layer makes; None: it takes the one given.
    """

    def dense(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*qkv)

    def choose(q: Tensor, k: Tensor) -> BlockPlan:
        with torch.no_grad():
            return plan if keep is None else predict(q.transpose(1, 2), k.transpose(1, 2), plan, keep)

    runs, problems = {"cudnn": lambda: with_gradients(dense, *tensors)}, []
    for variant in ("complement", "all"):
        problem = why_wrong(tensors, plan, weight, bias, variant, True)
        if problem:
            problems.append(f"{variant}, trained: {problem}")
            continue
        rest = None if variant == "all" else plan
        runs["sparse"] = lambda: with_gradients(
            lambda *a: block_sparse_trainable(*a, plan, layout="bhsd")[0], *tensors
        )
        runs[f"linear, {variant}"] = lambda rest=rest: with_gradients(
            lambda *a: linear_attention(*a, rest), *tensors
        )
        runs[f"layer, {variant}"] = lambda variant=variant: with_gradients(
            lambda *a: layer(*a, choose(*a[:2]), weight, bias, variant, "auto", True, 2**28), *tensors
        )
    return runs, problems


def report(title: str, runs: dict[str, Callable], options: argparse.Namespace) -> list[dict]:
    """Time, print and return rows; the baseline is the fastest of the dense kernels."""
    with Gauge("cuda") as gauge:
        times = time_in_turns(runs, "cuda", options.rounds)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    dense = min((x for x in ("cudnn", "flash") if x in runs), key=lambda name: quartiles[name][1])
    rows = []
    for name, (low, middle, high) in quartiles.items():
        paired = [a / b for a, b in zip(times[dense], times[name], strict=True)]
        worst, ratio, best = statistics.quantiles(paired, n=4)
        rows.append(
            dict(pass_=title, part=name, dense=dense, milliseconds=(low, middle, high), ratio=ratio,
                 ratio_quartiles=(worst, best), **gauge.read())
        )  # fmt: skip
        print(
            f"{title:20}{name:22}{middle:9.3f} ({low:.3f}-{high:.3f}){ratio:9.2f}x ({worst:.2f}-{best:.2f})"
        )
    print(f"{'':20}{gauge}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head", type=int, default=128, help="size of a head")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer", action="store_true", help="time the package sparse_linear_attention beside")
    parser.add_argument("--output", help="write a JSON record here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU to time.")
    starts = cut(options.tokens, (options.block,))
    plan = random_plan(options.heads, starts, options.keep, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, options.dtype)
    tensors = [
        torch.randn(1, options.tokens, options.heads, options.head, generator=generator, device="cuda")
        .to(dtype)
        .transpose(1, 2)
        for _ in range(4)
    ]
    weight = torch.randn(options.head, options.head, generator=generator, device="cuda") * options.head**-0.5
    bias = torch.randn(options.head, generator=generator, device="cuda")
    shape = f"N={options.tokens} H={options.heads} D={options.head} keep={options.keep} block={options.block}"
    print(f"{environment()['device']}, {dtype}, {shape}, {options.rounds} rounds, ms: median (quartiles)")
    table, problems = [], []
    given = (weight, bias)
    passes = {
        "forward": candidates(tensors, plan, options.keep, *given),
        "forward + backward": trained_candidates(tensors, plan, options.keep, *given),
        "with a sink": trained_candidates(tensors, add_sink(plan), None, *given),
    }
    if options.peer:
        theirs = authors_layer(*tensors[:3], options.keep, *given)
        name = f"authors' all, {BLOCKS[0]}x{BLOCKS[1]}"
        passes["forward"][0][name] = lambda: theirs(*tensors[:3])
        passes["forward + backward"][0][name] = lambda: with_gradients(theirs, *tensors)
    for title, (runs, wrong) in passes.items():
        problems += wrong
        table += report(title, runs, options)
    for problem in problems:
        print("WRONG, not timed:", problem)
    if options.output:
        write_record(options.output, dict(shape=shape, dtype=str(dtype), rounds=options.rounds, table=table,
                                          problems=problems))  # fmt: skip
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
