"""Prompts of different lengths in one batch: rows are sparse together, and each comes out as it would alone."""

import pytest
import torch
from hunyuan_models import LAW_METHODS, WITH_MEMORY, remembering
from joint_models import FULL, ORDERS, run

import dit_accel
from dit_accel import testing
from dit_accel.methods import load_method
from dit_accel.rows import group_rows
from dit_accel.trajectory import Facts

# a transformer, inputs for it, and how many text tokens are always valid beside the words
MODELS = {
    "hunyuan-video": (testing.tiny_hunyuan_video_transformer, testing.tiny_hunyuan_video_inputs, 0),
    "hunyuan-video15": (testing.tiny_hunyuan_video15_transformer, testing.tiny_hunyuan_video15_inputs, 3),
    "framepack": (testing.tiny_framepack_transformer, testing.tiny_framepack_inputs, 9),
    "qwen-image": (testing.tiny_qwen_image_transformer, testing.tiny_qwen_image_inputs, 0),  # text stands first
}
# of words that are no padding: nothing in common, two alike that are not neighbours, three alike unevenly apart
LENGTHS = [(3, 19), (11, 2, 11), (17, 17, 5, 17)]
LAYERS = 2


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def accelerate(transformer, method, **options):
    options = {"block": 16, "min_tokens": 0, "strict": True, **options}
    return dit_accel.accelerate(transformer, None, method=method, **options)


def row_of(inputs, row, batch):
    """The arguments of one batch row alone."""
    alone = {name: x[row : row + 1] for name, x in inputs.items() if len(x) == batch and "indices" not in name}
    return inputs | alone


def relative(x, true):
    return float((x - true).norm() / true.norm())


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_keeping_everything_is_stock_diffusers_in_every_order(model, order, lengths):
    make, inputs_of, _ = model
    transformer = make()
    inputs = inputs_of(transformer, text=19, valid=lengths, batch=len(lengths))
    true = run(transformer, inputs)
    with accelerate(transformer, load_method("pooled", keep=1.0), order=order) as handle:
        torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
        report = handle.report()
    assert (report.sparse_calls, report.dense_calls, report.keep_achieved) == (LAYERS, 0, 1.0)
    assert sum(report.executors.values()) == LAYERS and sum(report.token_orders.values()) == 1


@pytest.mark.parametrize("method", FULL)
def test_keeping_everything_is_stock_diffusers_with_every_method(method):
    transformer = testing.tiny_hunyuan_video_transformer()
    inputs = testing.tiny_hunyuan_video_inputs(transformer, (3, 5, 6), valid=(13, 4), batch=2)
    true = run(transformer, inputs)
    with accelerate(transformer, load_method(method, **FULL[method])) as handle:
        torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
        assert handle.report().dense_calls == 0


def steps_of(model, method, choose, **options):
    """Outputs of three steps of two branches, of which the second's lengths are others.

    choose: takes the inputs of the whole batch.
    """
    make, inputs_of, _ = model
    transformer = make()
    valid = {"cond": (17, 3, 17), "uncond": (2, 2, 9)}
    inputs = {name: inputs_of(transformer, valid=n, batch=3, seed=i) for i, (name, n) in enumerate(valid.items())}
    outputs = []
    with accelerate(transformer, method, **options) as handle:
        for step, noise in enumerate((1.8, 1.2, 0.6)):  # of the half that these inputs are at
            for name in valid:
                call = choose(inputs[name])
                call = call | {"timestep": call["timestep"] * noise}
                call["hidden_states"] = call["hidden_states"] * (1 + step)
                outputs.append(run(transformer, call))
        report = handle.report()
    assert report.sparse_calls == 2 * 3 * LAYERS and report.dense_calls == 0 and not report.stateless
    return torch.stack(outputs)  # [calls, rows, ...]


def assert_rows_are_as_alone(model, method, **options):
    together = steps_of(model, method, lambda inputs: inputs, **options)
    for row in range(3):
        alone = steps_of(model, method, lambda inputs, row=row: row_of(inputs, row, 3), **options)
        assert relative(together[:, row], alone[:, 0]) < 1e-5


@pytest.mark.parametrize("method", WITH_MEMORY)
def test_a_row_is_as_it_would_be_alone(model, method):
    """Also what it remembers."""
    assert_rows_are_as_alone(model, remembering(method, 0.4))


@pytest.mark.parametrize("method", [*sorted(set(LAW_METHODS) - set(WITH_MEMORY)), "random"])
def test_a_row_is_as_it_would_be_alone_with_every_other_method(method):
    made = load_method("random", keep=0.4) if method == "random" else remembering(method, 0.4)
    order = {"order": "raster"} if method == "radial" else {}
    assert_rows_are_as_alone(MODELS["hunyuan-video"], made, **order)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("share", [False, True])
def test_a_row_is_as_it_would_be_alone_with_plans_carried_over(every, share):
    """Branches that share plans group their rows in ways of their own."""
    options = {"predict_every": every, "predict_drift": 1.0, "share_plans": share}
    assert_rows_are_as_alone(MODELS["hunyuan-video"], load_method("pooled", keep=0.4), **options)


