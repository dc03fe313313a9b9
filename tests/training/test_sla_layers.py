"""make_trainable: what is trained is what runs at inference, gradients reach everything, and it leaves no trace."""

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from torch.nn import functional as F

import dit_accel
from dit_accel import testing
from dit_accel.errors import FallbackError, UsageError
from dit_accel.sla.weights import load_sla_weights, save_sla_weights
from dit_accel.training.sla import SlaOptions, make_trainable

OPTIONS = {"keep": 0.3, "block": 16}
KINDS = [("complement", False, 0.0), ("complement", True, 0.3), ("all", False, 0.0), ("all", True, 0.0)]
FAMILIES = ("flux", "flux2", "hunyuan_video", "hunyuan_video15", "ltx", "qwen_image", "sd3", "wan", "z_image")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small operations."""


def make(family="wan", **options):
    """A tiny transformer, made trainable with random projections, and its inputs."""
    transformer = getattr(testing, f"tiny_{family}_transformer")().requires_grad_(True)
    trainable = make_trainable(transformer, SlaOptions(**{**OPTIONS, **options}))
    torch.manual_seed(1)
    for parameter in trainable.projections():
        nn.init.normal_(parameter, std=0.3)
    return trainable, getattr(testing, f"tiny_{family}_inputs")(transformer)


def output(model, inputs):
    out = model(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def gradients(model, inputs):
    model.zero_grad()
    output(model, inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- one function at inference and in training


@pytest.mark.parametrize(("variant", "mix", "negligible"), KINDS)
def test_inference_is_what_was_trained(tmp_path, variant, mix, negligible):
    trainable, inputs = make(variant=variant, mix=mix, negligible=negligible)
    with torch.no_grad():
        trainable.transformer.blocks[0].attn1.to_q.weight.mul_(1.5)  # as training would
    learnt = output(trainable, inputs)
    with torch.no_grad():
        torch.testing.assert_close(output(trainable, inputs), learnt, rtol=1e-4, atol=1e-5)
    save_sla_weights(tmp_path / "x.safetensors", trainable.weights())
    plain = testing.tiny_wan_transformer()
    with torch.no_grad(), dit_accel.accelerate(
        plain, None, method="sla", weights=str(tmp_path / "x.safetensors"), min_tokens=0
    ) as handle:
        torch.testing.assert_close(output(plain, inputs), learnt, rtol=1e-4, atol=1e-5)
        assert handle.report().keep_requested == 0.3
    assert handle.report().sparse_calls == 2
    report = trainable.report()
    assert (report.sparse_calls, report.dense_calls) == (4, 0)
    assert set(report.executors) == {
        f"cpu{how} + linear attention ({variant})" for how in ("", " (with gradients)")
    }


def test_before_training_it_is_plain_top_k():
    transformer = testing.tiny_wan_transformer()
    inputs = testing.tiny_wan_inputs(transformer)
    trainable = make_trainable(transformer, SlaOptions(**OPTIONS))
    with torch.no_grad():
        untrained = output(trainable, inputs)
    trainable.remove()
    options = {**OPTIONS, "order": "packed", "min_tokens": 0}
    with torch.no_grad(), dit_accel.accelerate(transformer, None, method="pooled", neighbours=None, **options):
        assert torch.equal(output(transformer, inputs), untrained)


class Naive(nn.Module):
    """SLA for one self-attention as sums over single tokens; `[B, S, H, D]` like diffusers' attention functions."""

    def __init__(self, layer, plan):
        super().__init__()
        self.layer, self.plan = layer, plan

    def forward(self, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        read = self.plan.to_token_mask()
        sparse = F.scaled_dot_product_attention(q, k, v, attn_mask=read)
        weights = q.softmax(-1) @ k.softmax(-1).mT * ~read
        linear = weights @ v / (weights.sum(-1, keepdim=True) + 1e-5)
        return (sparse + self.layer.proj_l(linear)).transpose(1, 2)


def test_gradients_are_those_of_sums_over_tokens(monkeypatch):
    """Through the whole transformer, for each of its parameters."""
    trainable, inputs = make()
    plans = []
    trainable._engine.observer = lambda call, layout, query, key, value, plan: plans.append((plan, layout))
    found = gradients(trainable, inputs)
    trainable._engine.observer = None

    layers = iter(range(2))
    attending = trainable._engine.attending

    def naive(query, key, value, call, now, laid, seat):
        plan, _ = plans[next(layers)]
        return Naive(trainable.layers.by_number[str(now.layer)], plan)(query, key, value)

    monkeypatch.setattr(attending, "attend_sparsely", naive)
    true = gradients(trainable, inputs)
    assert found.keys() == true.keys() == dict(trainable.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# -- gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_trained(family):
    trainable, inputs = make(family)
    learnt = output(trainable, inputs)
    with torch.no_grad():
        torch.testing.assert_close(output(trainable, inputs), learnt, rtol=1e-4, atol=1e-5)
        with trainable.dense():
            dense = output(trainable, inputs)
    assert float((learnt.detach() - dense).norm() / dense.norm()) > 1e-4
    found = gradients(trainable, inputs)
    for name, parameter in trainable.named_parameters():
        if name.startswith("layers.") or ".to_q.weight" in name:
            learns = name in found and float(found[name].abs().max()) > 0
            # the last block of a joint model drops its text, and a refiner's attention stays the host's
            assert learns or not parameter.requires_grad or "refiner" in name, name
    assert not trainable.report().fallbacks


@pytest.mark.parametrize(("variant", "mix", "negligible"), KINDS)
def test_projections_learn_while_the_transformer_is_frozen(variant, mix, negligible):
    trainable, inputs = make(variant=variant, mix=mix, negligible=negligible)
    trainable.transformer.requires_grad_(False)
    found = gradients(trainable, inputs)
    assert found.keys() == {f"layers.{name}" for name, _ in trainable.layers.named_parameters()}
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())
    assert len(found) == 2 * (3 if mix else 2)


def test_training_brings_it_nearer_to_the_teacher():
    trainable, inputs = make()
    for parameter in trainable.projections():
        nn.init.zeros_(parameter)
    trainable.transformer.requires_grad_(False)
    with torch.no_grad(), trainable.dense():
        teacher = output(trainable, inputs)
    optimizer = torch.optim.Adam(trainable.projections(), lr=0.003)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(output(trainable, inputs), teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "flux"])
