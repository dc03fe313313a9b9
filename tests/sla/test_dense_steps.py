"""Dense steps beside trained weights: what training changed of the transformer is not theirs."""

import pytest
import torch

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.sla import changed
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.weights import LayerWeights, SlaWeights, save_sla_weights
from dit_accel.testing import tiny_wan_pipeline

ROW, PAIR = "blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_k.weight"


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small operations."""


@pytest.fixture
def pipe():
    return tiny_wan_pipeline()


@pytest.fixture
def weights(pipe, tmp_path):
    """Random ones, which change a parameter as a whole and another by a LoRA."""
    shape = attention_shape(pipe.transformer)
    d, row = shape.head_size, pipe.transformer.get_parameter(ROW)
    generator = torch.Generator().manual_seed(0)
    new, up, down = (torch.randn(*of, generator=generator) for of in (row.shape, (len(row), 2), (2, len(row))))
    layers = {n: LayerWeights(torch.randn(d, d, generator=generator), torch.zeros(d)) for n in shape.layers}
    spec = SlaSpec(len(layers), d, "WanTransformer3DModel", keep=0.3, block=16)
    path = tmp_path / "sla.safetensors"
    save_sla_weights(path, SlaWeights(spec, layers, tensors={ROW: new}, lora={PAIR: (up, down)}))
    return str(path)


def accelerate(pipe, weights, **options):
    return dit_accel.accelerate(pipe, None, method="sla", weights=weights, min_tokens=0, strict=True, **options)


def velocities(pipe, steps=4):
    """What the transformer gave at each forward, branch by branch."""
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    try:
        pipe(
            prompt="a red star moves left",
            guidance_scale=4.0,
            height=96,
            width=112,
            num_frames=9,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        )
    finally:
        handle.remove()
    return seen


def same(ones, others):
    return [torch.equal(a, b) for a, b in zip(ones, others, strict=True)]


def test_dense_steps_are_the_plain_model_s_and_sparse_ones_are_trained(pipe, weights):
    plain = velocities(pipe)
    with accelerate(pipe, weights, dense_first=0.5) as handle:
        once, again = velocities(pipe), velocities(pipe)
    assert same(once, plain) == [True] * 4 + [False] * 4
    assert all(same(once, again)), "swapped to and fro, they are the same numbers"
    report = handle.report()
    assert report.sparse_calls == report.dense_calls > 0
    with accelerate(pipe, weights):
        trained = velocities(pipe, steps=1)[0]
    assert not torch.equal(trained, velocities(pipe, steps=1)[0])
    assert all(same(velocities(pipe), plain))


def test_sparse_steps_run_what_was_trained(pipe, weights):
    """A sparse step behind a dense one gives what it gives without: the same latents, forced through both."""
    inputs = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: inputs.append(k), with_kwargs=True)
    with accelerate(pipe, weights, dense_first=0.5):
        mixed = velocities(pipe)
    hook.remove()
    with accelerate(pipe, weights), torch.no_grad():
        for given, velocity in zip(inputs[4:], mixed[4:], strict=True):
            assert torch.equal(pipe.transformer(**given)[0], velocity)


@pytest.mark.parametrize("steps", [1, 4])
def test_they_come_out_whatever_ran_last(pipe, weights, steps):
    before = {name: x.clone() for name, x in pipe.transformer.named_parameters()}
    handle = accelerate(pipe, weights, dense_first=0.5)
    velocities(pipe, steps)
    handle.remove()
    assert all(torch.equal(x, before[name]) for name, x in pipe.transformer.named_parameters())


def test_a_swap_that_breaks_off_is_made_good(pipe, weights, monkeypatch):
    real = changed._learnt

    def interrupted(own, value):
        if isinstance(value, tuple):
            raise KeyboardInterrupt
        return real(own, value)

    with accelerate(pipe, weights, dense_first=0.5):
        expected = velocities(pipe)
        with monkeypatch.context() as patch:
            patch.setattr(changed, "_learnt", interrupted)
            with pytest.raises(KeyboardInterrupt):
                velocities(pipe)
        assert all(same(velocities(pipe), expected))
    plain = velocities(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(changed, "_learnt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            accelerate(pipe, weights)
    assert all(same(velocities(pipe), plain))


def test_what_others_did_to_the_weights_meanwhile_is_not_undone(pipe, weights):
    with accelerate(pipe, weights, dense_first=0.5):
        pipe.transformer.get_parameter(PAIR).data += 1e-3  # as merging a LoRA does
        with pytest.raises(UsageError, match=f"'{PAIR}', were changed after installation.*remove"):
            velocities(pipe)
    with accelerate(pipe, weights, dense_first=0.5):
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(UsageError, match="were fused or replaced after installation"):
            velocities(pipe)
        pipe.transformer.unfuse_qkv_projections()


def test_sequential_offloading_afterwards_is_refused(pipe, weights):
    from accelerate import cpu_offload

    with accelerate(pipe, weights, dense_first=0.5):
        cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
        with pytest.raises(UsageError, match="were fused or replaced after installation.*offload by model"):
            velocities(pipe)


def test_they_may_be_cast_meanwhile(pipe, weights):
    with accelerate(pipe, weights, dense_first=0.5):
        pipe.transformer.to(torch.bfloat16)
        once, again = velocities(pipe), velocities(pipe)
    assert all(same(once, again)) and all(x.isfinite().all() for x in once)
    assert same(velocities(pipe), once)[:4] == [True] * 4


@pytest.mark.parametrize("first", [False, True], ids=["installed before", "installed behind"])
def test_group_offloading_runs_the_same(pipe, weights, first):
    with accelerate(pipe, weights, dense_first=0.5):
        expected = velocities(pipe)

    def offload():
        pipe.transformer.enable_group_offload(
            torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )

    if first:
        offload()
    with accelerate(pipe, weights, dense_first=0.5):
        if not first:
            offload()
        assert all(same(velocities(pipe), expected))
