"""Law 4: every token order can be undone exactly, on any grid."""

import math

import pytest
import torch

from dit_accel.layout import balanced_parts, build_layout, tile_parts
from dit_accel.options import ORDERS

GRIDS = [(1, 1, 1), (3, 5, 7), (17, 16, 16), (5, 1, 3), (1, 9, 11), (2, 8, 8), (13, 1, 1), (4, 45, 2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_order_and_back(grid, order, block):
    layout = build_layout(grid, order, block)
    x = torch.randn(2, math.prod(grid), 3)
    assert torch.equal(layout.undo(layout.apply(x, 1), 1), x)
    assert torch.equal(layout.apply(layout.undo(x, 1), 1), x)
    starts = layout.starts.view(-1)
    assert starts[0] == 0 and starts[-1] == math.prod(grid)
    assert 1 <= starts.diff().min() and starts.diff().max() == layout.max_block <= block
    assert torch.equal(starts.diff().float(), layout.sizes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_tile_is_a_box(grid):
    layout = build_layout(grid, "tiles", 16)
    frames, rows, columns = (torch.arange(n) for n in grid)
    where = torch.stack(torch.meshgrid(frames, rows, columns, indexing="ij"), -1).view(1, -1, 3)
    where = layout.apply(where, 1)[0]
    for first, after in zip(layout.starts.view(-1)[:-1], layout.starts.view(-1)[1:], strict=True):
        tile = where[first:after]
        edges = tile.amax(0) - tile.amin(0) + 1
        assert edges.prod() == len(tile)


def test_parts_are_balanced():
    assert balanced_parts(17, 5) == [4, 4, 3, 3, 3]
    assert balanced_parts(3, 3) == [1, 1, 1]
    assert tile_parts((17, 16, 16), 128) == (5, 2, 4)


@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packed_blocks_are_full(grid, block):
    layout = build_layout(grid, "packed", block)
    sizes = layout.sizes.tolist()
    assert len(sizes) == math.ceil(math.prod(grid) / block)
    assert all(size == block for size in sizes[:-1])


def test_packed_blocks_are_nearly_boxes():
    grid = (21, 30, 52)
    layout = build_layout(grid, "packed", 128)
    where = torch.cartesian_prod(*(torch.arange(n) for n in grid))[layout.forward]
    boxes = [part.amax(0) - part.amin(0) + 1 for part in where.split(128)]
    assert max(int(box.max()) for box in boxes) <= 12
    assert sum(int(box.prod()) for box in boxes) < 1.4 * math.prod(grid)


def test_near_blocks_share_a_face():
    tiles = build_layout((8, 8, 8), "tiles", 64)  # 2x2x2 boxes of 4x4x4
    places = torch.cartesian_prod(*[torch.arange(2)] * 3)
    assert torch.equal(tiles.near, (places[:, None] - places).abs().sum(-1) == 1)
    assert torch.equal(build_layout((8, 8, 8), "packed", 64).near.sum(1), torch.full((8,), 3))
    raster = build_layout((1, 4, 8), "raster", 8).near
    assert raster.tolist() == [[abs(i - j) == 1 for j in range(4)] for i in range(4)]


@pytest.mark.parametrize(
    ("grid", "tiles", "packed"),
    [((21, 30, 52), 270, 256), ((21, 45, 80), 720, 591), ((33, 45, 80), 1008, 929), ((33, 32, 32), 343, 264)],
)
def test_blocks_of_real_grids(grid, tiles, packed):
    """The numbers of docs/sparse-attention.md."""
    assert build_layout(grid, "tiles", 128).n_blocks == tiles
    assert build_layout(grid, "packed", 128).n_blocks == packed
