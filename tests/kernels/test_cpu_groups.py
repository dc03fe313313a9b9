"""A CPU of many cores: query blocks in groups give what they give one by one, on every kind of plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse, cpu, cpu_groups
from dit_accel.plan import BlockPlan

sys.path.insert(0, str(Path(__file__).parent))
import test_block_sparse as cases

pytestmark = pytest.mark.skipif(cases.DEVICE != "cpu", reason="needs CPU tensors")


@pytest.fixture(autouse=True)
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if there were more cores than threads alone are good for; how large each group was."""
    sizes, attend = [], cpu_groups._attend

    def watched(q, pairs, group, *others) -> None:
        sizes.append(len(group))
        attend(q, pairs, group, *others)

    monkeypatch.setattr(cpu, "ALONE", 0)
    monkeypatch.setattr(cpu_groups, "_attend", watched)
    return sizes


@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.parametrize("head", [8, 64, 96])
def test_every_shape_and_head_size(shape: str, head: int, grouped: list[int]) -> None:
    cases.assert_within_low_precision_error(*cases.make(shape, torch.float32, head), "cpu")
    assert grouped


@pytest.mark.parametrize("plan", ["empty", "broadcast", "full"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_plan_layout_and_type(dtype: torch.dtype, layout: str, plan: str, grouped: list[int]) -> None:
    q, k, v, made = cases.make("zero-length blocks", dtype, 32, plan=plan, layout=layout)
    cases.assert_within_low_precision_error(q, k, v, made, "cpu", layout)
    assert grouped
    out, _ = block_sparse(q, k, v, made, layout=layout, impl="cpu")
    assert out.stride() == q.stride()


def test_what_is_not_kept_is_not_read() -> None:
    cases.test_dropped_blocks_are_not_read("cpu")
    cases.test_fused_projection_strides("cpu")
    cases.test_large_scores_do_not_overflow("cpu")
    cases.test_cpu_keeps_float64()


@pytest.mark.parametrize(("threads", "size"), [(2, 8), (8, 32), (12, 32), (16, 32), (64, 128)])
def test_groups_are_worth_the_threads(threads: int, size: int) -> None:
    blocks = [cpu_groups._Block(i, i + 1, torch.zeros(4, dtype=torch.int32)) for i in range(200)]
    assert len(cpu_groups._groups(blocks, 128, threads)[0]) == size


def test_groups_stay_small(monkeypatch: pytest.MonkeyPatch, grouped: list[int]) -> None:
    """As many blocks as the threads are worth, and fewer where their keys would take too much memory."""
    starts = list(range(0, 8 * 12 + 1, 8))
    q, k, v = torch.randn(3, 1, 96, 1, 16)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    plan = BlockPlan.from_mask(mask, starts, starts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    whole = block_sparse(q, k, v, plan, impl="cpu")
    assert grouped == [8, 4]
    grouped.clear()
    monkeypatch.setattr(cpu_groups, "BYTES", 2 * 96 * 2 * 16 * 4)  # two of the longest lists
    parts = block_sparse(q, k, v, plan, impl="cpu")
    assert grouped == [2, 2, 3, 4, 1]
    torch.testing.assert_close(parts, whole)
    monkeypatch.setattr(cpu_groups, "BYTES", 1)
    cases.assert_within_low_precision_error(q, k, v, plan, "cpu")
    assert set(grouped[-12:]) == {1}


def test_threads_that_compute_alone_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where list entries are judged one by one; and the number of threads is given back."""
    monkeypatch.setattr(cpu, "ALONE", 2)
    asked = []
    pool = cpu.ThreadPoolExecutor
    monkeypatch.setattr(cpu, "ThreadPoolExecutor", lambda n, **more: asked.append(n) or pool(n, **more))
    q, k, v, plan = cases.make("unequal blocks", torch.float32, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        skipped, _ = block_sparse(q, k, v, plan, impl="cpu", pv_threshold=-60.0)
        assert asked == [2] and torch.get_num_threads() == 5
        torch.testing.assert_close(skipped, block_sparse(q, k, v, plan, impl="cpu")[0])
    finally:
        torch.set_num_threads(before)
