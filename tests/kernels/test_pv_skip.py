"""What `pv_threshold` leaves out: every implementation against SpargeAttn's second stage, stated once more by loops."""

from __future__ import annotations

import importlib.util
import itertools
import os
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UsageError
from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback, choose, why_not
from dit_accel.kernels.block_sparse.op import fields_of
from dit_accel.kernels.block_sparse.reference import block_sparse as by_reference
from dit_accel.kernels.block_sparse.reference import block_sparse_quantised
from dit_accel.kernels.compaction import compact_lists
from dit_accel.kernels.quantize import quantize_blocks
from dit_accel.plan import BlockPlan

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors"))
WITH_TRITON = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETING, reason="needs a GPU or TRITON_INTERPRET=1"
)
IMPLEMENTATIONS = ["reference", ON_CPU, pytest.param("triton", marks=WITH_TRITON)]
# batch, query block lengths, key block lengths
SHAPES = {
    "odd lengths": (2, (32, 32, 13), (32,) * 6 + (1,)),
    "longer than a tile": (1, (128, 97), (128, 96, 128, 70, 128, 128, 51)),
    "zero-length": (2, (0, 40, 0, 17), (0, 30, 0, 64, 0, 20, 20, 0)),
}
SEED = 5
LEVELS = (0.0, -4.0, -8.0, -14.0)  # powers of two
HEAD, SCALE, LOG2_E = 32, 32**-0.5, 1.4426950408889634


