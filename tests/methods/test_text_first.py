"""Where a model has its text, before the video or behind it, changes nothing about what reads what."""

import pytest
import torch
from by_token import inputs

from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.methods.parts.tuning import fit_top_p

GRID = (3, 5, 7)
METHODS = {
    "pooled": {"keep": 0.3},
    "pooled, first frame": {"keep": 0.4, "top_p": 0.6, "first_frame": True, "neighbours": 0},
    "rectified": {"keep": 0.3, "top_p": 0.2, "neighbours": 1},
    "sparge": {"keep": 0.3, "similarity": -1.0, "sink": True},
    "sparge, l1": {"l1": 0.4, "similarity": -1.0},
    "svg1": {"keep": 0.3},
    "svg1, first frame": {"keep": 0.5, "first_frame": True},
    "svg2": {"keep": 0.3},
    "nabla": {"top_p": 0.4},
    "nabla, window": {"top_p": 0.2, "window": (1, 3, 3)},
    "radial": {},
    "neighborhood": {"window": [0.5] * 3},
    "clear": {"radius": 2},
}


def orders_of(name):
    """The orders that a method takes."""
    if name == "radial":
        return ["raster"]
    return ["tiles"] if "window" in name else ["raster", "tiles", "gilbert"]


def layouts(order, text):
    return [build_layout(GRID, order, 8, text=text, text_first=first) for first in (False, True)]


def to_the_front(x, text, dim=1):
    """Tokens with the text behind, as a model has them that puts it first."""
    return x.roll(text, dim)


@pytest.mark.parametrize("text", [5, 16, 19])
@pytest.mark.parametrize(("name", "order"), [(name, order) for name in METHODS for order in orders_of(name)])
def test_text_reads_and_is_read_alike_on_either_side(name, order, text):
    behind, ahead = layouts(order, text)
    method = load_method(name.split(",")[0], **METHODS[name])
    query, key = inputs(behind, batch=2)
    mask = method.predict(query, key, behind, None, None).to_token_mask()
    moved = (to_the_front(x, text) for x in (query, key))
    plan = method.predict(*moved, ahead, None, None)
    assert torch.equal(plan.to_token_mask(), to_the_front(to_the_front(mask, text, 2), text, 3))
    video = mask[..., : behind.n_video_tokens, : behind.n_video_tokens].float().mean()
    assert 0 < video < 1, "something is read and something left out"


@pytest.mark.parametrize("kind", ["gain", "all"])
def test_what_stands_in_for_unread_blocks_is_the_same(kind):
    behind, ahead = layouts("gilbert", 19)
    method = load_method("rectified", keep=0.3, neighbours=None, anchor=False, compensation=kind, mass="predicted")
    query, key = inputs(behind)
    plans = [
        method.predict(query, key, behind, None, None),
        method.predict(*(to_the_front(x, 19) for x in (query, key)), ahead, None, None),
    ]
    assert plans[0].coarse.isfinite().any()
    moved = plans[0].coarse.roll(behind.n_text_blocks, 2).roll(behind.n_text_blocks, 3)
    torch.testing.assert_close(plans[1].coarse, moved)
    torch.testing.assert_close(plans[1].rest, plans[0].rest.roll(behind.n_text_blocks, 2))


def test_places_of_text_and_video():
    for text in (0, 1, 16, 21):
        for layout in layouts("tiles", text):
            covered = torch.zeros(layout.n_tokens, dtype=torch.int64)
            covered[layout.video_tokens] += 1
            covered[layout.text_tokens] += 2
            starts = layout.starts[0, 0].tolist()
            for blocks, tokens, mark in (
                (layout.video_blocks, layout.video_tokens, 1),
                (layout.text_blocks, layout.text_tokens, 2),
            ):
                assert (covered[tokens] == mark).all()
                assert starts[blocks.start] == tokens.start and starts[blocks.stop] == tokens.stop
            assert (covered > 0).all() and layout.n_video_blocks + layout.n_text_blocks == layout.n_blocks
            assert bool(layout.first_frame[layout.video_blocks].any())
            assert not layout.first_frame[layout.text_blocks].any() and not layout.near[layout.text_blocks].any()


def test_heads_find_the_same_budget_on_either_side():
    behind, ahead = layouts("tiles", 19)
    query, key = inputs(behind)
    found = []
    for layout, qk in ((behind, (query, key)), (ahead, [to_the_front(x, 19) for x in (query, key)])):
        n = layout.n_blocks
        scores = torch.arange(n, dtype=torch.float32).roll(layout.n_text_blocks if layout.text_first else 0)
        scores = scores.expand(1, 2, n, n).contiguous()
        found.append(fit_top_p(*qk, scores, scores.softmax(-1), layout, 0.4))
    torch.testing.assert_close(*found)
