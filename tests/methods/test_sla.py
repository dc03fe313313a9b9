"""Method sla: the choice of blocks, and both parts of the output against sums over single tokens."""

import logging
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.kernels.block_sparse import block_sparse, block_sparse_trainable
from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.options import SparseOptions
from dit_accel.planner import Planner
from dit_accel.report import Tally
from dit_accel.sla.layers import SlaLayers
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.weights import LayerWeights, SlaWeights, save_sla_weights
from dit_accel.trajectory import Call, Trajectory

HEADS, SIZE = 2, 8
PARTS = [("complement", 0.0), ("complement", 0.4), ("all", 0.0)]


def call_at(first_head=0):
    return Call(1, "cond", 0, 0.5, (3, 5, 7), (("video", 0, 105),), "transformer", 4, 2, first_head)


def qkv(layout, batch=2, heads=HEADS, dtype=torch.float32):
    return torch.randn(3, batch, layout.n_tokens, heads, SIZE, dtype=dtype).unbind()


def feature_map(x, feature):
    return {"softmax": lambda: x.softmax(-1), "elu": lambda: nn.functional.elu(x) + 1, "relu": x.relu}[feature]()


def blocks_of_tokens(layout):
    return torch.repeat_interleave(torch.arange(layout.n_blocks), layout.sizes.long())


