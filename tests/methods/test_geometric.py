"""Methods that look only at places (neighborhood, clear, radial), against their formulas token by token."""

import itertools
import math
import tomllib

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.layout import ORDERS, build_layout
from dit_accel.methods import load_method
from dit_accel.testing import peak_bytes

GRIDS = [(3, 5, 7), (4, 9, 10), (1, 8, 11), (5, 1, 3)]
STATIC = ("clear", "neighborhood", "radial")


def plan_of(name, layout, heads=1, batch=1, **options):
    query = torch.zeros(batch, layout.n_tokens, heads, 4)
    return load_method(name, **options).predict(query, query, layout, None, None)


def blocks_of(tokens, layout):
    """Pairs of blocks that hold a pair of tokens. tokens: bool `[S, S]` in raster order."""
    tokens = layout.apply(layout.apply(tokens, 0), 1)
    ends = list(itertools.pairwise(layout.starts.view(-1).tolist()))
    return torch.tensor([[bool(tokens[a:b, c:d].any()) for c, d in ends] for a, b in ends])


def token_mask(grid, reads):
    """bool `[S, S]` of a rule about two (frame, row, column), in raster order."""
    places = list(itertools.product(*map(range, grid)))
    return torch.tensor([[reads(query, key) for key in places] for query in places])


# neighborhood


