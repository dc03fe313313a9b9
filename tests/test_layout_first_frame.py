"""Orders that keep the first frame's tokens before all others, for models that tell them by their place."""

import math

import pytest
import torch

from dit_accel.layout import build_layout
from dit_accel.options import ORDERS

GRIDS = [(3, 5, 7), (2, 1, 3), (1, 9, 11), (4, 45, 2), (9, 16, 16)]


def build(grid, order, block=16, **more):
    return build_layout(grid, order, block, first_frame_apart=True, **more)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_order_and_back(grid, order, block):
    layout = build(grid, order, block, text=5)
    x = torch.randn(2, math.prod(grid), 3)
    assert torch.equal(layout.undo(layout.apply(x, 1), 1), x)
    frame = layout.coordinates()[:, 0]
    size = grid[1] * grid[2]
    assert (frame[:size] == 0).all() and (frame[size:] > 0).all()
    starts = layout.starts.view(-1)
    assert starts[0] == 0 and starts[-1] == math.prod(grid) + 5
    assert 1 <= starts.diff().min() and starts.diff().max() == layout.max_block <= block
    if order != "raster":
        assert size in starts, "no block holds tokens of both parts"
        assert torch.equal(layout.first_frame, starts[:-1] < size)


@pytest.mark.parametrize("order", ORDERS)
def test_near_blocks_are_those_of_the_ordinary_layout_where_the_blocks_are_the_same(order):
    """Tiles one frame deep are cut alike with and without; elsewhere nearness has no direction and no self."""
    near = build((3, 8, 8), order).near
    assert torch.equal(near, near.T) and not near.diagonal().any() and near.any(1).all()
    flat = {"tile": (1, 4, 4)} if order == "tiles" else {}
    if flat:
        assert torch.equal(build((3, 8, 8), order, **flat).near, build_layout((3, 8, 8), order, 16, **flat).near)


def test_a_tile_is_a_box():
    layout = build((5, 6, 7), "tiles", tile=(2, 2, 4))
    where = layout.coordinates()
    for first, after in zip(layout.starts.view(-1)[:-1], layout.starts.view(-1)[1:], strict=True):
        box = where[first:after]
        assert (box.amax(0) - box.amin(0) + 1).prod() == len(box)


def test_one_frame_alone_is_laid_out_as_ever():
    apart, ever = build((1, 9, 11), "packed"), build_layout((1, 9, 11), "packed", 16)
    assert torch.equal(apart.forward, ever.forward) and apart.even == ever.even
