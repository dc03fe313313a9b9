"""Whole blocks as what region sampling chooses: their steps attend sparsely, by the same rows of the same plans."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.layout import TokenLayout, build_layout
from dit_accel.methods import load_method
from dit_accel.region.blocks import Blocks, take_query_blocks
from dit_accel.testing import tiny_wan_transformer
from dit_accel.trajectory import Call

SPARSE = {"method": "pooled", "keep": 0.5, "order": "packed", "block": 16, "min_tokens": 0}
PART = {"unit": "block", "start": 1, "error_reset": ()}
BUDGETS = {
    "nabla": {"top_p": 0.5},
    "neighborhood": {"window": (1, 3, 3)},
    "radial": {},
    "clear": {"radius": 2},
    "sla": {"keep": 0.4, "negligible": 0.2},
}


def layouts() -> Iterator[TokenLayout]:
    yield build_layout((3, 4, 6), "packed", 16)  # 72 tokens: the last block is short
    yield build_layout((3, 4, 6), "gilbert", 16, first_frame_apart=True)  # one in between, too
    yield build_layout((2, 4, 8), "raster", 16, text=7)
    yield build_layout((2, 5, 8), "packed", 16, text=19, text_first=True)


@pytest.mark.parametrize("layout", list(layouts()), ids=lambda it: f"{it.order}-{it.text}")
def test_blocks_are_the_layouts(layout):
    blocks = Blocks.of(layout)
    starts = layout.starts[0, 0, layout.video_blocks.start : layout.video_blocks.stop + 1].tolist()
    first = layout.video_tokens.start
    order = torch.arange(layout.n_video_tokens) if layout.forward is None else layout.forward
    members = [order[a - first : b - first].tolist() for a, b in pairwise(starts)]
    assert [[t for t in range(len(order)) if blocks.owner[t] == n] for n in range(len(members))] == [
        sorted(one) for one in members
    ]
    full = [n for n, one in enumerate(members) if len(one) == blocks.size]
    assert blocks.full.tolist() == full and blocks.n_short == len(members) - len(full)

    x = torch.rand(2, layout.n_video_tokens)
    by_hand = torch.stack([x[:, members[n]].mean(1) for n in full], 1)
    torch.testing.assert_close(blocks.means(x), by_hand)

    chosen = torch.tensor([[0, 2], [1, 2]])
    computed = blocks.computed(chosen)
    tokens = blocks.tokens(computed)
    for row, picks in enumerate(chosen.tolist()):
        wanted = sorted({full[n] for n in picks} | (set(range(len(members))) - set(full)))
        assert computed[row].tolist() == wanted
        assert tokens[row].tolist() == [token for n in wanted for token in members[n]]


def test_a_share_counts_what_is_always_computed():
    blocks = Blocks.of(build_layout((3, 4, 6), "packed", 16))  # 4 of 16 and one of 8
    assert [blocks.count(share) for share in (0.01, 0.3, 0.5, 0.6, 1.0)] == [1, 1, 2, 2, 4]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["own plans", "a plan for all rows"])
def test_rows_of_a_plan_attend_as_in_the_whole(batch, shared):
    layout = build_layout((3, 4, 6), "packed", 16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, 72, 2, 8, generator=generator).unbind(0)
    method = load_method("random" if shared else "rectified", keep=0.5)
    call = Call(0, "", "cond", 1, 0.5, 0, 2, (3, 4, 6), ())
    plan = method.predict(q, k, layout, call, None)
    out, lse = block_sparse(q, k, v, plan)

    blocks = Blocks.of(layout)
    computed = blocks.computed(torch.tensor([[0, 3], [1, 2]])[:batch])
    rows = layout.backward[blocks.tokens(computed)]
    part = torch.stack([one[at] for one, at in zip(q, rows, strict=True)])
    few, few_lse = block_sparse(part, k, v, take_query_blocks(plan, computed, rows.shape[1]))
    for n, at in enumerate(rows):
        torch.testing.assert_close(few[n], out[n, at])
        torch.testing.assert_close(few_lse[n], lse[n][:, at])


@pytest.mark.parametrize("method", sorted({"pooled", "rectified", "random", *BUDGETS}))
def test_a_block_is_planned_for_by_its_own_queries(method):
    """What `rows_apart` promises: other queries may be anything."""
    layout = build_layout((3, 4, 6), "raster" if method == "radial" else "packed", 16)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 72, 2, 8, generator=generator).unbind(0)
    one = load_method(method, **BUDGETS.get(method, {"keep": 0.5}))
    assert one.rows_apart
    call = Call(0, "", "cond", 1, 0.5, 0, 2, (3, 4, 6), ())
    plan = one.predict(q, k, layout, call, None)
    other = q.clone()
    other[:, 16:48] = 0  # the second and third block
    again = one.predict(other, k, layout, call, None)
    for n in (0, 3, 4):
        assert torch.equal(plan.to_mask()[:, :, n], again.to_mask()[:, :, n])
        for name in ("coarse", "skipped"):
            if getattr(plan, name) is not None:
                assert torch.equal(getattr(plan, name)[:, :, n], getattr(again, name)[:, :, n])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("order", ["raster", "packed", "gilbert"])
def test_a_part_gives_what_all_gave(rig, order, batch):
    """Nothing changes from one step to the next."""
    mine = rig(batch)
    handle = dit_accel.accelerate(mine.pipe, region=PART, **{**SPARSE, "order": order})
    first = mine.forward(mine.x, 500.0)
    mine.step(first, mine.x)
    active = mine.active(handle)
    second = mine.forward(mine.x, 500.0)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    third = mine.forward(mine.x + 1, 400.0)
    changed = (mine.by_token(third) != mine.by_token(first)).flatten(2).any(-1)
    assert torch.equal(changed, active)
    report = handle.report()
    assert report.sparse_calls == 6 and report.dense_calls == 0
    assert report.regions == {"72 of 72 tokens": 1, "40 of 72 tokens": 2}
    assert report.keep_achieved < 0.7


def test_dense_steps_leave_keys_in_the_order_of_sparse_ones(rig):
    """And a part of a dense step is dense, as planned; all are equal where sparse attention reads everything."""
    outs = []
    for above in (0.6, 0.0):
        mine = rig(2)
        options = {**SPARSE, "keep": 1.0, "dense_above": above}
        handle = dit_accel.accelerate(mine.pipe, region=PART, **options)
        x = mine.x
        for step in range(4):
            out = mine.forward(x, 900.0 - 200 * step)
            x = torch.cat([mine.step(out, x), x[:, 16:]], 1)
        outs.append(x)
        report = handle.report()
        assert report.regions == {"72 of 72 tokens": 1, "40 of 72 tokens": 3}
        sparse = {0.6: 2, 0.0: 0}[above]
        assert report.sparse_calls == 2 * sparse
        assert report.dense_reasons == {f"noise level above {above:g}": 2 * (4 - sparse)}
        handle.remove()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)


def test_branches_share_a_part_s_plan_too(rig):
    mine = rig()
    handle = dit_accel.accelerate(mine.pipe, region=PART, share_plans=True, **SPARSE)
    for step in range(3):
        for branch in ("cond", "uncond"):
            out = mine.forward(mine.x, 900.0 - 200 * step, branch)
        mine.step(out, mine.x)
    assert handle.report().plans == {"predicted": 6, "carried over": 6}
    region = handle._engines[0].region
    assert region.bytes_held() > sum(kept.bytes_held() for kept in region._kept.values())
    region.forget()
    assert region.bytes_held() == 0


@pytest.mark.parametrize("selector", ["std", "change", "random", "mask"])
def test_every_selector_chooses_blocks(rig, selector):
    mine = rig()
    more = {"mask": torch.ones(3, 4, 6)} if selector == "mask" else {}
    handle = dit_accel.accelerate(mine.pipe, region={**PART, "selector": selector, **more}, **SPARSE)
    owner = Blocks.of(build_layout((3, 4, 6), "packed", 16)).owner
    seen = torch.zeros(72, dtype=torch.bool)
    for step in range(5):
        out = mine.forward(mine.x, 900.0 - 100 * step)
        mine.step(out, mine.x)
        if step < 4:
            active = mine.active(handle)[0]
            assert active.sum() == 40
            for block in range(5):
                assert active[owner == block].unique().numel() == 1
            seen |= active
    assert seen.all()  # nothing starves


def test_what_cannot_be():
    from dit_accel.testing import tiny_wan_pipeline

    def refused(match: str, region: dict, **sparse: object) -> None:
        pipe = tiny_wan_pipeline()
        with pytest.raises(UsageError, match=match):
            dit_accel.accelerate(pipe, region=region, **sparse)
        assert "forward" not in pipe.transformer.__dict__

    refused("there is none", PART)
    refused("pooled, radial, random, rectified, sla", PART, **{**SPARSE, "method": "svg1"})
    refused("blocks of one size", PART, **{**SPARSE, "order": "tiles"})
    refused("keys='drop' keeps none", {**PART, "keys": "drop"}, **SPARSE)
    refused("Did you mean 'block'", {**PART, "unit": "blocks"}, **SPARSE)


def test_runs_are_equal_and_an_abort_leaves_nothing():
    from dit_accel.testing import tiny_wan_pipeline

    pipe = tiny_wan_pipeline()
    handle = dit_accel.accelerate(pipe, region={**PART, "error_reset": (3,)}, **SPARSE)

    def sample(**call: object) -> torch.Tensor:
        return pipe(
            "a red star", "blurry", 96, 112, num_frames=9, num_inference_steps=6, output_type="latent",
            generator=torch.Generator().manual_seed(0), **call,
        ).frames  # fmt: skip

    out = sample()
    assert torch.isfinite(out).all() and torch.equal(sample(), out)
    report = handle.report(clear=True)
    assert report.dense_calls == 0 and report.sparse_calls == 2 * 2 * 2 * 6

    def stop(pipe: object, step: int, time: object, kwargs: dict) -> dict:
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        sample(callback_on_step_end=stop)
    assert torch.equal(sample(), out)
    handle.remove()
    assert len(tiny_wan_transformer().blocks) == 2  # what the counts above suppose
