"""Fit the rates of `dit-accel estimate` to the committed records, and write them into dit_accel/estimate/gpus.toml.

    python scripts/fit_estimate.py              # says the rates and how far the estimate is from every case
    python scripts/fit_estimate.py --write      # and writes the rates

Each rate is the least-squares fit of relative errors over the records that the data file names with it. The table says
for each case how far the estimate is off, and how far when the case took no part in the fit ("left out"). The peak of
memory is counted, not fitted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from _estimate_cases import KERNELS, REGION_FIT, REGIONS, Case, cases, read, region_cases

from dit_accel.estimate.gpus import DATA, MEASURED, Gpu, find_gpu, nearest_head
from dit_accel.estimate.memory import activation_bytes
from dit_accel.estimate.timing import BYTES, forward_times, other_work

COUNTED = ("peak", "keep")  # follow from the configuration alone


def solve(rows: list[list[float]], measured: list[float]) -> np.ndarray:
    """Least squares of relative errors."""
    scaled = np.array(rows, dtype=float) / np.array(measured, dtype=float)[:, None]
    return np.linalg.lstsq(scaled, np.ones(len(measured)), rcond=None)[0]


def fit(gpu: Gpu, without: Collection[str] = ()) -> dict[str, float]:
    """The rates.

    Args:
        gpu: for its number of multiprocessors.
        without: names of cases (`wan-14b-720p`) that take no part, in none of their variants and records.
    """
    used = [case for case in cases() if case.case not in without]
    rates: dict[str, float] = _fit_kernels()
    dense = [case for case in used if case.sparse is None]
    rates |= _fit_dense(dense, rates)
    rows = []
    for case in dense:
        operations, moved = other_work(case.built, gpu.multiprocessors)
        rows.append([operations / 1e9, moved / 1e6])
    a, b = solve(rows, [case.other for case in dense])
    rates["matrix_tflops"], rates["bandwidth_gbs"] = 1 / a, 1 / b
    rates |= _fit_sparse([case for case in used if case.sparse is not None], rates)
    rates |= _fit_region(replace(gpu, rates=rates), without)
    return rates


def _fit_kernels() -> dict[str, float]:
    """What a number of tokens costs that no tile divides: the same heads at 32,768 and 32,760, at 75,648 and 75,600."""
    found: dict[int, list[float]] = {}
    for name in KERNELS:
        for row in read(name)["table"]:
            tokens = re.search(r"^wan .* H=\d+ N=(\d+) D=128 uniform", row["shape"])
            if tokens and "dense_milliseconds" in row:
                found.setdefault(int(tokens[1]), []).append(row["dense_milliseconds"][1] / int(tokens[1]) ** 2)
    ratios = [np.median(found[odd]) / np.median(found[even]) for odd, even in ((32760, 32768), (75600, 75648))]
    return {"unaligned_times": float(np.mean(ratios))}


def _fit_dense(dense: list[Case], rates: Mapping[str, float]) -> dict[str, float]:
    """The dense rate of each size of head in pipelines, and what a mask costs."""

    def best(case: Case) -> float:
        work = case.built
        slower = rates["unaligned_times"] if work.joint % 128 else 1.0
        return work.attention_flops * work.layers * slower / 1e9

    told = {}
    for head in (64, 128):
        of = [case for case in dense if not case.built.masked and case.built.head_dim == head]
        rows = [[best(case)] for case in of]
        told[f"attention_tflops_{head}"] = (
            1 / float(solve(rows, [case.attention for case in of])[0]) if of else _dense_of_kernels(head)
        )
    masked = [case for case in dense if case.built.masked]
    if not masked:  # nothing else was timed with a mask
        return {**told, "masked_times": 1.0}
    rows = [[best(case) / told["attention_tflops_128"]] for case in masked]
    return {**told, "masked_times": float(solve(rows, [case.attention for case in masked])[0])}


def _dense_of_kernels(head: int) -> float:
    """The dense rate where no pipeline is left that has such heads: the kernel by itself, 4,096 tokens of 24 heads."""
    (ms,) = {
        row["dense_milliseconds"][1]
        for row in read(KERNELS[1])["table"]
        if row["shape"] == f"dense H=24 N=4096 D={head} uniform" and row["impl"] == "hopper"
    }
    return 4 * 24 * 4096**2 * head / (ms * 1e9)


def _fit_sparse(sparse: list[Case], rates: Mapping[str, float]) -> dict[str, float]:
    """The executor's rates and the time of a call, then the cost of a plan."""

    def calls(case: Case) -> int:
        return sum(layer is not None for layer in case.layers(case.built))

    heads = sorted({nearest_head(case.built.head_dim) for case in sparse})
    rows, measured, plan_rows, plans = [], [], [], []
    for case in sparse:
        work, call = case.built, case.sparse
        flops = 4 * work.batch * work.heads * work.head_dim * call.tokens**2 * call.executed / 1e9
        rows.append([1.0, *(flops if nearest_head(work.head_dim) == head else 0.0 for head in heads)])
        measured.append((case.sparse_sum() - case.predict) / calls(case))
        fetch = 2 * BYTES * work.batch * work.heads * work.head_dim * call.tokens / (rates["bandwidth_gbs"] * 1e6)
        plan_rows.append([1.0, work.batch * work.heads * call.blocks**2 * 1e-6])
        plans.append((case.predict / calls(case), fetch))
    once, *slopes = solve(rows, measured)
    if once < 0:  # without small images among them the cases do not tell it
        once, slopes = 0.0, list(solve([row[1:] for row in rows], measured))
    told = {f"sparse_tflops_{head}": 1 / float(slope) for head, slope in zip(heads, slopes, strict=True)}
    if 64 not in heads:  # the same part of the dense rate as with heads of 128
        part = told["sparse_tflops_128"] / rates["attention_tflops_128"]
        told["sparse_tflops_64"] = part * rates["attention_tflops_64"]
    scaled = np.array(plan_rows) / np.array([[ms] for ms, _ in plans])
    left = np.array([(ms - fetch) / ms for ms, fetch in plans])
    fixed, pair = np.linalg.lstsq(scaled, left, rcond=None)[0]
    return {**told, "sparse_call_ms": float(once), "plan_call_ms": float(fixed), "plan_ns_a_pair": float(pair)}