def test_checkpointed_gradients_are_the_same(family, when):
    """Though a teacher's forward and one of another size come between a forward and its backward."""
    trainable, inputs = make(family)
    true = gradients(trainable, inputs)
    other, _ = make(family) if when == "after" else (None, None)
    if other is None:
        transformer = getattr(testing, f"tiny_{family}_transformer")().requires_grad_(True)
        transformer.enable_gradient_checkpointing()
        other = make_trainable(transformer, SlaOptions(**OPTIONS))
        other.layers.load_state_dict(trainable.layers.state_dict())
    else:
        other.transformer.enable_gradient_checkpointing()
    other.train()
    functions = [m._gradient_checkpointing_func for m in other.modules() if getattr(m, "gradient_checkpointing", 0)]
    loss = output(other, inputs).square().mean()
    again = [m._gradient_checkpointing_func for m in other.modules() if getattr(m, "gradient_checkpointing", 0)]
    assert all(a is b for a, b in zip(functions, again, strict=True)) and functions
    calls = other.report().sparse_calls
    with torch.no_grad(), other.dense():
        output(other, inputs)
    if family == "wan":
        output(other, testing.tiny_wan_inputs(other.transformer, (2, 4, 6)))
        calls *= 2
    counted = other.report()
    loss.backward()
    assert other.report() == counted, "what is computed again is counted once"
    found = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert found.keys() == true.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    assert counted.sparse_calls == calls and not counted.fallbacks


def test_checkpointing_by_others_is_refused():
    """A block computed again outside of our sight would attend as in another forward, or densely."""
    from torch.utils.checkpoint import checkpoint

    trainable, inputs = make()
    block = trainable.transformer.blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    loss = output(trainable, inputs).square().mean()
    with pytest.raises(FallbackError, match="checkpoint by its enable_gradient_checkpointing"):
        loss.backward()


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])  # the latter hands over queries and values of two types
def test_under_autocast_projections_stay_exact(family):
    trainable, inputs = make(family)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(trainable, inputs)
    true = gradients(trainable, inputs)
    for name in ("layers.by_number.0.proj_l.weight", "transformer.proj_out.weight"):
        assert found[name].dtype == torch.float32
        assert float((found[name] - true[name]).norm() / true[name].norm()) < 0.05
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # validation
        low = output(trainable, inputs)
    with torch.no_grad():
        assert float((low - output(trainable, inputs)).norm() / low.norm()) < 0.05