def by_tokens(q, k, v, plan, layout, variant, feature, layer, first_head=0):
    """SLA as sums over single tokens. q, k, v: `[B, S, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    read = plan.to_token_mask().expand(len(q), q.shape[1], -1, -1)
    scores = (q @ k.mT * SIZE**-0.5).masked_fill(~read, -math.inf)
    sparse = scores.softmax(-1) @ v
    weights = feature_map(q, feature) @ feature_map(k, feature).mT
    if variant == "complement":
        left_out = read
        if plan.skipped is not None:
            block = blocks_of_tokens(layout)
            left_out = read | plan.skipped[:, :, block][..., block]
        weights = weights * ~left_out
    sums = weights.sum(-1, keepdim=True)
    linear = torch.where(sums > 0, weights @ v / (sums + 1e-5), 0.0)
    projected = linear @ layer.proj_l.weight.to(q.dtype).T + layer.proj_l.bias.to(q.dtype)
    if layer.mix is None:
        return sparse + projected
    share = layer.mix[first_head : first_head + q.shape[1]].to(q.dtype).sigmoid()[:, None, None]
    return share * sparse + (1 - share) * projected


def random_layers(mix, heads=HEADS):
    layers = SlaLayers([2], SIZE, heads if mix else None)
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    return layers


class Held:
    """Weights as `compensate` is given them."""

    def __init__(self, layers):
        self.layers = layers


# -- which blocks


@pytest.mark.parametrize("text", [0, 9])
def test_it_reads_the_blocks_whose_means_agree_best(text):
    layout = build_layout((3, 5, 7), "packed", 8, text=text)
    query, key, _ = qkv(layout)
    read = load_method("sla", keep=0.3).predict(query, key, layout, call_at(), None).to_mask()
    least = math.ceil(0.3 * layout.n_video_blocks)
    block = blocks_of_tokens(layout)
    for row in range(2):
        for head in range(HEADS):
            means = [
                torch.stack([x[row, block == n, head].mean(0) for n in range(layout.n_blocks)]) for x in (query, key)
            ]
            video = (means[0] @ means[1].T)[:, : layout.n_video_blocks]
            best = torch.zeros_like(video, dtype=torch.bool).scatter(1, video.topk(least).indices, True)
            best[layout.n_video_blocks :] = True  # text reads everything, and is read by all
            assert torch.equal(read[row, head, :, : layout.n_video_blocks], best)
    assert read[..., layout.n_video_blocks :].all()
    assert (read[:, :, : layout.n_video_blocks].sum(-1) == least + layout.n_text_blocks).all()


def test_a_mean_that_all_keys_share_makes_no_difference():
    """So that it need not be taken from them, as the published code does."""
    layout = build_layout((3, 5, 7), "packed", 8)
    query, key, _ = qkv(layout)
    moved = key + 2**10 * torch.randn(1, 1, HEADS, SIZE)
    method = load_method("sla", keep=0.3)
    plans = [method.predict(query, x, layout, call_at(), None) for x in (moved, moved - moved.mean(1, keepdim=True))]
    assert (plans[0].to_mask() != plans[1].to_mask()).float().mean() < 0.01


def test_the_least_share_is_one_block():
    layout = build_layout((3, 5, 7), "packed", 8)
    plan = load_method("sla", keep=1e-6).predict(*qkv(layout)[:2], layout, call_at(), None)
    assert (plan.counts == 1).all()


def test_negligible_blocks_are_the_lowest_of_those_not_read():
    layout = build_layout((3, 5, 7), "packed", 8)
    query, key, _ = qkv(layout)
    plan = load_method("sla", keep=0.3, negligible=0.25).predict(query, key, layout, call_at(), None)
    few = math.floor(0.25 * layout.n_blocks)
    read, skipped = plan.to_mask(), plan.skipped
    assert few > 1 and (skipped.sum(-1) == few).all() and not (read & skipped).any()
    block = blocks_of_tokens(layout)
    means = [torch.stack([x[:, block == n].mean(1) for n in range(layout.n_blocks)], 2) for x in (query, key)]
    scores = torch.einsum("bhqd,bhkd->bhqk", *means)
    least_read = scores.masked_fill(~read, math.inf).amin(-1)
    between = scores.masked_fill(read | skipped, math.inf).amin(-1)
    most_skipped = scores.masked_fill(~skipped, -math.inf).amax(-1)
    assert (most_skipped < between).all() and (most_skipped < least_read).all()


def test_negligible_takes_what_there_is():
    layout = build_layout((3, 5, 7), "packed", 8)
    plan = load_method("sla", keep=0.8, negligible=0.9).predict(*qkv(layout)[:2], layout, call_at(), None)
    assert torch.equal(plan.skipped, ~plan.to_mask())


# -- both parts


@pytest.mark.parametrize("mix", [False, True], ids=["sum", "mix"])
@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
@pytest.mark.parametrize(("variant", "negligible"), PARTS)
def test_the_output_is_the_sum_over_tokens(variant, negligible, feature, mix):
    layout = build_layout((3, 5, 7), "packed", 8, text=5)
    q, k, v = qkv(layout, dtype=torch.float64)
    method = load_method("sla", keep=0.3, variant=variant, feature=feature, negligible=negligible)
    plan = method.predict(q.float(), k.float(), layout, call_at(), None)
    layers = random_layers(mix)
    true = by_tokens(q, k, v, plan, layout, variant, feature, layers.by_number["2"])
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    for gradients in (False, True):  # at inference the projection is folded in, and the sparse part written over
        layers.requires_grad_(gradients)
        out, _ = block_sparse(*heads, plan, layout="bhsd", impl="reference")
        found = method.compensate(out, *heads, plan, call_at(), Held(layers))
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-7)
        assert found.requires_grad == gradients and (found is out) != gradients


def test_a_mix_is_that_of_the_heads_seen_here():
    layout = build_layout((3, 5, 7), "packed", 8)
    q, k, v = qkv(layout, heads=4)
    method = load_method("sla", keep=0.3)
    layers = random_layers(True, heads=4)
    plan = method.predict(q, k, layout, call_at(), None)
    whole = by_tokens(q, k, v, plan, layout, "complement", "softmax", layers.by_number["2"])
    some = [x[:, :, 2:] for x in (q, k, v)]
    plan = method.predict(*some[:2], layout, call_at(2), None)
    heads = [x.transpose(1, 2) for x in some]
    for gradients in (False, True):
        layers.requires_grad_(gradients)
        out, _ = block_sparse(*heads, plan, layout="bhsd")
        found = method.compensate(out, *heads, plan, call_at(2), Held(layers))
        torch.testing.assert_close(found, whole[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["complement", "all"])
def test_before_training_it_is_plain_top_k(variant):
    layout = build_layout((3, 5, 7), "packed", 8)
    q, k, v = qkv(layout)
    method = load_method("sla", keep=0.3, variant=variant)
    plan = method.predict(q, k, layout, call_at(), None)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    out, _ = block_sparse(*heads, plan, layout="bhsd")
    plain = out.clone()
    assert torch.equal(method.compensate(out, *heads, plan, call_at(), None), plain)
    assert torch.equal(method.compensate(out, *heads, plan, call_at(), Held(SlaLayers([2], SIZE))), plain)


@pytest.mark.parametrize("mix", [False, True], ids=["sum", "mix"])
@pytest.mark.parametrize(("variant", "negligible"), PARTS)
def test_gradients_of_every_input_and_parameter(variant, negligible, mix):
    layout = build_layout((2, 3, 3), "packed", 4)
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv(layout, batch=1, dtype=torch.float64))
    method = load_method("sla", keep=0.3, variant=variant, negligible=negligible)
    tokens = [x.transpose(1, 2).float() for x in (q, k)]
    plan = method.predict(*tokens, layout, call_at(), None)
    layers = random_layers(mix).double()
    names = [name for name, _ in layers.named_parameters()]

    def attend(q, k, v, *parameters):
        out, _ = block_sparse_trainable(q, k, v, plan)
        return torch.func.functional_call(
            Adding(layers), {f"layers.{n}": x for n, x in zip(names, parameters, strict=True)}, (out, q, k, v)
        )

    class Adding(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, out, q, k, v):
            return method.compensate(out, q, k, v, plan, call_at(), self)

    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, *layers.parameters())]
    assert gradcheck(attend, inputs, fast_mode=True)


# -- options


def spec(**others):
    return SlaSpec(4, SIZE, **{"keep": 0.2, "block": 64, "order": "raster", **others})


@pytest.fixture
def file(tmp_path):
    def write(**others):
        layers = {layer: LayerWeights(torch.randn(SIZE, SIZE), torch.randn(SIZE)) for layer in range(4)}
        save_sla_weights(tmp_path / "sla.safetensors", SlaWeights(spec(**others), layers))
        return str(tmp_path / "sla.safetensors")

    return write


def test_what_is_not_said_is_as_trained(file):
    path = file(variant="complement", feature="relu", negligible=0.1, order="tiles", tile=(1, 8, 8))
    method = load_method("sla", weights=path)
    said = method.keep, method.variant, method.feature, method.negligible
    assert said == (0.2, "complement", "relu", 0.1)
    assert method.arrangement == Arrangement("tiles", 64, (1, 8, 8))
    assert load_method("sla", weights=path, keep=0.5).keep == 0.5, "a budget is for the user to choose"


def test_without_weights_it_says_what_it_is(caplog):
    method = load_method("sla")
    assert (method.keep, method.variant, method.feature, method.negligible) == (0.1, "complement", "softmax", 0.0)
    with caplog.at_level(logging.INFO, logger="dit_accel"):
        assert method.weights_for(nn.Linear(1, 1), [], method.arrangement, "transformer") is None
    assert "plain top-k" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"variant": "rest"}, UnknownNameError, "Allowed: all, complement"),
        ({"feature": "gelu"}, UnknownNameError, "Allowed: elu, relu, softmax"),
        ({"negligible": 1.0}, UsageError, "a share from 0 to below 1"),
        ({"negligible": 0.1, "variant": "all"}, UsageError, "over all keys"),
        ({"neighbours": -1}, UsageError, "0 or more"),
    ],
)
def test_wrong_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        load_method("sla", **options)


def test_another_variant_than_trained_is_refused(file):
    path = file(variant="all")
    with pytest.raises(UsageError, match="variant='complement', and the weights of .* were trained with 'all'"):
        load_method("sla", weights=path, variant="complement")


def test_a_rule_cannot_change_what_holds_for_the_whole_transformer():
    options = SparseOptions.from_mapping({"method": "sla", "rules": [{"layers": [0], "variant": "all"}]})
    with pytest.raises(UsageError, match="A rule changes variant"):
        Planner(options, load_method("sla"), Trajectory(), Tally(), 4)