def _fit_region(gpu: Gpu, without: Collection[str]) -> dict[str, float]:
    """Passes that putting keys and values among the kept ones takes, and the host's time where a GPU waits for it."""
    dense = [case for case in region_cases([REGION_FIT]) if not case.by_blocks and case.case not in without]
    none = replace(gpu, rates={**gpu.rates, "region_passes": 0.0, "region_host_ms_a_layer": 0.0})
    if not dense:
        return {"region_passes": 0.0, "region_host_ms_a_layer": 0.0}
    rows, rest = [], []
    for case in dense:
        moved = case.whole.layers * BYTES * case.part.batch * case.part.joint * case.whole.heads * case.whole.head_dim
        rows.append(moved / (gpu.rate("bandwidth_gbs") * 1e6) / case.ms)
        rest.append((case.ms - case.estimate(none)) / case.ms)
    passes = float(np.dot(rows, rest) / np.dot(rows, rows))
    # 4,096 tokens by blocks: as long as the whole step is, though half is computed: the GPU waits for the host
    waiting = [case for case in region_cases(REGIONS[1:]) if case.by_blocks and case.case == "flux-1024"]
    host = [case.ms / case.whole.layers for case in waiting if case.case not in without]
    return {"region_passes": max(0.0, passes), "region_host_ms_a_layer": host[0] if host else 0.0}


def errors(gpu: Gpu, case: Case, dense: Case | None) -> dict[str, float]:
    """Relative errors: of the forward and attention's share of the model as built, of the gain as it was scaled."""
    told = case.told
    mine = forward_times(case.built, gpu, case.layers(case.built))
    found = {
        "forward": mine.total / (told["seconds"] * 1e3 / told["scaled_by"]) - 1,
        "share": mine.attention_share / told["attention_share"] - 1,
        "peak": activation_bytes(case.model, case.built) / told["peak_above_bytes"] - 1,
    }
    if dense is not None:
        whole = forward_times(case.whole, gpu, case.layers(case.whole))
        if told["scaled_by"] != 1:  # a preset's dense layers were left out
            whole = forward_times(case.whole, gpu, [case.sparse] * case.whole.layers)
        base = forward_times(dense.whole, gpu, dense.layers(dense.whole))
        found["gain"] = base.total / whole.total / told["times_as_fast"] - 1
        found["keep"] = case.keep / told["keep"] - 1
    return found


def table(rated: Callable[[str], Gpu]) -> dict[str, dict[str, float]]:
    """Errors of every case.

    Args:
        rated: the GPU, with rates, for a case's name.
    """
    every = cases()
    dense = {(case.record, case.case): case for case in every if case.sparse is None}
    return {
        case.name: errors(rated(case.case), case, None if case.sparse is None else dense[case.record, case.case])
        for case in every
    } | {case.name: {"step": case.estimate(rated(case.case)) / case.ms - 1} for case in region_cases()}


def left_out() -> dict[str, dict[str, float]]:
    """Errors of every case when neither it nor its other variants took part in the fit; of what rests on a fit."""
    gpu = find_gpu(MEASURED)
    rated = {name: replace(gpu, rates=fit(gpu, {name})) for name in {case.case for case in cases()}}
    return {
        name: {key: error for key, error in found.items() if key not in COUNTED}
        for name, found in table(rated.__getitem__).items()
    }


def write(rates: Mapping[str, float]) -> None:
    """Put the rates into the data file, each in its own table's `value`."""
    text = DATA.read_text(encoding="utf-8")
    for name, value in rates.items():
        text, n = re.subn(rf"(\[rates\.{name}\]\nvalue = )\S+", rf"\g<1>{value:.5g}", text)
        if n != 1:
            raise SystemExit(f"{DATA.name} has no [rates.{name}] that begins with its value")
    DATA.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the rates into the data file")
    options = parser.parse_args()
    gpu = find_gpu(MEASURED)
    rates = fit(gpu)
    for name, value in rates.items():
        print(f"{name:26}{value:10.5g}")
    fitted = table(partial(lambda of, _: of, replace(gpu, rates=rates)))
    out = left_out()
    for name, found in fitted.items():
        cells = (
            f"{key} {value:+.1%}" + ("" if key in COUNTED else f" (left out {out[name][key]:+.1%})")
            for key, value in found.items()
        )
        print(f"{name:72}{', '.join(cells)}")
    if options.write:
        write(rates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
