"""rectified, sparge and lite against their formulas, stated once more from the paper's side: by loops, in float64."""

from itertools import pairwise

import pytest
import torch

from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback
from dit_accel.kernels.coarse import add_block_means
from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.trajectory import Call

BATCH, HEADS, DIM = 2, 3, 8


def call(**changes):
    facts = {"run": 1, "branch": "cond", "step": 0, "noise": 0.5, "grid": (3, 5, 7), "segments": ()}
    return Call(**{**facts, "role": "transformer", "n_layers": 2, "layer": 0, **changes})


def tokens(layout, seed=0, spread=1.0):
    """Query, key and value `[B, S, H, D]`: every block has a direction of its own, and tokens scatter around it."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.repeat_interleave(torch.arange(layout.n_blocks), layout.sizes.long())
    centers = torch.randn(3, BATCH, layout.n_blocks, HEADS, DIM, generator=generator)
    noise = torch.randn(3, BATCH, layout.n_tokens, HEADS, DIM, generator=generator)
    return (1.5 * centers[:, :, block] + spread * noise).unbind()


def blocks_of(layout):
    return list(pairwise(layout.starts.view(-1).tolist()))


@pytest.mark.parametrize("text", [0, 11])
@pytest.mark.parametrize("normaliser", ["measured", "predicted"])
@pytest.mark.parametrize("compensation", ["gain", "all", "none"])
def test_rectified_output_by_its_formulas(text, compensation, normaliser):
    layout = build_layout((3, 5, 7), "gilbert", 16, text=text)
    query, key, value = tokens(layout)
    options = dict(
        keep=0.3, top_p=0.5, neighbours=None, anchor=False, compensation=compensation, mass=normaliser
    )
    plan = load_method("rectified", **options).predict(query, key, layout, call(), None)
    assert (plan.coarse is None) == (compensation == "none")
    read = plan.to_mask()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    if plan.coarse is not None:
        add_block_means(out, lse, q, k, v, plan)
    blocks, video = blocks_of(layout), layout.n_video_blocks
    first_text = layout.n_video_tokens
    compensated = 0
    for b in range(BATCH):
        for h in range(HEADS):
            qs, ks, vs = (x[b, h].double() for x in (q, k, v))
            for i, (low, high) in enumerate(blocks):
                if i >= video:  # text queries are dense
                    dense = torch.softmax(qs[low:high] @ ks.T * DIM**-0.5, -1) @ vs
                    torch.testing.assert_close(out[b, h, low:high].double(), dense, rtol=1e-4, atol=1e-5)
                    continue
                mean = qs[low:high].mean(0)
                # Isolated pooling: a column for each video block and each text key, then reallocation by size.
                logits = [mean @ ks[a:z].mean(0) * DIM**-0.5 for a, z in blocks[:video]]
                logits += [mean @ ks[t] * DIM**-0.5 for t in range(first_text, layout.n_tokens)]
                pooled = torch.softmax(torch.stack(logits), 0)
                size = torch.tensor([z - a for a, z in blocks[:video]] + [1] * text).double()
                mass = pooled * size / (pooled * size).sum()
                share = mass[:video]
                # The larger of two budgets, the best first; text is read beside them.
                ranked = sorted(range(video), key=lambda j: (-float(logits[j]), j))
                least, sums = -(-3 * video // 10), 0.0
                kept = set()
                held = float(mass[video:].sum()) if text else 0.0
                for n, j in enumerate(ranked):
                    if n >= least and held + sums >= 0.5:
                        break
                    kept.add(j)
                    sums += float(share[j])
                assert {j for j in range(video) if read[b, h, i, j]} == kept
                assert read[b, h, i, video:].all()
                # Gain against error of pooling, on plain products.
                spread_q = (qs[low:high] - mean).abs().mean(0)
                weights = torch.zeros(video).double()
                for j, (a, z) in enumerate(blocks[:video]):
                    k_mean = ks[a:z].mean(0)
                    spread_k = (ks[a:z] - k_mean).abs().mean(0)
                    gain, error = abs(mean @ k_mean), abs(spread_q @ k_mean) + abs(mean @ spread_k)
                    worth = {"gain": gain > error, "all": True, "none": False}[compensation]
                    weights[j] = share[j] if j not in kept and worth else 0
                compensated += int((weights > 0).sum())
                columns = [t for j in sorted(kept) for t in range(*blocks[j])]
                columns += range(first_text, layout.n_tokens)
                sparse = torch.softmax(qs[low:high] @ ks[columns].T * DIM**-0.5, -1) @ vs[columns]
                means = torch.stack([vs[a:z].mean(0) for a, z in blocks[:video]])
                if normaliser == "measured":  # as logits: what was read has the mass that reading it finds
                    read_mass = torch.logsumexp(qs[low:high] @ ks[columns].T * DIM**-0.5, -1)
                    k_means = torch.stack([ks[a:z].mean(0) for a, z in blocks[:video]])
                    pooled_mass = qs[low:high] @ k_means.T * DIM**-0.5 + size[:video].log()
                    pooled_mass = pooled_mass.masked_fill(weights == 0, -torch.inf)
                    shares = torch.softmax(torch.cat([read_mass[:, None], pooled_mass], -1), -1)
                    true = shares[:, :1] * sparse + shares[:, 1:] @ means
                else:
                    true = (1 - weights.sum()) * sparse + weights @ means
                torch.testing.assert_close(out[b, h, low:high].double(), true, rtol=1e-4, atol=1e-5)
    assert (compensated > 0) == (compensation != "none")


def test_rectified_anchors_the_first_frame():
    layout = build_layout((4, 8, 8), "gilbert", 16)
    query, key, _ = tokens(layout)
    options = dict(keep=0.1, top_p=0.01, neighbours=None)
    free, anchored = (
        load_method("rectified", anchor=anchor, **options).predict(query, key, layout, call(), None).to_mask()
        for anchor in (False, True)
    )
    first = layout.first_frame
    assert anchored[:, :, first][..., first].all() and not free[:, :, first][..., first].all()
    assert torch.equal(anchored[:, :, ~first], free[:, :, ~first])


@pytest.mark.parametrize("similarity", [-1.0, 0.35, 0.6])
def test_sparge_plan_by_its_formulas(similarity):
    layout = build_layout((3, 5, 7), "gilbert", 16)
    query, key, _ = tokens(layout, spread=2.0)
    key = key + 3 * torch.randn(
        1, 1, HEADS, DIM, generator=torch.Generator().manual_seed(5)
    )  # what keys share
    plan = load_method("sparge", top_p=0.6, similarity=similarity, neighbours=None).predict(
        query, key, layout, call(), None
    )
    read = plan.to_mask()
    blocks = blocks_of(layout)
    vetoed = 0
    for b in range(BATCH):
        for h in range(HEADS):
            qs, ks = query[b, :, h].double(), key[b, :, h].double()

            def cosines(x):
                unit = torch.nn.functional.normalize(x, dim=-1)
                return float((unit @ unit.T).mean())

            good_q = [cosines(qs[a:z]) > similarity for a, z in blocks]
            good_k = [cosines((ks - ks.mean(0))[a:z]) > similarity for a, z in blocks]
            vetoed += good_q.count(False) + good_k.count(False)
            for i, (low, high) in enumerate(blocks):
                if not good_q[i]:
                    assert read[b, h, i].all()
                    continue
                logits = torch.stack([qs[low:high].mean(0) @ ks[a:z].mean(0) for a, z in blocks]) * DIM**-0.5
                mass = logits.exp() * torch.tensor([z - a for a, z in blocks]) * torch.tensor(good_k)
                mass = mass / mass.sum().clamp(min=1e-300)
                kept, sums = {j for j, good in enumerate(good_k) if not good}, 0.0
                for j in sorted(
                    (j for j, good in enumerate(good_k) if good), key=lambda j: -float(logits[j])
                ):
                    if sums >= 0.6:
                        break
                    kept.add(j)
                    sums += float(mass[j])
                assert {j for j in range(len(blocks)) if read[b, h, i, j]} == kept, (b, h, i)
    assert (vetoed > 0) == (similarity > 0)


def test_sparge_sink_and_neighbours():
    layout = build_layout((3, 5, 7), "tiles", 16)
    query, key, _ = tokens(layout)
    plan = load_method("sparge", keep=0.3, similarity=-1, sink=True).predict(query, key, layout, call(), None)
    read = plan.to_mask()
    assert read[..., 0].all() and read.diagonal(dim1=-2, dim2=-1).all()
    assert (read.sum(-1) == -(-3 * layout.n_blocks // 10)).all()  # both count towards the budget


def test_lite_follows_the_running_maximum():
    """Three steps by hand: last block first, a block matters if any row's score comes above its maximum + threshold."""
    layout = build_layout((3, 5, 7), "tiles", 16)
    method = load_method("lite", threshold=-2.0, neighbours=None)
    blocks = blocks_of(layout)
    state = method.init_state(None, layout)
    expected = torch.ones(BATCH, HEADS, len(blocks), len(blocks), dtype=torch.bool)
    read_share = []
    for step in range(3):
        query, key, value = tokens(layout, seed=step)
        now = call(step=step)
        plan = method.predict(query, key, layout, now, state)
        read = plan.to_mask().expand(BATCH, HEADS, -1, -1)
        assert torch.equal(read, expected)
        read_share.append(float(read.float().mean()))
        qkv = (x.transpose(1, 2) for x in (query, key, value))
        _, _, needed = block_sparse_feedback(*qkv, plan, method.threshold_at(now), layout="bhsd")
        method.learn(needed, plan, layout, now, state)
        following = torch.zeros_like(expected)
        scores = (
            torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * DIM**-0.5 * 1.4426950408889634
        )
        for b in range(BATCH):
            for h in range(HEADS):
                for i, (low, high) in enumerate(blocks):
                    running = torch.full((high - low,), -torch.inf).double()
                    for j in reversed([j for j in range(len(blocks)) if expected[b, h, i, j]]):
                        best = scores[b, h, low:high, slice(*blocks[j])].amax(-1)
                        following[b, h, i, j] = bool((best - running > -2.0).any())
                        running = torch.maximum(running, best)
        expected = following
    assert read_share[0] == 1 and read_share[1] < 0.9 and read_share[2] < read_share[1]


