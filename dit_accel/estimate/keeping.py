"""Keeping: what share of dense attention a preset's sparse calls run, from the grid and the blocks it is cut into."""

from __future__ import annotations

import math

from dit_accel.arrangement import arrange, blocks_for, tile_parts
from dit_accel.errors import UsageError
from dit_accel.estimate.timing import Sparse
from dit_accel.methods import load_method
from dit_accel.options import SparseOptions

_BLOCK = 128  # tokens of a block as executors run it: smaller ones cost as much


def sparse_call(
    options: SparseOptions, keep: float | None, grid: tuple[int, int, int], text: int
) -> tuple[Sparse, float]:
    """A call that keeps so much, and the share of all keys that its queries read.

    Text is read by every query, and reads everything.

    Args:
        keep: of the visual key blocks; None: neither the method nor the caller says it.
        text: tokens of it in self-attention, padding left out.

    Raises:
        UsageError: a method whose share is not known before a run.
    """
    if keep is None or not 0 < keep <= 1:
        if keep is not None:
            raise UsageError(f"--keep {keep:g}: a share above 0 and up to 1")
        raise UsageError(
            f"what method {options.method!r} keeps is not known before a run; say what to reckon with: --keep 0.3"
        )
    method = load_method(options.method, keep=options.keep, top_p=options.top_p, **options.method_options)
    arrangement = arrange(method, options)
    video = math.prod(grid)
    if arrangement.order == "tiles":
        tile = arrangement.tile
        cuts = tile_parts(grid, arrangement.block) if tile is None else map(_ceil, grid, tile)
        blocks = math.prod(cuts)
    else:
        blocks = math.ceil(video / arrangement.block)
    kept = blocks_for(keep, blocks) / blocks
    joint = video + text
    read = (kept * video + text) / joint
    achieved = (video * read + text) / joint
    # what blocks leave empty is computed all the same
    room = (blocks * max(arrangement.block, _BLOCK // 2) + text) / joint if arrangement.order == "tiles" else 1.0
    every = options.predict_every
    call = Sparse(min(1.0, achieved) * room**2, joint, blocks + math.ceil(text / _BLOCK), 1 / every)
    return call, achieved


def _ceil(length: int, edge: int) -> int:
    return math.ceil(length / edge)
