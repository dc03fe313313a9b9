"""Inputs and oracles for methods whose heads read tokens in orders of their own: every plan token by token."""

import itertools

import torch

from dit_accel.layout import build_layout


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(layout, heads=2, batch=1, seed=0, dim=8):
    """Queries and keys in clusters of unequal size, so that there is something to choose."""
    centres = randn(12, dim, seed=seed) * 2
    labels = torch.randint(
        0, 12, (2, batch, layout.n_tokens, heads), generator=torch.Generator().manual_seed(seed)
    )
    labels = labels.minimum(labels.flip(2))
    return (centres[labels] + randn(2, batch, layout.n_tokens, heads, dim, seed=seed + 1)).unbind()


def token_mask(plan, block, layout):
    """Which token reads which, bool `[B, H, S, S]`, from the plan's lists and orders."""
    batch, heads = plan.lead
    n = layout.n_tokens
    mask = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    lead = (batch, heads)
    for b, h in itertools.product(range(batch), range(heads)):
        counts, indices = (x.expand(*lead, *x.shape[2:])[b, h] for x in (plan.counts, plan.indices))
        q_order, k_order = (x.expand(*lead, -1)[b, h].long() for x in (plan.q_order, plan.k_order))
        q_starts, k_starts = (x.expand(*lead, -1)[b, h].tolist() for x in (plan.q_starts, plan.k_starts))
        for starts in (q_starts, k_starts):
            assert starts[0] == 0 and starts[-1] == n
            assert all(0 <= after - first <= block for first, after in itertools.pairwise(starts))
        for i, count in enumerate(counts.tolist()):
            rows = q_order[q_starts[i] : q_starts[i + 1]]
            assert bool(count) == bool(len(rows)), "a block without tokens reads nothing, one with tokens something"
            for j in indices[i, :count].tolist():
                columns = k_order[k_starts[j] : k_starts[j + 1]]
                mask[b, h, rows[:, None], columns] = True
    return mask


def assert_well_formed(plan, layout):
    """Orders are permutations that leave the text at the end, text reads and is read, and blocks are as promised."""
    n, video = layout.n_tokens, layout.n_video_tokens
    for order in (plan.q_order, plan.k_order):
        assert order.dtype == torch.int32
        assert torch.equal(order.sort(dim=-1).values.long(), torch.arange(n).expand(order.shape))
        assert torch.equal(order[..., video:].long(), torch.arange(video, n).expand(*order.shape[:2], -1))
    mask = token_mask(plan, layout.block, layout)
    assert mask[:, :, video:].all() and mask[..., video:].all()
    for starts in (plan.q_starts, plan.k_starts):
        assert (starts == video).any(-1).all(), "no block holds both video and text"
    return mask


def masked_dense(query, key, value, mask):
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def labels_of(clusters):
    """Cluster of each token, `[B, H, S]`."""
    sizes = clusters.starts.diff(dim=-1)
    labels = torch.zeros(clusters.order.shape, dtype=torch.int64)
    for b, h in itertools.product(*map(range, sizes.shape[:2])):
        labels[b, h, clusters.order[b, h].long()] = torch.repeat_interleave(sizes[b, h]).long()
    return labels


def assert_rows_are_strangers(method):
    """What a row of the batch reads does not depend on the rows beside it."""
    layout = build_layout((3, 5, 7), "raster", 8)
    query, key = inputs(layout, batch=2)
    other = inputs(layout, batch=2, seed=7)
    mixed = [torch.cat([x[:1], y[1:]]) for x, y in zip((query, key), other, strict=True)]

    def mask(*qk):
        return token_mask(method.predict(*qk, layout, None, None), 8, layout)

    together = mask(query, key)
    assert torch.equal(mask(*mixed)[0], together[0]) and torch.equal(mask(query[:1], key[:1])[0], together[0])
    assert not torch.equal(mask(*mixed)[1], together[1])
