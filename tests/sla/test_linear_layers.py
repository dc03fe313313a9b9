"""Linear layers of a side file at inference: what they compute and cost, how calls are counted, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dit_accel
from dit_accel import testing
from dit_accel.errors import UsageError
from dit_accel.sla.linear import LinearLayer
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec, read_spec
from dit_accel.sla.weights import LayerWeights, SlaWeights, load_sla_weights, save_sla_weights

KNOWN = {"keep": 0.3, "block": 16}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small operations."""


def write(path, transformer, linear, mix=False, layers=None, seed=0, **spec):
    """A side file of random projections; those of linear layers near the identity."""
    shape = attention_shape(transformer)
    generator, size = torch.Generator().manual_seed(seed), shape.head_size

    def random(*shape):
        return torch.randn(*shape, generator=generator) / size

    made = {}
    for n in shape.layers if layers is None else layers:
        first = torch.eye(size) if n in linear else 0
        heads = random(shape.heads) if mix and n not in linear else None
        made[n] = LayerWeights(first + random(size, size), random(size), heads)
    told = SlaSpec(len(shape.layers), size, type(transformer).__name__, linear_layers=linear, **{**KNOWN, **spec})
    save_sla_weights(path, SlaWeights(told, made))
    return str(path)


def accelerate(target, path, **options):
    return dit_accel.accelerate(target, None, method="sla", weights=path, min_tokens=0, strict=True, **options)


@torch.no_grad()
def run(transformer, inputs):
    out = transformer(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def sample(pipe, batch=1, steps=3, **call):
    generator = [torch.Generator().manual_seed(n) for n in range(batch)]
    prompts = {"prompt": ["a red star"] * batch, "negative_prompt": ["blurry"] * batch, "guidance_scale": 4.0}
    size = {"height": 96, "width": 112, "num_frames": 9}
    more = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", **call}
    return pipe(**prompts, **size, **more).frames


# -- one call


@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
def test_it_is_the_sum_over_pairs(feature):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (50, 70, 70))
    layer = LinearLayer(8)
    phi = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: torch.where(x > 0, x + 1, x.exp()), "relu": torch.relu}
    weights = phi[feature](query) @ phi[feature](key).mT
    true = weights @ value / (weights.sum(-1, keepdim=True) + 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(query, key, value, feature), true)
        layer.proj_l.weight.normal_(), layer.proj_l.bias.normal_()
        projected = true @ layer.proj_l.weight.double().mT + layer.proj_l.bias.double()
        torch.testing.assert_close(layer(query, key, value, feature), projected)
    learning = layer(query, key, value, feature)
    assert learning.requires_grad
    torch.testing.assert_close(learning, projected)


# -- on a transformer


@pytest.mark.parametrize("mix", [False, True])
def test_calls_are_counted_by_what_they_are(tmp_path, mix):
    pipe = testing.tiny_wan_pipeline(transformer={"num_layers": 3})
    dense = sample(pipe)
    path = write(tmp_path / "x.safetensors", pipe.transformer, (1,), mix)
    handle = accelerate(pipe, path, dense_layers=[0])
    seen = []
    handle.observe(lambda call, *rest: seen.append(call.layer))
    out = sample(pipe)
    report = handle.report()
    handle.remove()
    assert (report.sparse_calls, report.linear_calls, report.dense_calls) == (6, {1: 6}, 6)
    assert report.plans == {"predicted": 6} and set(seen) == {2}, "a linear layer has no plan"
    assert report.keep_per_layer.keys() == {2} and report.keep_achieved == report.keep_per_layer[2]
    assert report.executors == {
        "cpu + linear attention (complement)": 6,
        "reference, linear attention alone": 6,
    }
    assert "6 of 18 self-attention calls sparse (33%)" in report.closing_line
    assert ", 6 linear, no fall-backs." in report.closing_line
    assert "linear attention alone in layer: 1 (6)" in str(report)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["self_attention_calls"] == {"sparse": 6, "linear": 6, "dense": 6}
    assert told["linear_calls_per_layer"] == {"1": 6}
    assert not torch.equal(out, dense) and torch.equal(sample(pipe), dense), "gone without a trace"


