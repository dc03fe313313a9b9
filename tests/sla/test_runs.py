"""SLA with weights in whole runs: plans that serve longer, quantised attention, two experts, batches."""

import pytest
import torch

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.weights import LayerWeights, SlaWeights, save_sla_weights
from dit_accel.testing import tiny_wan_pipeline

PROMPT = {"prompt": "a red star moves left", "negative_prompt": "blurry", "guidance_scale": 4.0}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small operations."""


def sample(pipe, batch=1, steps=3):
    generator = [torch.Generator().manual_seed(n) for n in range(batch)]
    prompts = {name: [x] * batch if isinstance(x, str) else x for name, x in PROMPT.items()}
    size = {"height": 96, "width": 112, "num_frames": 9}
    more = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    return pipe(**prompts, **size, **more).frames


def write(path, transformer, seed=0, **spec):
    shape = attention_shape(transformer)
    generator = torch.Generator().manual_seed(seed)
    d = shape.head_size
    layers = {
        n: LayerWeights(*(torch.randn(*of, generator=generator) for of in ((d, d), (d,)))) for n in shape.layers
    }
    known = {"keep": 0.3, "negligible": 0.25, "block": 16, **spec}
    save_sla_weights(path, SlaWeights(SlaSpec(len(layers), d, "WanTransformer3DModel", **known), layers))
    return str(path)


@pytest.fixture
def pipe():
    return tiny_wan_pipeline()


def accelerate(pipe, path, **options):
    return dit_accel.accelerate(pipe, None, method="sla", weights=path, min_tokens=0, strict=True, **options)


def test_a_plan_that_serves_longer_keeps_what_it_skips(pipe, tmp_path):
    path = write(tmp_path / "x.safetensors", pipe.transformer)
    plans = []
    with accelerate(pipe, path, predict_every=3, share_plans=True) as handle:
        handle.observe(lambda call, *rest: plans.append((call.layer, rest[-1])))
        sample(pipe)
    report = handle.report()
    assert report.plans == {"predicted": 2, "carried over": 10}
    for layer in range(2):
        first, *others = [plan for at, plan in plans if at == layer]
        assert first.skipped.any()
        for plan in others:
            assert torch.equal(plan.skipped, first.skipped) and torch.equal(plan.to_mask(), first.to_mask())
    with accelerate(pipe, path) as handle:
        anew = sample(pipe)
    with accelerate(pipe, path, predict_every=1) as handle:
        assert torch.equal(sample(pipe), anew)


def test_quantised_attention_has_a_linear_part_too(pipe, tmp_path):
    path = write(tmp_path / "x.safetensors", pipe.transformer)
    with accelerate(pipe, path):
        full = sample(pipe, steps=1)
    with accelerate(pipe, path, precision="int8_fp8") as handle:
        quantised = sample(pipe, steps=1)
    assert handle.report().executors == {"reference (int8_fp8) + linear attention (complement)": 4}
    assert 0 < float((quantised - full).norm() / full.norm()) < 0.05


def test_rows_of_a_batch_are_as_alone(pipe, tmp_path):
    path = write(tmp_path / "x.safetensors", pipe.transformer)
    with accelerate(pipe, path):
        torch.testing.assert_close(sample(pipe, batch=2)[:1], sample(pipe), rtol=1e-4, atol=1e-4)


def test_budgets_may_change_by_rule(pipe, tmp_path):
    path = write(tmp_path / "x.safetensors", pipe.transformer)
    with accelerate(pipe, path, rules=[{"layers": [0], "keep": 0.6}]) as handle:
        sample(pipe, steps=1)
    kept = handle.report().keep_per_layer
    assert kept[0] > 0.55 and kept[1] < 0.4
    with pytest.raises(UsageError, match="A rule changes feature"):
        accelerate(pipe, path, rules=[{"layers": [0], "feature": "relu"}])


def test_each_expert_has_a_file_of_its_own(tmp_path):
    pipe = tiny_wan_pipeline(two_experts=True)
    for seed, role in enumerate(("transformer", "transformer_2")):
        write(tmp_path / f"{role}.safetensors", getattr(pipe, role), seed, role=role)
    with accelerate(pipe, str(tmp_path)) as handle:
        sample(pipe)
        held = [engine.weights.layers.by_number["0"].proj_l.weight for engine in handle._engines]
    assert not torch.equal(*held) and handle.report().sparse_calls == 12
    processors = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    with pytest.raises(UsageError, match="trained for a pipeline's transformer, and this is its transformer_2"):
        accelerate(pipe, str(tmp_path / "transformer.safetensors"))
    assert processors == [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    write(tmp_path / "transformer_2.safetensors", pipe.transformer_2, order="tiles")
    with pytest.raises(UsageError, match="order is 'packed' for transformer and 'tiles' for transformer_2"):
        accelerate(pipe, str(tmp_path))
