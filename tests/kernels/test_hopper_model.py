"""The Hopper kernel's protocol, on a model of the chip: rings, barriers, tiles that follow one another, empty rows."""

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.kernels.block_sparse.feedback import Feedback
from dit_accel.kernels.block_sparse.reference import block_sparse_quantised, margins
from dit_accel.kernels.quantize import MODES, quantize_blocks
from dit_accel.plan import BlockPlan

sys.path.insert(0, str(Path(__file__).parent))
import gluon_model
from gluon_model import NAMED, modelled

hopper = pytest.importorskip("dit_accel.kernels.block_sparse.hopper", exc_type=ImportError)
hopper_barriers = pytest.importorskip("dit_accel.kernels.block_sparse.hopper_barriers", exc_type=ImportError)

CASES = {
    "even": ((128,) * 3, (128,) * 6),
    "ragged": ((128, 77, 128, 40), (128, 96, 128, 1)),
    "zero-length": ((64, 0, 33, 128, 0), (0, 17, 128, 0, 64, 0)),
    "long query blocks": ((300, 128), (128, 100)),
    "keys of 64": ((128,) * 3, (64,) * 8),
    "ragged keys of 64": ((300, 77, 128, 40), (64, 48, 0, 64, 1)),
    "64 x 64": ((64,) * 5, (64,) * 8),
    "ragged 64 x 64": ((64, 33, 0, 64, 5), (64, 48, 0, 64, 1)),
}


@pytest.mark.parametrize("programs", [1, 2, 5])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("shape", CASES)
def test_against_the_reference(shape, share, programs):
    q_blocks, k_blocks = CASES[shape]
    generator = torch.Generator().manual_seed(len(shape) + programs)
    q, k, v = (
        torch.randn(2, 2, sum(n), 64, generator=generator).bfloat16() for n in (q_blocks, k_blocks, k_blocks)
    )
    mask = torch.rand(2, 2, len(q_blocks), len(k_blocks), generator=generator) < share
    starts = [[0, *torch.tensor(n).cumsum(0).tolist()] for n in (q_blocks, k_blocks)]
    plan = replace(BlockPlan.from_mask(mask, *starts), longest_first=programs == 2)
    out, lse = run(q, k, v, plan, programs)
    exact, exact_lse = block_sparse(q.double(), k.double(), v.double(), plan, layout="bhsd", impl="reference")
    plain, _ = block_sparse(q, k, v, plan, layout="bhsd", impl="reference")
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    assert not out.isnan().any() and not lse.isnan().any()
    allowed = 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()
    assert (out.double() - exact).norm() <= allowed
    assert (lse - exact_lse).nan_to_num(0.0).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ["even", "ragged", "zero-length"])
def test_quantised_against_the_reference(shape, mode):
    q_blocks, k_blocks = CASES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    q, k, v = (
        torch.randn(2, 2, sum(n), 64, generator=generator).bfloat16() for n in (q_blocks, k_blocks, k_blocks)
    )
    k = k + 2 * torch.randn(1, 2, 1, 64, generator=generator)  # keys share a direction, as real ones do
    mask = torch.rand(2, 2, len(q_blocks), len(k_blocks), generator=generator) < 0.5
    starts = [[0, *torch.tensor(n).cumsum(0).tolist()] for n in (q_blocks, k_blocks)]
    plan = BlockPlan.from_mask(mask, *starts)
    parts = quantize_blocks(q, k.bfloat16(), v, plan, mode)
    with modelled(hopper, 2):
        out, lse = hopper.block_sparse_quantised(parts, plan, 64**-0.5, q)
    emulated, emulated_lse = block_sparse_quantised(parts, plan, 64**-0.5, q)
    exact, exact_lse = block_sparse(
        q.double(), k.bfloat16().double(), v.double(), plan, layout="bhsd", impl="reference"
    )
    assert torch.equal(lse.isneginf(), exact_lse.isneginf()) and not out.isnan().any()
    error, size = (out.double() - exact).norm(), exact.norm()
    assert error <= 1.05 * (emulated.double() - exact).norm()
    assert error <= {"int8_fp8": 0.045, "fp8": 0.058, "int8": 0.016}[mode] * size
    # Where a score lies between two codes either may be taken: one weight differs by up to an eighth.
    assert (lse - emulated_lse).nan_to_num(0.0).abs().mean() < 1e-4