def test_all_layers_may_be_linear(tmp_path):
    pipe = testing.tiny_wan_pipeline()
    with accelerate(pipe, write(tmp_path / "x.safetensors", pipe.transformer, (0, 1))) as handle:
        first = sample(pipe)
        assert torch.equal(sample(pipe), first)
        report = handle.report()
    assert report.keep_achieved is None and not report.plans and report.linear_calls == {0: 12, 1: 12}
    assert "0 of 24 self-attention calls sparse (0%), 24 linear, no fall-backs." in report.closing_line


def test_linear_layers_beside_rules_steps_and_plans_that_last(tmp_path):
    pipe = testing.tiny_wan_pipeline()
    path = write(tmp_path / "x.safetensors", pipe.transformer, (0,))
    dense_there = [{"layers": [0], "above": 0.9, "dense": True}]
    with accelerate(pipe, path, rules=dense_there, predict_every=3, share_plans=True) as handle:
        sample(pipe)
        report = handle.report()
    assert report.dense_reasons.keys() == {"a rule"} and not report.fallbacks
    assert report.linear_calls[0] + report.dense_calls == report.sparse_calls == 6 and report.dense_calls > 0
    assert report.plans == {"predicted": 1, "carried over": 5}


def test_rows_of_a_batch_are_as_alone(tmp_path):
    pipe = testing.tiny_wan_pipeline()
    with accelerate(pipe, write(tmp_path / "x.safetensors", pipe.transformer, (1,))):
        torch.testing.assert_close(sample(pipe, batch=2)[:1], sample(pipe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["hunyuan_video", "qwen_image"])
def test_padding_is_not_read(tmp_path, family):
    """Each row is as it would be alone, without its padding; text stands behind the picture, or before it."""
    transformer = getattr(testing, f"tiny_{family}_transformer")()
    inputs_of = getattr(testing, f"tiny_{family}_inputs")
    inputs = inputs_of(transformer, text=19, valid=(3, 19), batch=2)
    path = write(tmp_path / "x.safetensors", transformer, (0, 1))
    with accelerate(transformer, path) as handle:
        both = run(transformer, inputs)
        alone = inputs | {name: x[:1] for name, x in inputs.items() if torch.is_tensor(x) and len(x) == 2}
        torch.testing.assert_close(both[:1], run(transformer, alone), rtol=1e-4, atol=1e-5)
        text = inputs["encoder_hidden_states"].clone()
        text[0, 3:] += 5
        torch.testing.assert_close(run(transformer, inputs | {"encoder_hidden_states": text})[:1], both[:1])
    assert handle.report().linear_calls == {0: 3, 1: 3}


@pytest.mark.parametrize("tokens", [(4, 8, 15), (2, 24, 27)], ids=str)
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_memory_is_what_the_report_declares(tmp_path, family, tokens):
    """As law 7 has it; with padding of two lengths where there is any."""
    axes = {"rope_axes_dim": (16, 24, 24)} if family == "hunyuan_video" else {}
    sizes = {"num_attention_heads": 4, "attention_head_dim": 64}
    transformer = getattr(testing, f"tiny_{family}_transformer")(**sizes, **axes)
    more = {"text": 100, "valid": (77, 100, 77)} if family == "hunyuan_video" else {}
    inputs = getattr(testing, f"tiny_{family}_inputs")(transformer, tokens, batch=3, **more)
    run(transformer, inputs)
    dense, _ = testing.peak_bytes(lambda: run(transformer, inputs))
    with accelerate(transformer, write(tmp_path / "x.safetensors", transformer, (0, 1))) as handle:
        run(transformer, inputs)
        peak, _ = testing.peak_bytes(lambda: run(transformer, inputs))
        report = handle.report()
    assert report.linear_calls == {0: 2, 1: 2}
    assert peak <= (dense + report.bytes_held + report.bytes_working) * 1.02
    qkv = inputs["hidden_states"][0].numel() / transformer.config.in_channels * 3 * 4 * 64 * 4
    assert report.bytes_working < 9 * qkv, "and nothing N x N"


@pytest.mark.parametrize("unit", ["token", "block"])
def test_region_sampling_gives_a_part_what_all_gave(tmp_path, unit):
    """Active queries read all keys, by linear attention too; nothing changes from one step to the next."""
    pipe = testing.tiny_wan_pipeline()
    transformer = pipe.transformer
    inputs = testing.tiny_wan_inputs(transformer, (3, 4, 6)) | {"timestep": torch.full((1,), 500.0)}
    path = write(tmp_path / "x.safetensors", transformer, (0, 1), block=8)
    region = {"sample_ratio": 0.5, "bucket": 8, "start": 1, "error_reset": (), "unit": unit}
    handle = accelerate(pipe, path, region=region)
    pipe.scheduler.set_timesteps(6)
    x, outs = inputs.pop("hidden_states"), []
    for step in range(2):
        with transformer.cache_context("cond"):
            outs.append(run(transformer, {**inputs, "hidden_states": x}))
        if step == 0:
            pipe.scheduler.step(outs[0], pipe.scheduler.timesteps[0], x, return_dict=False)
    report = handle.report()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    assert report.linear_calls == {0: 2, 1: 2} and not report.dense_calls and len(report.regions) == 2


def test_compiled_blocks_have_them_too(tmp_path):
    torch._dynamo.reset()
    transformer = testing.tiny_wan_transformer()
    inputs = testing.tiny_wan_inputs(transformer)
    path = write(tmp_path / "x.safetensors", transformer, (1,))
    with accelerate(transformer, path) as handle:
        eager = run(transformer, inputs)
        transformer.compile_repeated_blocks(backend="aot_eager")
        torch.testing.assert_close(run(transformer, inputs), eager, rtol=1e-4, atol=1e-5)
        assert handle.report().linear_calls == {1: 2} and handle.report().sparse_calls == 2


# -- the file


def test_the_file_says_which_layers_are_linear(tmp_path):
    transformer = testing.tiny_wan_transformer()
    path = write(tmp_path / "x.safetensors", transformer, (1,), mix=True)
    assert read_spec(path).linear_layers == (1,) == load_sla_weights(path).spec.linear_layers
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "2", "for programs that know of no linear layers"
    sparse = write(tmp_path / "y.safetensors", transformer, ())
    with safe_open(sparse, "pt") as file:
        assert file.metadata()["version"] == "1"


def test_files_from_before_there_were_linear_layers_load(tmp_path):
    transformer = testing.tiny_wan_transformer()
    inputs = testing.tiny_wan_inputs(transformer)
    path = write(tmp_path / "x.safetensors", transformer, ())
    with accelerate(transformer, path):
        out = run(transformer, inputs)
    with safe_open(path, "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "linear_layers"}
    save_file(load_file(path), tmp_path / "old.safetensors", metadata)
    assert read_spec(tmp_path / "old.safetensors").linear_layers == ()
    with accelerate(transformer, str(tmp_path / "old.safetensors")) as handle:
        assert torch.equal(run(transformer, inputs), out)
    assert not handle.report().linear_calls


def test_what_does_not_fit_is_refused_and_touches_nothing(tmp_path):
    transformer = testing.tiny_wan_transformer()
    path = write(tmp_path / "x.safetensors", transformer, (1,))
    processors = [id(m.processor) for m in transformer.modules() if hasattr(m, "processor")]
    with pytest.raises(UsageError, match="dense_layers names layer 1, which these SLA weights were trained to have l"):
        accelerate(transformer, path, dense_layers=[-1])
    assert processors == [id(m.processor) for m in transformer.modules() if hasattr(m, "processor")]
    weights = load_sla_weights(path)
    with pytest.raises(UsageError, match="linear_layers names layer 2, of a transformer of 2: give 0 to 1"):
        replace(weights.spec, linear_layers=(2,))
    with pytest.raises(UsageError, match="layer 0 is linear, and have no projection"):
        write(tmp_path / "y.safetensors", transformer, (0,), layers=[1])
    mixed = {layer: replace(of, mix=torch.zeros(2)) for layer, of in weights.layers.items()}
    with pytest.raises(UsageError, match="no mix in linear layers"):
        replace(weights, layers=mixed)


def test_two_experts_may_have_different_linear_layers(tmp_path):
    pipe = testing.tiny_wan_pipeline(two_experts=True)
    for role, linear in (("transformer", (0,)), ("transformer_2", (1,))):
        write(tmp_path / f"{role}.safetensors", getattr(pipe, role), linear, role=role)
    with accelerate(pipe, str(tmp_path)) as handle:
        sample(pipe)
    report = handle.report()
    assert report.linear_calls.keys() == {0, 1} and sum(report.linear_calls.values()) == report.sparse_calls == 6