def make(shape: str, dtype=torch.float32):
    """q, k, v `[B, H, S, D]` and a plan. Runs of keys have levels about which their scores scatter a little; some
    runs of queries see no levels."""
    batch, q_blocks, k_blocks = SHAPES[shape]
    run = 64 if max(k_blocks) > 64 else 32
    n_q, n_k, lead = sum(q_blocks), sum(k_blocks), (batch, 2)
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(*lead, n, HEAD, generator=generator) for n in (n_q, n_k, n_k))
    q, k = 0.5 * q, 0.5 * k
    drawn = torch.randint(len(LEVELS), (*lead, -(-n_k // run)), generator=generator)
    k[..., 0] = torch.tensor(LEVELS)[drawn].repeat_interleave(run, -1)[..., :n_k]
    sees = torch.rand(*lead, -(-n_q // 64), generator=generator) < 0.8
    q[..., 0] = sees.repeat_interleave(64, -1)[..., :n_q] / (SCALE * LOG2_E)
    mask = torch.rand(*lead, len(q_blocks), len(k_blocks), generator=generator) < 0.8
    starts = [[0, *accumulate(blocks)] for blocks in (q_blocks, k_blocks)]
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), BlockPlan.from_mask(mask.to(DEVICE), *starts)


def tile_of(impl: str, dtype: torch.dtype, plan: BlockPlan) -> tuple[int, int] | None:
    """Rows and keys of an implementation's tiles; None: whole blocks."""
    if impl != "triton":
        return None
    from dit_accel.kernels.block_sparse.triton import capability_of, config_for

    config = config_for(HEAD, dtype, capability_of(torch.device(DEVICE)), plan.max_k_block)
    return config.block_m, config.block_n


def by_the_paper(q, k, v, plan, threshold, tile):
    """The online softmax, tile by tile and row by row, in float64.

    Returns out, lse, how near the nearest verdict came to the threshold, and the shares of pairs that were left out.
    """
    q, k, v = (x.cpu().double() for x in (q, k, v))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    read, nearest, left_out, listed_pairs = plan.to_mask().cpu(), torch.inf, 0, 0
    q_starts, k_starts = plan.q_starts[0, 0].tolist(), plan.k_starts[0, 0].tolist()
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        for i, (block_low, block_high) in enumerate(pairwise(q_starts)):
            n_rows, n_keys = tile or (10**9, 10**9)
            for low in range(block_low, block_high, n_rows):
                rows = range(low, min(low + n_rows, block_high))
                top = dict.fromkeys(rows, -torch.inf)
                total = dict.fromkeys(rows, 0.0)
                acc = {row: torch.zeros(HEAD, dtype=torch.float64) for row in rows}
                for j in reversed(range(len(k_starts) - 1)):
                    if not read[b, h, i, j]:
                        continue
                    for first in range(k_starts[j], k_starts[j + 1], n_keys):
                        keys = slice(first, min(first + n_keys, k_starts[j + 1]))
                        scores = {row: k[b, h, keys] @ q[b, h, row] * SCALE * LOG2_E for row in rows}
                        listed_pairs += len(rows) * (keys.stop - keys.start)
                        # The published kernel: max over rows of (m_tile - m_new) + pvthreshd <= 0.
                        new = {row: max(top[row], float(scores[row].max())) for row in rows}
                        rise = max(float(scores[row].max()) - new[row] for row in rows)
                        nearest = min(nearest, abs(rise - threshold))
                        if rise - threshold <= 0:
                            left_out += len(rows) * (keys.stop - keys.start)
                            continue
                        for row in rows:
                            weights = 2.0 ** (scores[row] - new[row])
                            fade = 2.0 ** (top[row] - new[row])
                            total[row] = total[row] * fade + float(weights.sum())
                            acc[row] = acc[row] * fade + weights @ v[b, h, keys]
                            top[row] = new[row]
                for row in rows:
                    if total[row] > 0:
                        out[b, h, row] = acc[row] / total[row]
                        lse[b, h, row] = (top[row] + torch.tensor(total[row]).log2()) / LOG2_E
    return out.to(DEVICE), lse.to(DEVICE), nearest, left_out / listed_pairs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_out_follows_the_formula(shape, dtype, impl):
    q, k, v, plan = make(shape, dtype)
    threshold, layout = -2.0, dict(layout="bhsd", impl=impl)
    exact, exact_lse, nearest, share = by_the_paper(q, k, v, plan, threshold, tile_of(impl, dtype, plan))
    assert nearest > 0.3 and 0.1 < share < 0.9  # every verdict is clear, and both occur
    out, lse = block_sparse(q, k, v, plan, pv_threshold=threshold, **layout)
    assert out.dtype == dtype and out.isfinite().all()
    whole, whole_lse = block_sparse(q, k, v, plan, **layout)
    assert torch.equal(lse.isneginf(), whole_lse.isneginf())
    precise = dtype == torch.float32
    allowed = (1e-5 if precise else 6e-3) * exact.norm()
    assert (out - exact).norm() < allowed < 0.5 * (whole - exact).norm()
    seen = ~exact_lse.isneginf()
    # The reference in bfloat16 rounds the scores themselves.
    gap = 1e-4 if precise or impl != "reference" else 3e-2
    assert (lse - exact_lse)[seen].abs().max() < gap


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layout_scale_and_orders_are_as_without_it(impl):
    q, k, v, plan = make("odd lengths")
    given = dict(impl=impl, pv_threshold=-3.0)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd", scale=-0.3, **given)
    by_token = [x.transpose(1, 2) for x in (-q, k, v)]
    turned, turned_lse = block_sparse(*by_token, plan, scale=0.3, **given)
    torch.testing.assert_close(turned.transpose(1, 2), out)
    torch.testing.assert_close(turned_lse, lse)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "threshold"), [*zip(SHAPES, (-1e4,) * 3, strict=True), ("odd lengths", -torch.inf)]
)
def test_a_very_low_threshold_leaves_out_nothing(shape, threshold, impl):
    q, k, v, plan = make(shape)
    known = dict(layout="bhsd", impl=impl)
    out, lse = block_sparse(q, k, v, plan, pv_threshold=threshold, **known)
    plain, plain_lse = block_sparse(q, k, v, plan, **known)
    if impl == "reference" or DEVICE != "cpu":  # it takes other rows at once; and it is other code
        torch.testing.assert_close(out, plain)
        torch.testing.assert_close(lse, plain_lse)
    else:
        assert torch.equal(out, plain) and torch.equal(lse, plain_lse)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("threshold", [-6.0, -1.0, 0.0])
def test_whole_blocks_are_left_out_where_feedback_calls_them_not_needed(threshold, impl):
    q, k, v, plan = make("longer than a tile")
    known = dict(layout="bhsd", impl=impl)
    if impl == "triton":
        from dit_accel.kernels.block_sparse.triton import Config

        if DEVICE != "cpu":
            pytest.skip("no GPU has the registers for such tiles in float32")
        known["config"] = Config(128, 128, 8, 1)
    out, lse = block_sparse(q, k, v, plan, pv_threshold=threshold, **known)
    known.pop("config", None)
    _, _, needed = block_sparse_feedback(q, k, v, plan, threshold, **known)
    short, short_lse = block_sparse(q, k, v, compact_lists(plan, needed), **known)
    assert not torch.equal(needed.sum(-1), plan.counts)
    torch.testing.assert_close(out, short)
    torch.testing.assert_close(lse, short_lse)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_at_zero_what_ties_is_left_out(impl):
    """Three equal blocks of whole numbers: the last is read, the others do not come above it."""
    generator = torch.Generator().manual_seed(0)
    q, block = (torch.randint(-3, 4, (1, 1, 32, HEAD), generator=generator).float() for _ in range(2))
    v = torch.randn(1, 1, 96, HEAD, generator=generator).to(DEVICE)
    q, k = q.to(DEVICE), block.repeat(1, 1, 3, 1).to(DEVICE)
    ones = torch.ones(1, 1, 1, 3, dtype=torch.bool, device=DEVICE)
    only = torch.tensor([False, False, True], device=DEVICE).view(1, 1, 1, 3)
    plan, last = (BlockPlan.from_mask(mask, [0, 32], [0, 32, 64, 96]) for mask in (ones, only))
    known = dict(layout="bhsd", impl=impl)
    found = block_sparse(q, k, v, plan, pv_threshold=0, **known)
    for a, b in zip(found, block_sparse(q, k, v, last, **known), strict=True):
        torch.testing.assert_close(a, b)
    # A little below, all three are read: equal weights are not below anything.
    found = block_sparse(q, k, v, plan, pv_threshold=-0.01, **known)
    for a, b in zip(found, block_sparse(q, k, v, plan, **known), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("threshold", [-6.0, -2.0])
def test_what_is_lost_is_bounded_whatever_the_tiles(threshold, impl):
    """Each token that is left out has at most 2^threshold of its row's largest weight."""
    q, k, v, plan = make("longer than a tile")
    known = dict(layout="bhsd", impl=impl)
    out, lse = block_sparse(q, k, v, plan, pv_threshold=threshold, **known)
    plain, plain_lse = block_sparse(q, k, v, plan, **known)
    seen = ~plain_lse.isneginf()
    lost = (-torch.expm1(lse - plain_lse))[seen]  # shares of the rows' weight
    bound = 2.0**threshold * k.shape[2]
    assert lost.min() > -1e-5 and 1e-5 < lost.max() < bound
    assert (out - plain).abs().max() < 2 * bound * v.abs().max()


@WITH_TRITON
def test_smaller_tiles_of_triton_leave_out_all_that_whole_blocks_do():
    q, k, v, plan = make("longer than a tile")
    tile = tile_of("triton", torch.float32, plan)
    whole = by_reference(q, k, v, plan, SCALE, pv_threshold=-2.0)[1]
    small = by_reference(q, k, v, plan, SCALE, pv_threshold=-2.0, tile=tile)[1]
    assert (small <= whole + 1e-5).all() and (small < whole - 1e-3).any()


@WITH_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_in_int8_follows_its_emulation(shape, dtype):
    q, k, v, plan = make(shape, dtype)
    known = dict(layout="bhsd", precision="int8")
    out, lse = block_sparse(q, k, v, plan, impl="triton", pv_threshold=-2.0, **known)
    parts = quantize_blocks(q, k, v, plan, "int8", impl="reference")
    tile = tile_of("triton", dtype, plan)
    right, right_lse = block_sparse_quantised(parts, plan, SCALE, q, pv_threshold=-2.0, tile=tile)
    whole, _ = block_sparse(q, k, v, plan, impl="triton", **known)
    assert torch.equal(lse.isneginf(), right_lse.isneginf())
    allowed = (1e-4 if dtype == torch.float32 else 6e-3) * right.norm()
    assert (out - right).norm() < allowed < 0.5 * (whole - right).norm()
    torch.testing.assert_close(lse, right_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_on_the_reference_leaves_out_the_same_blocks(shape):
    q, k, v, plan = make(shape)
    out, lse = block_sparse(
        q, k, v, plan, layout="bhsd", impl="reference", precision="int8", pv_threshold=-2.0
    )
    exact, exact_lse, nearest, _ = by_the_paper(q, k, v, plan, -2.0, None)
    seen = ~exact_lse.isneginf()
    assert nearest > 0.3  # int8 moves scores by less
    assert (out - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(lse.isneginf(), ~seen) and (lse - exact_lse)[seen].abs().max() < 0.2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])  # the reference weighs them with zero
def test_left_out_values_are_not_multiplied(impl):
    """NaN in the values of quiet blocks leaves no trace."""
    q, k, v, _ = make("odd lengths")
    q, k = q.abs() + 0.1, k.abs() + 0.1
    k[:, :, :160] *= 0.01  # all but the last two blocks
    k[:, :, 160:192] *= 20
    v[:, :, :160] = torch.nan
    full = torch.ones(1, 1, 3, 7, dtype=torch.bool, device=DEVICE)
    starts = [0, 32, 64, 77], [*range(0, 193, 32), 193]
    out, _ = block_sparse(
        q, k, v, BlockPlan.from_mask(full, *starts), layout="bhsd", impl=impl, scale=1.0, pv_threshold=-2.0
    )
    last = full & (torch.arange(7, device=DEVICE) >= 5)
    short, _ = block_sparse(
        q, k, v.nan_to_num(), BlockPlan.from_mask(last, *starts), layout="bhsd", impl=impl, scale=1.0
    )
    torch.testing.assert_close(out, short)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_query_that_is_nan_stays_nan(impl):
    q, k, v, _ = make("odd lengths")
    full = torch.ones(1, 1, 3, 7, dtype=torch.bool, device=DEVICE)
    plan = BlockPlan.from_mask(full, [0, 32, 64, 77], [*range(0, 193, 32), 193])
    q[0, 0, :32] = torch.nan
    out, lse = block_sparse(q, k, v, plan, layout="bhsd", impl=impl, pv_threshold=-3.0)
    assert out[0, 0, :32].isnan().all() and lse[0, 0, :32].isnan().all()
    assert out[0, 0, 32:].isfinite().all()


@pytest.mark.parametrize("threshold", [0.5, float("nan")])
def test_bad_thresholds_get_one_clear_error(threshold):
    q, k, v, plan = make("odd lengths")
    with pytest.raises(UsageError, match="pv_threshold=.* must be at most 0"):
        block_sparse(q, k, v, plan, layout="bhsd", pv_threshold=threshold)


@pytest.mark.parametrize(
    ("impl", "precision"), [("hopper", "full"), ("flash4", "full"), ("flex", "full"), ("reference", "fp8")]
)
def test_implementations_without_it_refuse(impl, precision):
    q, k, v, plan = make("odd lengths")
    assert "leaves out no tiles" in why_not(impl, q, k, v, plan, precision, pv_skip=True)
    with pytest.raises(KernelUnavailable, match=f"{impl}.*leaves out no tiles"):
        block_sparse(q, k, v, plan, layout="bhsd", impl=impl, precision=precision, pv_threshold=-3.0)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors")
def test_auto_takes_what_has_it(monkeypatch):
    q, k, v, plan = make("odd lengths")
    assert choose(q, k, v, plan, pv_skip=True) == "cpu"
    assert choose(q, k, v, plan, precision="int8", pv_skip=True) == "reference"
    with pytest.raises(KernelUnavailable, match="leaves out no tiles"):
        block_sparse(q, k, v, plan, layout="bhsd", precision="int8_fp8", pv_threshold=-3.0)
    if importlib.util.find_spec("triton") is None:
        return
    from dit_accel.kernels.block_sparse import hopper

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(hopper, "why_not", lambda *_: None)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 2, 77, 64))
    for precision in ("full", "int8"):
        assert choose(on_gpu, on_gpu, on_gpu, plan, precision=precision) == "hopper"
        assert choose(on_gpu, on_gpu, on_gpu, plan, precision=precision, pv_skip=True) == "triton"
    with pytest.raises(KernelUnavailable, match="leaves out no tiles"):
        choose(on_gpu, on_gpu, on_gpu, plan, precision="fp8", pv_skip=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors")
def test_it_compiles_into_one_graph():
    q, k, v, plan = make("odd lengths")

    def attend(q, k, v):
        return block_sparse(q, k, v, plan, layout="bhsd", pv_threshold=-3.0)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), attend(q, k, v), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(
        torch.ops.dit_accel.block_sparse,
        (q, k, v, *fields_of(plan), SCALE, "cpu", "full", -3.0),
        test_utils=("test_schema", "test_faketensor"),
    )
