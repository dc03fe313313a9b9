"""Law 1: keeping everything, through the sparse kernel, is stock diffusers."""

import pytest
import torch

from dit_accel.methods.radial import Method as Radial


@pytest.mark.every_pair
@pytest.mark.parametrize(
    ("order", "batch", "guidance"), [("tiles", 2, True), ("raster", 1, False)], ids=["tiles-2-cfg", "raster-1-no-cfg"]
)
def test_keeping_everything_is_stock_diffusers(bench, method, install, relative, order, batch, guidance):
    if isinstance(method(1.0), Radial):
        order = "raster"  # its bands are runs of that; it refuses others
    dense = bench.sample(batch=batch, guidance=guidance, steps=2)
    handle = install(bench.pipe, method(1.0), order=order)
    sparse = bench.sample(batch=batch, guidance=guidance, steps=2)
    report = handle.report()
    assert relative(sparse, dense) < 1e-4
    assert report.dense_calls == 0 and not report.fallbacks
    forwards = 2 * (bench.family.forwards if guidance else 1)  # of two steps
    assert report.sparse_calls == forwards * len(bench.attentions())
    assert report.keep_achieved == 1.0
    why = bench.family.raster or bench.family.line
    assert set(report.token_orders) == {f"raster: {why}" if why and order != "raster" else order}


def test_the_grid_of_the_laws_has_many_blocks_and_a_ragged_tail(bench, method, install):
    handle = install(bench.pipe, method(1.0), order="raster")
    bench.sample(steps=1)
    layouts = [layout for engine in handle._engines for layout in engine.layouts]
    assert layouts
    for layout in layouts:
        sizes = layout.sizes[layout.video_blocks].tolist()
        assert len(sizes) >= 8
        assert sizes[-1] < sizes[0]


def test_dense_steps_are_stock_diffusers_bit_for_bit(bench, method, install):
    dense = bench.sample()
    handle = install(bench.pipe, method(0.2), dense_above=0.0)
    assert torch.equal(bench.sample(), dense)
    assert handle.report().sparse_calls == 0
