"""Two processes that share a sequence compute what one process computes, and say so where they cannot be sparse."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_accel.adapters import parallel
from dit_accel.guards import NOT_FINITE

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)
Results = Callable[[str], list[dict[str, Any]]]
ATTEMPTS = 3


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Both processes' results of a case. They run once, through all of them.

    gloo's own threads rarely corrupt the heap under diffusers' all-to-all (torch 2.13: "malloc(): unaligned tcache
    chunk" in `AsyncAlltoallWork`, once in some thousand of these runs). No code of this project is native, so where a
    signal ends a process, both begin again; whatever Python raises counts at once.
    """
    for _ in range(ATTEMPTS):
        folder = tmp_path_factory.mktemp("two")
        codes = _run_both(folder)
        if min(codes) >= 0:
            break

    def results(name: str) -> list[dict[str, Any]]:
        files = [folder / f"{name} {rank}.pt" for rank in range(cases.WORLD)]
        if not all(file.exists() for file in files):
            crashes = "\n".join(file.read_text() for file in sorted(folder.glob("crash *")))
            pytest.fail(
                f"the processes ended with {codes}, before this case or in it\n{crashes or _log(folder)}"
            )
        return [torch.load(file) for file in files]

    return results


def _run_both(folder: Path) -> list[int]:
    """The exit codes of both processes, negative where a signal ended one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", cases.__file__]
    logs = [(folder / f"log {rank}").open("w") for rank in range(cases.WORLD)]
    processes = [
        subprocess.Popen([*command, str(rank), folder], env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()


def _log(folder: Path) -> str:
    return "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob("log *")))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """As the two processes."""


def close(some: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(some, other, rtol=1e-4, atol=1e-5)


def stock(model: Callable) -> torch.Tensor:
    return cases.run_stock(False, model=model)["out"]


@pytest.mark.parametrize("model", cases.MODELS)
def test_diffusers_alone(of_two: Results, model: Callable) -> None:
    for result in of_two(f"stock {model.__name__}"):
        close(result["out"], stock(model))


@pytest.mark.parametrize("name", cases.WHOLE)
def test_keeping_everything_is_stock_diffusers(of_two: Results, name: str) -> None:
    model, order, _ = cases.WHOLE[name]
    for result in of_two(name):
        close(result["out"], stock(model))
        close(result["removed"], stock(model))
        assert result["report"]["self_attention_calls"] == {"sparse": 2, "linear": 0, "dense": 0}
        assert result["report"]["keep"]["achieved"] == 1 and result["report"]["token_order"] == {order: 1}


@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("sampled")])
def test_two_processes_sample_what_one_does(of_two: Results, name: str) -> None:
    """Guided runs of several steps, so that memory of each branch and head is where it belongs."""
    one, two = cases.CASES[name](False), of_two(name)
    keeps = []
    for result in two:
        close(result["out"], one["out"])
        assert result["report"]["self_attention_calls"] == {"sparse": 12, "linear": 0, "dense": 0}
        for part in ("self_attention_calls", "token_order", "plans", "stateless", "runs"):
            assert result["report"][part] == one["report"][part]
        keeps.append(result["report"]["keep"]["achieved"])
    assert max(keeps) < 0.98
    if "three" not in name:  # each process counts its own heads, which are as many here
        assert sum(keeps) / len(keeps) == pytest.approx(one["report"]["keep"]["achieved"])
        assert sum(r["report"]["bytes_held"] for r in two) >= one["report"]["bytes_held"]


def test_linear_layers_read_the_whole_sequence(of_two: Results) -> None:
    one = cases.CASES["linear layers"](False)
    for result in of_two("linear layers"):
        close(result["out"], one["out"])
        assert result["report"]["self_attention_calls"] == {"sparse": 6, "linear": 6, "dense": 0}


def test_what_is_left_out_shows() -> None:
    """The samples above are not those of dense attention, nor do all methods read the same."""
    names = ["sampled raster, split first", *(f"sampled by {name}" for name in cases.METHODS)]
    outs = [cases.CASES[name](False)["out"] for name in names[1:]]
    dense = cases.run_sampled(False, method=lambda: cases.Remember(1.0))["out"]
    for i, out in enumerate(outs):
        for other in (dense, *outs[:i]):
            assert float((out - other).norm() / other.norm()) > 1e-3


@pytest.mark.parametrize("name", cases.DENSE)
def test_where_it_is_not_exact_it_is_dense_with_a_reason(of_two: Results, name: str) -> None:
    case, reason = cases.DENSE[name]
    model = case.keywords["model"]
    for result in of_two(f"dense by {name}"):
        if name == "ring":
            assert "return_lse" in result["host_error"] and set(result["report"]["fallbacks"]) == {reason}
        else:
            close(result["out"], stock(model))
            layers = 3 if model is cases.flux else 2
            assert result["report"]["fallbacks"] == {reason: layers} and not result["report"]["token_order"]
            assert result["report"]["self_attention_calls"] == {"sparse": 0, "linear": 0, "dense": layers}
        assert result["error"].startswith("FallbackError: strict=True") and reason in result["error"]


def test_where_one_process_is_at_fault_it_alone_is_dense(of_two: Results) -> None:
    """It decides about its own heads, behind the exchange, so that the other never waits for it in vain."""
    one, true = cases.run_faulty(False), stock(cases.wan)
    first, second = of_two("one is faulty")
    for result in (one, first, second):
        for out in result["outs"]:
            close(out, true)
    assert not first["fallbacks"] and first["sparse"] == 4
    assert one["fallbacks"] == second["fallbacks"] == {NOT_FINITE: 2} and one["sparse"] == second["sparse"] == 2


@pytest.mark.parametrize("name", cases.REGIONS)
def test_two_processes_compute_the_same_regions(of_two: Results, name: str) -> None:
    """Guided runs in which a part of the tokens is computed at three of six steps, each branch with its own memory."""
    one, two = cases.CASES[f"region by {name}"](False), of_two(f"region by {name}")
    assert len(one["chosen"]) >= 3 and not torch.equal(*one["chosen"][:2])
    for result in two:
        close(result["out"], one["out"])
        assert all(torch.equal(*pair) for pair in zip(result["chosen"], one["chosen"], strict=True))
        for part in ("self_attention_calls", "regions", "whole_reasons", "dense_reasons", "token_order", "fallbacks"):
            assert result["report"][part] == one["report"][part]
        if "experts" not in name:
            assert sorted(result["report"]["regions"].values()) == [6, 6]
    assert torch.equal(two[0]["out"], two[1]["out"])  # what each shall choose by, to the bit
    if name == "tokens":
        # keys and values of half of the heads: of two branches, two layers, 144 tokens, one head of 12, in fp32
        saved = 2 * 2 * 2 * 144 * 12 * 4
        assert {one["report"]["bytes_region"] - result["report"]["bytes_region"] for result in two} == {saved}
        assert {2 * (one["declared"] - result["declared"]) for result in two} == {saved}  # as was said before


def test_regions_show() -> None:
    """The samples above are not those of all tokens, nor of one another."""
    names = ["tokens", "tokens, those left out dropped", "tokens, the last layer's keys", "blocks", "blocks by lot"]
    outs = [cases.CASES[f"region by {name}"](False)["out"] for name in names]
    whole = cases.run_region(False, region={"sample_ratio": 1.0})["out"]
    for i, out in enumerate(outs):
        for other in (whole, *outs[:i]):
            assert float((out - other).norm() / other.norm()) > 1e-3


def test_tokens_that_cannot_be_shared_are_all_computed(of_two: Results) -> None:
    whole = cases.run_region(False, region={"sample_ratio": 1.0})["out"]
    for result in of_two("region, tokens that two cannot share"):
        close(result["out"], whole)
        reason = "context parallelism: 71 tokens, which 2 processes cannot share evenly"
        assert result["report"]["whole_reasons"][reason] == 6
        assert result["report"]["regions"] == {"144 of 144 tokens": 12}


def test_regions_beside_text_are_all_computed(of_two: Results) -> None:
    one = cases.run_region_with_text(False)
    for result in of_two("region, text among the tokens"):
        close(result["out"], one["out"])
        assert result["report"]["whole_reasons"] == {"context parallelism mixes text and video": 4}


def test_processes_agree(of_two: Results) -> None:
    for result in of_two("agreed"):
        assert result["chosen"].tolist() == [[3, 5]] and result["least"] == 6
    assert cases.run_agreed(False)["least"] == 7


@pytest.mark.parametrize("degree", [2, 3, 8])
@pytest.mark.parametrize("tokens", [105, 8, 9])
def test_tokens_of_each_process_are_those_that_diffusers_gives_it(degree: int, tokens: int) -> None:
    processor = WanAttnProcessor()
    assert parallel.tokens_here(tokens, processor) == tokens
    config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=True)
    processor._parallel_config = ParallelConfig(context_parallel_config=config)
    for rank, part in enumerate(torch.arange(tokens).tensor_split(degree)):
        config._ulysses_local_rank = rank
        assert parallel.tokens_here(tokens, processor) == len(part)


def test_processors_set_after_the_split_are_refused(of_two: Results) -> None:
    for result in of_two("processors set anew"):
        assert result["error"].startswith(
            "UsageError: Context parallelism is on for this WanTransformer3DModel"
        )
    assert cases.run_set_anew(False)["error"] is None