def test_lite_keeps_what_must_be_kept_and_needs_a_state():
    layout = build_layout((3, 5, 7), "tiles", 16)
    query, key, value = tokens(layout)
    state = (method := load_method("lite", threshold=-0.0, first_frame=True)).init_state(query, layout)
    for _ in range(3):
        plan = method.predict(query, key, layout, call(), state)
        qkv = (x.transpose(1, 2) for x in (query, key, value))
        needed = block_sparse_feedback(*qkv, plan, 0.0, layout="bhsd")[2]
        method.learn(torch.zeros_like(needed), plan, layout, call(), state)
    left = method.predict(query, key, layout, call(), state).to_mask()
    must = layout.first_frame[None] | torch.eye(layout.n_blocks, dtype=torch.bool)
    assert torch.equal(left, must.expand_as(left))
    assert method.predict(query, key, layout, call(), None).to_mask().all()


def test_lite_threshold_follows_the_noise_level():
    method = load_method("lite", threshold=-12, last_threshold=-4)
    assert [method.threshold_at(call(noise=noise)) for noise in (1, 0.5, 0)] == [-12, -8, -4]
    assert load_method("lite", threshold=-3).threshold_at(call(noise=0.2)) == -3


def test_bad_options_get_one_clear_error():
    for name in ("rectified", "sparge"):
        with pytest.raises(UsageError, match="neighbours=-1 is not possible"):
            load_method(name, keep=0.3, neighbours=-1)
    with pytest.raises(UsageError, match="needs a budget"):
        load_method("sparge")
    with pytest.raises(UnknownNameError, match=r"compensation 'gian'.*Did you mean 'gain'"):
        load_method("rectified", compensation="gian")
    with pytest.raises(UsageError, match="similarity=2 is not possible"):
        load_method("sparge", keep=0.3, similarity=2)
    with pytest.raises(UsageError, match="threshold=3 is not possible: it is at most 0"):
        load_method("lite", threshold=3)
    with pytest.raises(UnknownNameError, match="option of method 'lite'"):
        load_method("lite", keep=0.3)


