"""The pictures of the methods: what a token reads, in its place, whatever order tokens stand in; one layout for all."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.plan import BlockPlan
from dit_accel.trajectory import Call

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
GRID = (5, 6, 6)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import draw_methods

        yield draw_methods
    finally:
        sys.path.remove(str(SCRIPTS))


def own_blocks(layout):
    """A plan in which each block reads itself alone."""
    return BlockPlan.from_mask(
        torch.eye(layout.n_blocks, dtype=torch.bool)[None, None],
        layout.starts,
        layout.starts,
        n_q_tokens=layout.n_tokens,
        n_k_tokens=layout.n_tokens,
    )


@pytest.mark.parametrize("order", ["raster", "tiles", "packed", "gilbert"])
def test_the_tokens_of_the_own_block_are_found(script, order):
    layout = build_layout(GRID, order, 16)
    read = script.tokens_read(own_blocks(layout), layout)
    places = layout.coordinates()
    middle = (places == torch.tensor([2, 3, 3])).all(1).nonzero().item()
    starts = layout.starts[0, 0]
    block = int((starts <= middle).sum()) - 1
    wanted = np.zeros(GRID, dtype=bool)
    for frame, row, column in places[int(starts[block]) : int(starts[block + 1])].tolist():
        wanted[frame, row, column] = True
    assert read[2, 3, 3] and (read == wanted).all() and 0 < wanted.sum() <= 16


def test_orders_of_a_head_are_followed(script):
    """svg1 gives each head an order of its own; a token reads itself in any."""
    layout = build_layout(GRID, "raster", 16)
    query = torch.randn(1, layout.n_tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    call = Call(1, "cond", 0, 0.5, GRID, (("video", 0, layout.n_tokens),), "transformer", 1, 0)
    plan = load_method("svg1", keep=0.3).predict(query, query, layout, call, None)
    read = script.tokens_read(plan, layout)
    assert read[2, 3, 3] and 0.1 < read.mean() < 0.6


def test_pictures_have_one_size_and_few_bytes(script, tmp_path):
    sizes = set()
    for blocks in (20, 136):
        masks = np.random.default_rng(0).random((3, blocks, blocks)) < 0.25
        picture = script.draw("some", {"keep": 0.25}, masks, np.ones(GRID, dtype=bool), np.full(3, 0.25))
        picture.save(tmp_path / "some.png", optimize=True)
        assert (tmp_path / "some.png").stat().st_size < 60_000
        red, green, _ = np.moveaxis(np.asarray(picture.convert("RGB")).astype(int), -1, 0)
        assert ((red > 200) & (green < 100)).any(), "the cross is not red"
        sizes.add(picture.size)
    assert len(sizes) == 1
