"""What attention sees of step, branch and layer, eager and compiled."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from dit_accel import SparseProcessor
from dit_accel.plan import BlockPlan
from dit_accel.testing import tiny_wan_inputs, tiny_wan_transformer

LAYERS, TIMESTEPS = 4, (950, 700, 500, 200)


@dataclass(frozen=True)
class Witness:
    """Keeps everything and writes down what it was told."""

    seen: list = field(default_factory=list)

    def predict(self, query, key, layout, call, state):
        self.seen.append((call.branch, call.step, call.layer, call.noise))
        return BlockPlan.full(layout.starts, layout.starts)


@functools.cache
def one_graph_works():
    """Whether diffusers' dispatcher can be traced at all once a backend is set; with torch 2.6 it cannot."""
    transformer = tiny_wan_transformer(num_layers=1)
    for attention in (transformer.blocks[0].attn1, transformer.blocks[0].attn2):
        attention.processor._attention_backend = AttentionBackendName.NATIVE
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    try:
        with torch.no_grad():
            transformer(**tiny_wan_inputs(transformer))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


needs_one_graph = pytest.mark.skipif(
    "not one_graph_works()", reason="stock diffusers cannot be one graph here"
)


def sample(compile_it, **options):
    """Outputs, the calls seen inside attention, and the true ones."""
    torch._dynamo.reset()
    transformer = tiny_wan_transformer(num_layers=LAYERS)
    inputs = {
        name: tiny_wan_inputs(transformer, (3, 5, 7), seed=seed)
        for seed, name in enumerate(("cond", "uncond"))
    }
    witness = Witness()
    transformer.set_attn_processor(SparseProcessor(transformer, witness, block=16, min_tokens=0, **options))
    compiled = compile_it(transformer)
    forward = transformer if compiled is None else compiled
    outputs, true = [], []
    for step, timestep in enumerate(TIMESTEPS):
        for branch in inputs:
            with torch.no_grad(), transformer.cache_context(branch, step_index=step):
                call = {**inputs[branch], "timestep": torch.tensor([timestep])}
                outputs.append(forward(**call, return_dict=False)[0])
            true += [(branch, step, layer, timestep / 1000) for layer in range(LAYERS)]
    return torch.stack(outputs), witness.seen, true


WAYS = {
    "eager": lambda t: None,
    "regional": lambda t: t.compile_repeated_blocks(fullgraph=one_graph_works(), backend="aot_eager"),
    "whole": lambda t: torch.compile(t, backend="aot_eager"),
    "whole, one graph": lambda t: torch.compile(t, backend="aot_eager", fullgraph=one_graph_works()),
    "in place": lambda t: t.compile(backend="aot_eager"),
}


@pytest.mark.parametrize("compile_it", WAYS.values(), ids=WAYS)
def test_attention_sees_the_true_call(compile_it):
    outputs, seen, true = sample(compile_it)
    assert seen == true
    torch.testing.assert_close(outputs, sample(WAYS["eager"])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile_it", WAYS.values(), ids=WAYS)
def test_dense_steps_and_layers_come_and_go(compile_it):
    outputs, seen, true = sample(compile_it, dense_above=0.9, dense_below=0.3, dense_layers=(1,))
    assert seen == [call for call in true if 0.3 <= call[3] <= 0.9 and call[2] != 1]
    torch.testing.assert_close(outputs, sample(WAYS["eager"])[0], rtol=1e-4, atol=1e-5)


@needs_one_graph
def test_all_layers_are_one_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    sample(lambda t: t.compile_repeated_blocks(fullgraph=True, backend=counter))
    assert counter.frame_count == 1


@needs_one_graph
def test_compiled_before_installing():
    """Blocks that ran compiled as stock ones are compiled anew, and reordering still holds."""
    torch._dynamo.reset()
    transformer = tiny_wan_transformer()
    inputs = tiny_wan_inputs(transformer, (3, 5, 7))
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        dense = transformer(**inputs, return_dict=False)[0]
        processor = SparseProcessor(transformer, keep=1.0, block=16, min_tokens=0)
        transformer.set_attn_processor(processor)
        sparse = transformer(**inputs, return_dict=False)[0]
        assert processor.report.sparse_calls == 2
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
        processor.remove()
        torch.testing.assert_close(transformer(**inputs, return_dict=False)[0], dense, rtol=1e-5, atol=1e-6)