def test_a_transformer_in_bfloat16_keeps_exact_projections():
    trainable, inputs = make()
    trainable.transformer.to(torch.bfloat16)
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    found = gradients(trainable, inputs)
    assert found["layers.by_number.0.proj_l.weight"].dtype == torch.float32
    assert trainable.weights().tensors["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


# -- leaving no trace


def test_the_teacher_is_stock_diffusers():
    trainable, inputs = make()
    stock = testing.tiny_wan_transformer()
    with torch.no_grad():
        with trainable.dense():
            assert torch.equal(output(trainable, inputs), output(stock, inputs))
        assert not torch.equal(output(trainable, inputs), output(stock, inputs)), "the student again"
    report = trainable.report()
    assert report.dense_reasons == {"the teacher's forward": 2} and not report.fallbacks


def test_remove_is_exact():
    transformer = testing.tiny_wan_transformer().requires_grad_(True)
    inputs = testing.tiny_wan_inputs(transformer)

    def anatomy():
        found = {"state": list(transformer.state_dict())}
        for path, module in transformer.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
            processor = id(getattr(module, "processor", None))
            found[path] = tuple(tuple(h.values()) for h in hooks), set(vars(module)), processor
        return found

    before, true = anatomy(), gradients(transformer, inputs)
    trainable = make_trainable(transformer, SlaOptions(**OPTIONS))
    assert list(transformer.state_dict()) == before["state"], "the transformer has no parameter more"
    gradients(trainable, inputs)
    trainable.remove()
    trainable.remove()
    assert anatomy() == before
    assert transformer.blocks[0].attn1.processor._attention_backend is not AttentionBackendName("native")
    for name, gradient in gradients(transformer, inputs).items():
        assert torch.equal(gradient, true[name])


def test_a_copy_trains_by_itself():
    trainable, inputs = make()
    other = copy.deepcopy(trainable)
    assert not {id(p) for p in trainable.parameters()} & {id(p) for p in other.parameters()}
    true, found = gradients(trainable, inputs), gradients(other, inputs)
    assert all(torch.equal(found[name], gradient) for name, gradient in true.items())
    trainable.remove()
    with torch.no_grad():
        for parameter in other.projections():
            parameter.zero_()
    assert not torch.equal(gradients(other, inputs)["transformer.proj_out.weight"], true["transformer.proj_out.weight"])


# -- weights


def test_weights_come_back(tmp_path):
    first, inputs = make(mix=True, negligible=0.2, dense_layers=(0,))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
        true = output(first, inputs)
    save_sla_weights(tmp_path / "x.safetensors", first.weights())
    weights = load_sla_weights(tmp_path / "x.safetensors")
    assert sorted(weights.layers) == [1] and weights.spec.transformer == "WanTransformer3DModel"
    options = SlaOptions.of(weights.spec, mix=True, dense_layers=(0,))
    assert options == SlaOptions(0.3, negligible=0.2, mix=True, order="packed", block=16, dense_layers=(0,))
    second = make_trainable(testing.tiny_wan_transformer().requires_grad_(True), options)
    parameters = list(second.parameters())
    second.load(weights)
    assert all(a is b for a, b in zip(parameters, second.parameters(), strict=True)), "optimisers hold these"
    with torch.no_grad():
        assert torch.equal(output(second, inputs), true)


def test_a_frozen_transformer_is_not_in_the_file():
    trainable, _ = make()
    trainable.transformer.requires_grad_(False)
    trainable.transformer.blocks[1].attn1.to_q.requires_grad_(True)
    assert set(trainable.weights().tensors) == {f"blocks.1.attn1.to_q.{name}" for name in ("weight", "bias")}


def test_low_rank_adapters_go_along_as_such(tmp_path):
    from peft import LoraConfig

    trainable, inputs = make()
    transformer = trainable.transformer.requires_grad_(False)
    torch.manual_seed(3)
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    assert any("lora_A" in name for name in gradients(trainable, inputs))
    weights = trainable.weights()
    assert not weights.tensors and len(weights.lora) == 8
    assert weights.lora["blocks.0.attn1.to_q.weight"][0].shape == (24, 2)
    save_sla_weights(tmp_path / "x.safetensors", weights)
    plain = testing.tiny_wan_transformer()
    path = str(tmp_path / "x.safetensors")
    with torch.no_grad(), dit_accel.accelerate(plain, None, method="sla", weights=path, min_tokens=0):
        torch.testing.assert_close(output(plain, inputs), output(trainable, inputs), rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_fit_change_nothing():
    trainable, _ = make()
    before = copy.deepcopy(trainable.state_dict())
    cases = (
        ({"variant": "all"}, {}, "with variant 'all', and .* 'complement'"),
        ({"feature": "relu"}, {}, r"give SlaOptions\(feature='relu'\)"),
        ({"mix": True}, {}, "SlaOptions.mix=True"),
        ({"dense_layers": (1,)}, {}, "no layer 1"),
        ({}, {"num_layers": 3}, "for 3 layers .* has 2"),
        ({}, {"attention_head_dim": 24}, "heads of 24, .* heads of 12"),
        ({}, {"ffn_dim": 16}, r"'blocks.0.ffn.net.0.proj.weight' of shape \(16, 24\)"),
    )
    for options, config, words in cases:
        transformer = testing.tiny_wan_transformer(**config).requires_grad_(True)
        weights = make_trainable(transformer, SlaOptions(**{**OPTIONS, **options})).weights()
        with pytest.raises(UsageError, match=words):
            trainable.load(weights)
    assert all(torch.equal(x, before[name]) for name, x in trainable.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, "keep=0 is not possible"),
        ({"variant": "rest"}, "variant of SLA"),
        ({"negligible": 0.5, "variant": "all"}, "over all keys"),
        ({"order": "random"}, "token order"),
        ({"block": 4}, "8 to 128"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        SlaOptions(**options)


@pytest.mark.parametrize(("layers", "words"), [((0, 1), "names every layer"), ((7,), "layer 7")])
def test_wrong_layers_leave_the_transformer_alone(layers, words):
    transformer = testing.tiny_wan_transformer()
    with pytest.raises(UsageError, match=words):
        make_trainable(transformer, SlaOptions(dense_layers=layers))
    assert not transformer._forward_hooks and not hasattr(transformer.blocks[0].attn1, "_dit_accel")
