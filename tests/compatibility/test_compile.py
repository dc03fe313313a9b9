"""torch.compile of the families of joint attention. Wan's tests stand in tests/test_compile.py."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from dit_accel.errors import FallbackError


def stock_fits_one_graph(family):
    """Whether diffusers' own blocks can be one graph once a backend is set; with torch 2.6 they cannot."""
    transformer = family.make()
    for processor in transformer.attn_processors.values():
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName.NATIVE
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    try:
        family.run(transformer)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.of("flux", "hunyuan-video")  # these tests are slow, so that each family has few
def test_regional(family):
    """One graph for each kind of block, installed before compiling and after."""
    torch._dynamo.reset()
    if not stock_fits_one_graph(family):
        pytest.skip("stock diffusers cannot be one graph here")
    torch._dynamo.reset()
    true, few = family.run(family.make()), family.make()
    family.install(few, 0.3)
    transformer = family.make()
    family.install(transformer, 0.3)
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(family.run(transformer), family.run(few), rtol=1e-4, atol=1e-4)
    late = family.make()
    late.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(family.run(late), true, rtol=1e-4, atol=1e-4)
    processor = family.install(late)
    torch.testing.assert_close(family.run(late), true, rtol=1e-4, atol=1e-4)
    assert processor.report.sparse_calls > 0 and processor.report.dense_calls == 0
    processor.remove()
    torch.testing.assert_close(family.run(late), true, rtol=1e-4, atol=1e-4)


@pytest.mark.of("flux")  # a family of two kinds of block
def test_whole(family):
    """The whole transformer compiled with graph breaks: steps and dense layers come and go as in eager mode."""
    torch._dynamo.reset()
    eager, compiled = family.make(), family.make()
    options = {"dense_above": 0.6, "dense_layers": (1,)}
    processors = [family.install(transformer, 0.3, **options) for transformer in (eager, compiled)]
    compiled.compile(backend="aot_eager")
    for noise in (0.9, 0.5, 0.2):
        step = {"timestep": torch.tensor([noise])}
        torch.testing.assert_close(family.run(compiled, **step), family.run(eager, **step), rtol=1e-4, atol=1e-4)
    ours, true = (processor.report for processor in reversed(processors))
    assert ours.to_dict() == true.to_dict() and ours.sparse_calls > 0
    assert ours.dense_reasons.keys() == {"noise level above 0.6", "dense layer"}


@pytest.mark.of("flux")
def test_gradients_in_a_compiled_transformer_are_still_refused(family):
    transformer = family.make().requires_grad_(True)
    family.install(transformer, 0.3)
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with pytest.raises(FallbackError, match="gradients are needed"):
        transformer(**family.inputs(transformer))
