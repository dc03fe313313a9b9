"""Offloading, with the CPU as both devices: weights come and go around every block or leaf, and nothing changes."""

import pytest
import torch
from diffusers.hooks import apply_group_offloading

CPU = torch.device("cpu")
WAYS = {"block_level": {"num_blocks_per_group": 1}, "leaf_level": {}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("through", ["method", "function"])
def test_group_offload(family, way, through, when):
    def offload(transformer):
        arguments = {"onload_device": CPU, "offload_device": CPU, "offload_type": way, **WAYS[way]}
        if through == "method":
            transformer.enable_group_offload(**arguments)
        else:
            apply_group_offloading(transformer, **arguments)
        assert any("group_offloading" in m._diffusers_hook.hooks for m in transformer.modules() if hooked(m))

    family.compare(offload, when)


@pytest.mark.parametrize("way", WAYS)
def test_group_offload_to_disk(family, way, tmp_path, when):
    """Weights are garbage outside their module's forward, so that nothing of ours may read them."""

    def offload(transformer):
        folder = tmp_path / str(id(transformer))
        folder.mkdir()
        transformer.enable_group_offload(CPU, CPU, way, offload_to_disk_path=str(folder), **WAYS[way])

    family.compare(offload, when)


def hooked(module):
    return hasattr(module, "_diffusers_hook")


@pytest.mark.parametrize("way", ["whole model", "each leaf", "dispatched"])
def test_accelerates_offload(family, way, when):
    """What `enable_model_cpu_offload`, `enable_sequential_cpu_offload` and `device_map` do beneath."""
    from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model

    def offload(transformer):
        if way == "whole model":
            cpu_offload_with_hook(transformer, CPU)
        elif way == "each leaf":
            cpu_offload(transformer, CPU)
        else:
            dispatch_model(transformer, {"": "cpu"}, main_device="cpu", force_hooks=True)
        assert any(hasattr(module, "_hf_hook") for module in transformer.modules())

    family.compare(offload, when)


def test_pipelines_refuse_to_offload_a_machine_without_an_accelerator(pipeline):
    """If this fails, the test above may go through the pipelines' own methods."""
    pipe = pipeline.make()
    with pipeline.accelerate(pipe):
        for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
            with pytest.raises(RuntimeError, match="requires accelerator"):
                offload()


def test_a_pipelines_group_offload(pipeline):
    """Text encoders and autoencoder too, through the pipeline's own method, before and after installing."""

    def offload(pipe):
        pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")

    pipeline.compare(offload)


def test_a_pipelines_model_offload_across_runs(pipeline):
    """`maybe_free_model_hooks` takes the hooks of accelerate away and puts them on again behind every run."""
    pipe, stock = pipeline.make(), pipeline.make()
    true = pipeline.run(stock)
    with pipeline.accelerate(pipe) as handle:
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            torch.testing.assert_close(pipeline.run(pipe), true, rtol=1e-4, atol=1e-4)
        assert handle.report().runs == 2 and handle.report().dense_calls == 0
    torch.testing.assert_close(pipeline.run(pipe), true, rtol=1e-5, atol=1e-6)