def test_each_group_is_told_what_it_is(model):
    make, inputs_of, always = model
    transformer = make()
    inputs = inputs_of(transformer, text=19, valid=(11, 2, 11), batch=3)
    seen = []
    with accelerate(transformer, load_method("pooled", keep=0.3)) as handle:
        handle.observe(lambda call, layout, q, k, v, plan: seen.append((call, q.shape, plan.to_token_mask())))
        run(transformer, inputs)
        achieved = handle.report().keep_achieved
    assert [call.rows for call, *_ in seen] == [(0, 2), (1,)] * LAYERS
    unseen = 8 if make is testing.tiny_hunyuan_video15_transformer else 0  # glyphs' padding and the missing image
    for (call, shape, mask), words in zip(seen, (11, 2) * LAYERS, strict=True):
        kinds = {name: (first, last) for name, first, last in call.segments}
        first, last = kinds["text"]
        assert last - first == always + words and kinds["pad"] == (last, last + 19 - words + unseen)
        assert shape[0] == len(call.rows) and shape[1] == kinds["video"][1] - kinds["video"][0] + last - first
        assert mask[..., first:last].all() and mask[..., first:last, :].all() and not mask.all()
    # over all pairs of tokens of both layers
    read = sum(int(mask.sum()) for *_, mask in seen)
    assert achieved == pytest.approx(read / sum(mask.numel() for *_, mask in seen))


def test_padding_is_not_read(model):
    make, inputs_of, _ = model
    transformer = make()
    inputs = inputs_of(transformer, valid=(11, 2), batch=2)
    text = inputs["encoder_hidden_states"].clone()
    text[0, 11:], text[1, 2:] = 7.0, -3.0
    with accelerate(transformer, load_method("pooled", keep=0.3)):
        first = run(transformer, inputs)
        assert torch.equal(run(transformer, inputs | {"encoder_hidden_states": text}), first)


def test_no_memory_is_kept_for_more_layouts_than_a_batch_needs():
    transformer = testing.tiny_hunyuan_video_transformer()
    with accelerate(transformer, load_method("pooled", keep=0.3)) as handle:
        built = []
        for start in range(4):
            valid = tuple(range(1 + start, 16 + start, 3))
            run(transformer, testing.tiny_hunyuan_video_inputs(transformer, valid=valid, batch=len(valid)))
            built.append(len(handle._engines[0].layouts))
    assert max(built) <= 8 * 5


def test_padding_of_one_length_alone():
    """Where text stands first padding is cut out of the middle, also if all rows have the same."""
    transformer = testing.tiny_qwen_image_transformer()
    for batch in (1, 2):
        inputs = testing.tiny_qwen_image_inputs(transformer, valid=7, batch=batch)
        true = run(transformer, inputs)
        with accelerate(transformer, load_method("pooled", keep=1.0), order="tiles") as handle:
            torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
            report = handle.report()
        tokens = 7 + 9 * 11
        assert report.sparse_calls == LAYERS and report.bytes_working == 3 * batch * tokens * 2 * 16 * 4


@pytest.mark.parametrize("name", ["hunyuan-video", "qwen-image"])
def test_memory_is_what_the_report_declares(name):
    """As law 7 has it, where rows are copied and again brought into orders of the heads' own."""
    make, inputs_of, _ = MODELS[name]
    axes = {"axes_dims_rope": (16, 24, 24)} if name == "qwen-image" else {"rope_axes_dim": (16, 24, 24)}
    transformer = make(num_attention_heads=4, attention_head_dim=64, **axes)
    grid = (16, 30) if name == "qwen-image" else (4, 8, 15)
    inputs = inputs_of(transformer, grid, text=100, valid=(77, 77, 100, 77), batch=4)
    run(transformer, inputs)
    dense, _ = testing.peak_bytes(lambda: run(transformer, inputs))
    with accelerate(transformer, load_method("svg2", keep=0.25), block=64) as handle:
        run(transformer, inputs)
        peak, _ = testing.peak_bytes(lambda: run(transformer, inputs))
        report = handle.report()
    assert peak <= (dense + report.bytes_held + report.bytes_working) * 1.02


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_grouping(apart, text_first):
    text = {"text": 9, "text_valid": (4, 9, 4, 1, 4), "text_first": text_first}
    facts = Facts(timestep=1.0, grid=(1, 2, 3), shape=(), condition=None, **text)
    found = group_rows(facts, len(facts.text_valid), apart)
    rows = [(0,), (1,), (2,), (3,), (4,)] if apart else [(0, 2, 4), (1,), (3,)]
    assert [group.rows for group in found] == rows
    x = 1 + torch.arange(5 * 15).view(5, 15, 1, 1)
    back = torch.zeros_like(x)
    for group in found:
        taken = group.take(x)
        assert taken.shape == (len(group.rows), 6 + group.text, 1, 1)
        assert group.copies == (text_first and group.text < 9)
        assert group.copies or taken.data_ptr() == x[group.rows[0]].data_ptr(), "a view"
        group.put(taken, back)
    for row, valid in enumerate(facts.text_valid):
        there = torch.ones(15, dtype=torch.bool)
        pad = slice(valid, 9) if text_first else slice(6 + valid, None)
        there[pad] = False
        assert torch.equal(back[row, there], x[row, there]) and not back[row, ~there].any()