def test_sparge_heads_find_their_own_budget():
    """By hand on the sampled rows: the least share that covers enough of the true attention, head by head."""
    from dit_accel.methods.parts.cluster import spread_tokens
    from dit_accel.methods.parts.tuning import CHOICES, ROWS

    layout = build_layout((3, 5, 7), "gilbert", 16)
    query, key, _ = tokens(layout)
    query = query * torch.tensor([0.3, 1.0, 2.0])[:, None]  # flat, ordinary and peaked heads
    method, state = load_method("sparge", l1=0.3, similarity=-1, neighbours=None), {}
    plan = method.predict(query, key, layout, call(), state)
    read, blocks = plan.to_mask(), blocks_of(layout)
    sizes = torch.tensor([z - a for a, z in blocks])
    rows = spread_tokens(layout.n_tokens, ROWS).tolist()
    found = []
    for b in range(BATCH):
        for h in range(HEADS):
            qs, ks = query[b, :, h].double(), key[b, :, h].double()
            k_means = torch.stack([ks[a:z].mean(0) for a, z in blocks])
            curves = []  # of each row: predicted share and true share, best block first
            for row in rows:
                low, high = next((a, z) for a, z in blocks if a <= row < z)
                logits = k_means @ qs[low:high].mean(0) * DIM**-0.5
                share = torch.softmax(logits + sizes.log(), 0)
                weights = torch.softmax(ks @ qs[row] * DIM**-0.5, 0)
                true = torch.stack([weights[a:z].sum() for a, z in blocks])
                best = logits.argsort(descending=True)
                curves.append((share[best].cumsum(0), true[best].cumsum(0)))
            for n in range(1, CHOICES + 1):
                places = [min(int((c < n / CHOICES).sum()), len(blocks) - 1) for c, _ in curves]
                covered = sum(float(t[place]) for (_, t), place in zip(curves, places, strict=True)) / len(
                    rows
                )
                if covered >= 0.85:
                    break
            found.append(n / CHOICES)
            for i, (low, high) in enumerate(blocks):
                logits = k_means @ qs[low:high].mean(0) * DIM**-0.5
                share = torch.softmax(logits + sizes.log(), 0)
                best = logits.argsort(descending=True)
                count = min(int((share[best].cumsum(0) < n / CHOICES).sum()) + 1, len(blocks))
                assert {j for j in range(len(blocks)) if read[b, h, i, j]} == set(best[:count].tolist())
    torch.testing.assert_close(state["top_p"].flatten().tolist(), found, rtol=0, atol=1e-6)
    assert len(set(found)) > 1
    # What was found stays for the run, and a state that is unknown looks again.
    again = method.predict(query * 0.1, key, layout, call(step=1), state)
    fresh = method.predict(query * 0.1, key, layout, call(step=1), None)
    assert state["top_p"].flatten().tolist() == pytest.approx(found, abs=1e-6)
    assert again.counts.sum() != fresh.counts.sum()
    for options in ({"l1": 3}, {"l1": 0.1, "top_p": 0.5}):
        with pytest.raises(UsageError, match="stands in the place of top_p"):
            load_method("sparge", **options)