@pytest.mark.parametrize("precision", ["full", *MODES])
@pytest.mark.parametrize("shape", CASES)
def test_which_entries_mattered(shape, precision):
    """8-bit values: what the formula calls needed is, and nothing that is two powers of two below."""
    q_blocks, k_blocks = CASES[shape]
    if precision != "full" and max(q_blocks) > 128:
        pytest.skip("quantised copies have no longer blocks")
    generator = torch.Generator().manual_seed(len(shape))
    q, k, v = (torch.randn(2, 2, sum(n), 64, generator=generator) for n in (q_blocks, k_blocks, k_blocks))
    starts = [[0, *torch.tensor(n).cumsum(0).tolist()] for n in (q_blocks, k_blocks)]
    for first, end in pairwise(starts[1]):
        k[:, :, first:end] *= 3 * torch.rand(2, 2, 1, 1, generator=generator) ** 2
    q, k, v = (x.bfloat16() for x in (q, k, v))
    mask = torch.rand(2, 2, len(q_blocks), len(k_blocks), generator=generator) < 0.8
    plan = BlockPlan.from_mask(mask, *starts)
    needed = torch.zeros(2, 2, *plan.indices.shape[2:], dtype=torch.uint8)
    feedback = Feedback(-2.0, needed)
    with modelled(hopper, 2):
        if precision == "full":
            hopper.block_sparse(q, k, v, plan, 64**-0.5, feedback)
        else:
            hopper.block_sparse_quantised(
                quantize_blocks(q, k, v, plan, precision), plan, 64**-0.5, q, feedback
            )
    rise = margins(q.double(), k.double(), plan, 64**-0.5)
    noise = 1e-3 if precision == "full" else 0.3  # of the scores, in powers of two
    eager = 2.0 if precision in ("int8_fp8", "fp8") else 0.0
    needed = needed.bool()
    assert needed[rise > -2.0 + noise].all()
    slot = torch.arange(needed.shape[3])
    empty = rise.isneginf() & (slot < plan.counts[..., None])  # of blocks without a token nothing is asked
    assert not needed[(rise < -2.0 - eager - noise) & ~empty].any()
    if len(k_blocks) > 2:
        assert 0 < needed.sum() < plan.counts.sum()  # both verdicts occur


@pytest.mark.parametrize("mode", ["int8_fp8", "fp8"])
@pytest.mark.parametrize("place", [0, 40, 127])
def test_fp8_weights_reach_far_below_the_largest(mode, place):
    """One key stands 2^16.5 above all others, which together weigh a sixth: fp8 alone holds 2^15."""
    blocks = 128
    generator = torch.Generator().manual_seed(place)
    q = 0.2 * torch.randn(1, 1, 128, 64, generator=generator)
    k, v = (0.2 * torch.randn(1, 1, 128 * blocks, 64, generator=generator) for _ in range(2))
    q[..., 0], k[..., 0], k[:, :, 128 * place, 0] = 8.0, 0.0, 16.5 * math.log(2)
    v, v[:, :, 128 * place] = v + 3, 0
    q, k, v = (x.bfloat16() for x in (q, k, v))
    plan = BlockPlan.from_mask(
        torch.ones(1, 1, 1, blocks, dtype=torch.bool), [0, 128], [*range(0, 128 * blocks + 1, 128)]
    )
    with modelled(hopper, 1):
        out, _lse = hopper.block_sparse_quantised(quantize_blocks(q, k, v, plan, mode), plan, 64**-0.5, q)
    exact, _ = block_sparse(q.double(), k.double(), v.double(), plan, layout="bhsd", impl="reference")
    assert exact.mean() > 0.3
    assert (out.double() - exact).norm() < 0.1 * exact.norm()


TRIES = 200  # threads of an idle machine may happen to come in the right order without waiting


@pytest.mark.parametrize(
    ("size", "barrier"),
    [
        *((size, ring) for size in (128, 64) for ring in ("q_full", "k_full", "v_full")),
        *((128, "Q_FREE"), (128, "FREE"), (64, "LONE_Q_FREE"), (64, "LONE_FREE")),
    ],
)
def test_a_broken_protocol_shows(size, barrier, monkeypatch):
    """The model can fail: where nobody waits for one kind of barrier, numbers are missing or wrong."""
    monkeypatch.setattr(gluon_model, "PATIENCE", 3.0)
    rings = ["q_full", "k_full", "v_full"]  # as the kernel allocates them
    deaf = rings.index(barrier) if barrier in rings else NAMED + getattr(hopper_barriers, barrier).value
    starts = [*range(0, 10 * size + 1, size)]
    q, k, v = (torch.randn(1, 1, 10 * size, 64).bfloat16() for _ in range(3))
    # Queries are copied a tile or two ahead: too early only where tiles are short.
    mask = torch.eye(10) if barrier.endswith("Q_FREE") else torch.ones(10, 10)
    plan = BlockPlan.from_mask(mask.bool()[None, None], starts, starts)
    exact, _ = block_sparse(q, k, v, plan, layout="bhsd", impl="reference")
    for _ in range(TRIES):
        try:
            out, _ = run(q, k, v, plan, 1, deaf)
        except Exception:
            return  # something arrived twice or never, or numbers that nobody had written led astray
        if not torch.allclose(out, exact, atol=0.1):
            return
    pytest.fail(f"{TRIES} runs that did not wait for {barrier} were right")


def run(q, k, v, plan, programs, deaf=None):
    with modelled(hopper, programs, deaf):
        return hopper.block_sparse(q, k, v, plan, q.shape[-1] ** -0.5)