def window_of(i, length, window, stride, dilation, causal):
    """Coordinates that coordinate i reads, as the paper's section on strided neighbourhoods has it."""
    own = list(range(i % dilation, length, dilation))  # the sequence i belongs to
    at, window = own.index(i), min(window, len(own))
    stride = min(stride, window)
    group = at // stride
    if causal:
        leader = min(group * stride + stride - 1, len(own) - 1)
        return {own[j] for j in range(len(own)) if j <= at and leader - j < window}
    left, right = window // 2, window // 2 + window % 2 - 1
    leader = min(group * stride + stride // 2, len(own) - 1)
    centre = min(max(leader, left), len(own) - 1 - right)
    return {own[j] for j in range(len(own)) if -left <= j - centre <= right}


def neighborhood_mask(grid, window, stride=(1, 1, 1), dilation=(1, 1, 1), causal=(False,) * 3):
    tables = [
        [window_of(i, *facts) for i in range(facts[0])]
        for facts in zip(grid, window, stride, dilation, causal, strict=True)
    ]
    return token_mask(grid, lambda q, k: all(k[axis] in tables[axis][q[axis]] for axis in range(3)))


WINDOWS = [
    dict(window=(1, 1, 1), stride=(1, 1, 1)),
    dict(window=(3, 3, 5), stride=(1, 1, 1)),
    dict(window=(2, 4, 6), stride=(2, 3, 2)),
    dict(window=(99, 3, 4), stride=(1, 3, 4)),
    dict(window=(3, 3, 3), stride=(1, 2, 1), dilation=(1, 2, 3)),
    dict(window=(2, 3, 3), stride=(2, 1, 3), causal=(True, False, True)),
    dict(window=(2, 2, 3), stride=(1, 2, 1), dilation=(2, 1, 2), causal=(True, True, False)),
]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_neighborhood_keeps_exactly_the_blocks_that_hold_a_pair(grid, options):
    true = neighborhood_mask(grid, **options)
    for order in ORDERS:
        layout = build_layout(grid, order, 8)
        assert torch.equal(
            plan_of("neighborhood", layout, **options).to_mask()[0, 0], blocks_of(true, layout)
        ), order
    layout = build_layout(grid, "tiles", 12, tile=(2, 2, 3))
    assert torch.equal(plan_of("neighborhood", layout, **options).to_mask()[0, 0], blocks_of(true, layout))


@pytest.mark.parametrize(
    ("stride", "window"),
    [((2, 2, 4), (2, 6, 12)), ((2, 2, 4), (6, 2, 4)), ((4, 2, 8), (8, 2, 16)), ((2, 4, 4), (99, 4, 12))],
)
def test_windows_of_whole_tiles_read_nothing_else(stride, window):
    """Tiles of 2 x 2 x 4, strides of tiles, and windows that begin and end with tiles: exact to the token."""
    grid = (8, 4, 16)
    layout = build_layout(grid, "tiles", 16, tile=(2, 2, 4))
    true = neighborhood_mask(grid, window, stride)
    plan = plan_of("neighborhood", layout, window=window, stride=stride)
    read = layout.undo(layout.undo(plan.to_token_mask()[0, 0], 0), 1)
    assert torch.equal(read, true)
    assert (plan.counts == plan.counts[0, 0, 0]).all()  # also at the edges, every token sees a whole window


@pytest.mark.parametrize("tiles", [(1, 1, 1), (3, 3, 5), (1, 3, 5), (5, 1, 3)])
def test_stride_of_one_tile_is_sliding_tile_attention(tiles):
    """STA: a tile reads the tiles around it, the centre moved inward until all of them are there."""
    tile, counts = (2, 4, 2), (5, 3, 6)
    layout = build_layout(tuple(t * n for t, n in zip(tile, counts, strict=True)), "tiles", 16, tile=tile)

    def reads(query, key):
        for at, other, n, wide in zip(query, key, counts, tiles, strict=True):
            centre = min(max(at, wide // 2), n - 1 - wide // 2)
            if abs(other - centre) > wide // 2:
                return False
        return True

    sta = token_mask(counts, reads)  # its "tokens" are tiles, in the same order
    window = [t * n for t, n in zip(tile, tiles, strict=True)]
    for stride in (None, list(tile)):
        assert torch.equal(plan_of("neighborhood", layout, window=window, stride=stride).to_mask()[0, 0], sta)


def test_a_tile_of_sta_may_be_several_blocks():
    """STA's tiles of 6 x 8 x 8 tokens hold more than a block may: here a third of it is a block, the plan the same."""
    grid, stride, window = (9, 4, 8), (3, 2, 2), (9, 2, 6)
    layout = build_layout(grid, "tiles", 4, tile=(1, 2, 2))
    plan = plan_of("neighborhood", layout, window=window, stride=stride)
    read = layout.undo(layout.undo(plan.to_token_mask()[0, 0], 0), 1)
    assert torch.equal(read, neighborhood_mask(grid, window, stride))


def test_shares_of_the_axes_become_odd_numbers_of_strides():
    layout = build_layout((20, 40, 80), "tiles", 128, tile=(2, 8, 8))
    whole = plan_of("neighborhood", layout, window=[1.0, 1.0, 1.0])
    assert (whole.counts == layout.n_blocks).all()
    for shares, tokens in (
        ([0.5, 0.6, 0.25], [10, 24, 24]),  # 5 of 10, 3 of 5 and 2.5, so 3, of 10 tiles
        ([0.01, 1.0, 0.98], [2, 40, 72]),
        ([0.5, 24, 1.0], [10, 24, 80]),  # shares and tokens may stand side by side
    ):
        mask = plan_of("neighborhood", layout, window=shares).to_mask()
        assert torch.equal(mask, plan_of("neighborhood", layout, window=tokens).to_mask())
    # 1 is a token and 1.0 the whole axis, though Python holds them equal
    mask = plan_of("neighborhood", layout, window=[1.0, 1.0, 1.0], stride=[1, 1, 1]).to_mask()
    assert mask.all()
    mask = plan_of("neighborhood", layout, window=[1, 1, 1], stride=[1, 1, 1]).to_mask()
    assert torch.equal(mask[0, 0], torch.eye(layout.n_blocks, dtype=torch.bool))


def test_the_default_window_keeps_about_a_quarter():
    for grid in ((21, 30, 52), (21, 45, 80), (33, 45, 80)):  # Wan at 480p and 720p, HunyuanVideo
        layout = build_layout(grid, "tiles", 128, tile=(2, 8, 8))
        assert 0.2 < float(plan_of("neighborhood", layout).to_mask().float().mean()) < 0.32


# clear


def clear_mask(grid, radius, frame_radius=None):
    def reads(query, key):
        frames, rows, columns = (abs(a - b) for a, b in zip(query, key, strict=True))
        return rows**2 + columns**2 < radius**2 and (frame_radius is None or frames <= frame_radius)

    return token_mask(grid, reads)


@pytest.mark.parametrize("frame_radius", [None, 0, 2])
@pytest.mark.parametrize("radius", [0.5, 1, 2, 2.5, 5, 30])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_clear_keeps_exactly_the_blocks_that_hold_a_pair(grid, radius, frame_radius):
    true = clear_mask(grid, radius, frame_radius)
    for order in ORDERS:
        layout = build_layout(grid, order, 8)
        plan = plan_of("clear", layout, radius=radius, frame_radius=frame_radius)
        assert torch.equal(plan.to_mask()[0, 0], blocks_of(true, layout)), order


def test_the_disc_is_open():
    """A key at exactly the radius is not read: with blocks of one token the plan is the disc itself."""
    layout = build_layout((1, 7, 9), "raster", 1)
    mask = plan_of("clear", layout, radius=2).to_mask()[0, 0]
    assert mask[31].view(7, 9).nonzero().tolist() == [[y, x] for y in (2, 3, 4) for x in (3, 4, 5)]
    assert torch.equal(mask, clear_mask((1, 7, 9), 2))


def test_clear_in_flat_tiles_where_there_is_one_frame():
    arrangement = load_method("clear").arrangement
    layout = build_layout((1, 64, 64), arrangement.order, arrangement.block, tile=arrangement.tile)
    where = layout.coordinates().split(layout.sizes.int().tolist())
    edges = torch.stack([tile.amax(0) - tile.amin(0) + 1 for tile in where])
    assert (edges[:, 0] == 1).all() and edges[:, 1:].max() <= 16
    mask = plan_of("clear", layout).to_mask()
    assert abs(float(mask.float().mean()) - 0.33) < 0.01  # the docstring's number


# radial


def band_mask(grid, block, decay_factor, first_frame=True):
    """The published rule, frame by frame: bool `[S, S]` in raster order."""
    frames, per_frame = grid[0], grid[1] * grid[2]
    base = 2 ** len(f"{per_frame:b}")
    place = torch.arange(per_frame)
    from_place = (place[:, None] - place).abs()

    def frame_pair(apart, key_frame):
        if apart <= 1 or (first_frame and key_frame == 0):
            return from_place >= 0
        wide = base / 2 ** len(f"{apart:b}")
        if wide < block and apart % int(block / wide):
            return from_place < 0
        return from_place <= max(decay_factor * wide, block)

    return torch.cat(
        [torch.cat([frame_pair(abs(f - g), g) for g in range(frames)], 1) for f in range(frames)]
    )


def voted(grid, block, band, vote):
    """Blocks that win in some pair of frames: the share is that of the parts in these frames alone."""
    per_frame = grid[1] * grid[2]
    tokens = torch.arange(math.prod(grid))
    frame = tokens // per_frame
    blocks = list(tokens.split(block))
    mask = torch.zeros(len(blocks), len(blocks), dtype=torch.bool)
    for (i, query), (j, key) in itertools.product(enumerate(blocks), repeat=2):
        for f, g in itertools.product(frame[query].unique(), frame[key].unique()):
            part = band[query[frame[query] == f]][:, key[frame[key] == g]]
            mask[i, j] |= int(part.sum()) > vote * part.numel()
    return mask


BANDS = [  # grid, block, decay_factor
    ((7, 5, 7), 8, 0.2),
    ((7, 5, 7), 8, 1.0),
    ((6, 4, 8), 16, 1.5),  # the frame is a multiple of the block
    ((20, 3, 4), 16, 0.5),  # the frame is smaller than the block: far frames are left out
    ((11, 1, 3), 16, 0.2),  # several frames in a block
    ((3, 5, 7), 128, 0.2),  # one block
    ((1, 9, 10), 16, 0.2),
]


@pytest.mark.parametrize("vote", [0, 1 / 3, 0.5])
@pytest.mark.parametrize(("grid", "block", "decay_factor"), BANDS)
def test_radial_is_the_band_voted_by_pairs_of_frames(grid, block, decay_factor, vote):
    layout = build_layout(grid, "raster", block)
    for first_frame in (True, False):
        band = band_mask(grid, block, decay_factor, first_frame)
        plan = plan_of("radial", layout, decay_factor=decay_factor, first_frame=first_frame, vote=vote)
        assert torch.equal(plan.to_mask()[0, 0], voted(grid, block, band, vote))
        if vote == 0:
            assert torch.equal(plan.to_mask()[0, 0], blocks_of(band, layout))


# Frames of 3600 and 1296 tokens in blocks of 128 leave 16 over; 1560 (480p) leaves 24. Here an eighth of each.
ODD_FRAMES = [(7, 18, 25), (9, 9, 18), (8, 13, 15)]


def lost(kept, grid, block, near):
    """Query tokens to which some frame does not show the places within `near` of their own."""
    per_frame = grid[1] * grid[2]
    where = torch.arange(math.prod(grid))
    own = (where[:, None] % per_frame - where % per_frame).abs() <= near
    apart = (where[:, None] // per_frame - where // per_frame).abs()
    base = 2 ** len(f"{per_frame:b}")
    every = [1] + [max(1, int(block * 2 ** len(f"{d:b}") / base)) for d in range(1, grid[0])]
    shown = apart % torch.tensor(every)[apart] == 0
    return int((own & shown & ~kept[where[:, None] // block, where // block]).any(1).sum())


@pytest.mark.parametrize("vote", [0.0, 0.1, 1 / 3, 0.5])
@pytest.mark.parametrize("grid", ODD_FRAMES, ids=str)
def test_no_token_loses_its_own_place_in_any_frame(grid, vote):
    """Nor what is near it: (1 - sqrt(2 vote)) of a block to both sides, whatever a frame leaves over."""
    block = 16
    near = int((1 - math.sqrt(2 * vote)) * block)
    for first_frame in (True, False):
        plan = plan_of("radial", build_layout(grid, "raster", block), first_frame=first_frame, vote=vote)
        kept = plan.to_mask()[0, 0]
        assert lost(kept, grid, block, near) == 0
        assert kept.float().mean() < 0.9


@pytest.mark.parametrize("grid", [*ODD_FRAMES, (7, 16, 28)], ids=str)
def test_the_vote_over_whole_blocks_loses_strips(grid):
    """What the published shrinking does where blocks straddle frames, and why ours cuts them there.

    A key column that only the last 5 of a block's 16 query tokens see has no chance against all 16. Frames that are a
    multiple of the block lose nothing, which is what users of mit-han-lab/radial-attention saw: 720 x 1280 and
    432 x 768 fail at the top and bottom of frames, 576 x 1024 does not.
    """
    block, per_frame, n = 16, grid[1] * grid[2], math.prod(grid)
    size = math.ceil(n / block)
    frame = torch.arange(n) // per_frame
    band = band_mask(grid, block, 0.2)
    kept = torch.zeros(size, size, dtype=torch.bool)
    for f, g in itertools.product(range(grid[0]), repeat=2):
        part = torch.zeros(size * block, size * block)
        part[:n, :n] = band & (frame[:, None] == f) & (frame == g)
        columns = part.view(size, block, size, block).mean(1)
        kept |= (columns > 1 / 3).sum(-1) > 0.6 * (columns > 0).sum(-1).clamp(min=1)
    assert (lost(kept, grid, block, 0) > 0) == bool(per_frame % block)
    ours = plan_of("radial", build_layout(grid, "raster", block)).to_mask()[0, 0]
    assert lost(ours, grid, block, 2) == 0
    assert (ours | kept).sum() < 1.03 * kept.sum()  # it takes but a few blocks more


def test_own_frame_and_its_neighbours_are_whole():
    grid, block = (7, 18, 25), 16
    read = plan_of("radial", build_layout(grid, "raster", block)).to_token_mask()[0, 0]
    frame = torch.arange(math.prod(grid)) // (18 * 25)
    assert read[(frame[:, None] - frame).abs() <= 1].all() and read[:, frame == 0].all()


@pytest.mark.parametrize("order", ["tiles", "packed", "gilbert"])
def test_radial_needs_raster_order(order):
    with pytest.raises(UsageError, match=rf"'radial' cannot work in order '{order}'.*set it to 'raster'"):
        plan_of("radial", build_layout((3, 5, 7), order, 16))


# all of them


def arranged(name, grid, block=None, text=0, **changes):
    """The layout a method was made for, with small blocks where asked."""
    arrangement = load_method(name).arrangement
    tile = None if block else arrangement.tile
    return build_layout(grid, arrangement.order, block or arrangement.block, tile=tile, text=text, **changes)


@pytest.mark.parametrize("name", STATIC)
def test_text_is_read_by_all_and_reads_all(name):
    options = {"clear": dict(radius=2), "neighborhood": dict(window=[1, 3, 3]), "radial": {}}[name]
    alone, layout = (arranged(name, (7, 5, 7), 8, text) for text in (0, 19))
    mask = plan_of(name, layout, **options).to_mask()[0, 0]
    n = layout.n_video_blocks
    assert layout.n_blocks == n + 3 and mask[n:].all() and mask[:, n:].all()
    assert torch.equal(mask[:n, :n], plan_of(name, alone, **options).to_mask()[0, 0])
    assert not mask.all()


@pytest.mark.parametrize("name", STATIC)
def test_one_plan_stands_for_all_and_is_made_once(name):
    layout = arranged(name, (3, 5, 7), 8)
    before = layout.bytes_held()
    plan = plan_of(name, layout)
    assert plan.lead == (1, 1) and layout.bytes_held() > before
    held = layout.bytes_held()
    again = plan_of(name, layout, heads=3, batch=2)
    assert again.indices is plan.indices and again.counts is plan.counts and layout.bytes_held() == held
    assert int(plan.counts.min()) >= 1 and plan.to_mask()[0, 0].diagonal().all()
    other = {"clear": dict(radius=1), "neighborhood": dict(window=[1, 1, 1]), "radial": dict(vote=0)}[name]
    assert plan_of(name, layout, **other).indices is not plan.indices


@pytest.mark.parametrize("name", STATIC)
def test_no_mask_of_tokens_is_ever_made(name):
    """Wan 2.1 at 720p, 75600 tokens: a mask of them would be 5.7 GB."""
    layout = arranged(name, (21, 45, 80))
    query = torch.zeros(1, 1, 1, 4)
    method = load_method(name)
    peak, largest = peak_bytes(lambda: method.predict(query, query, layout, None, None))
    assert peak < 150e6 and largest < 50e6
    assert 0.15 < float(method.predict(query, query, layout, None, None).to_mask().float().mean()) < 0.4


@pytest.mark.parametrize("name", STATIC)
def test_tiny_grids(name):
    for grid in ((1, 1, 1), (1, 1, 9), (13, 1, 1)):
        plan = plan_of(name, arranged(name, grid))
        assert plan.to_mask()[0, 0].diagonal().all()


def test_options_may_come_from_a_preset():
    table = tomllib.loads("window = [0.5, 4, 1.0]\nstride = [1, 2, 8]\ncausal = [true, false, false]")
    assert load_method("neighborhood", **table) == load_method(
        "neighborhood", window=(0.5, 4, 1.0), stride=(1, 2, 8), causal=(True, False, False)
    )
    hash(load_method("neighborhood", **table))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("neighborhood", dict(window=[3, 3]), r"window=\[3, 3\].*list of three.*share of the axis"),
        ("neighborhood", dict(window=5), "window=5.*list of three"),
        ("neighborhood", dict(window=[1.5, 3, 3]), r"window=\[1.5, 3, 3\].*up to 1.0"),
        ("neighborhood", dict(window=[0, 3, 3]), "whole number of tokens from 1"),
        ("neighborhood", dict(window=[True, 3, 3]), "whole number of tokens from 1"),
        ("neighborhood", dict(window=[3, 3, 3], stride=[1, 4, 1]), "stride 4 of the rows.*window of 3"),
        ("neighborhood", dict(stride=[1, 0, 1]), r"stride=\[1, 0, 1\].*whole number from 1"),
        ("neighborhood", dict(dilation=[1, 1, 0.5]), "dilation=.*whole number from 1"),
        ("neighborhood", dict(causal=[1, 0, 0]), "causal=.*true or false"),
        ("clear", dict(radius=0), "radius=0 .*above 0"),
        ("clear", dict(radius="8"), "radius='8'.*above 0"),
        ("clear", dict(frame_radius=-1), "frame_radius=-1.*from 0"),
        ("clear", dict(frame_radius=1.5), "frame_radius=1.5.*from 0"),
        ("radial", dict(decay_factor=-0.1), "decay_factor=-0.1.*from 0"),
        ("radial", dict(vote=0.6), "vote=0.6.*from 0 to 0.5"),
        ("radial", dict(first_frame=1), "first_frame=1.*true or false"),
    ],
)
def test_options_that_cannot_be(name, options, words):
    with pytest.raises(UsageError, match=words):
        load_method(name, **options)
