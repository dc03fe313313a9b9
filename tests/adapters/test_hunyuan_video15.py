"""What the HunyuanVideo-1.5 adapter says about its tokens, and its processor, held against the model itself."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from hunyuan_models import WITH_MEMORY, remembering, run_branches
from joint_models import run, sparse
from parity_families import HUNYUAN15_TEXTS as TEXTS

from dit_accel import SparseProcessor
from dit_accel.adapters import find_adapter, hunyuan_video15
from dit_accel.errors import LayoutError, UsageError
from dit_accel.testing import peak_bytes, tiny_hunyuan_video15_inputs, tiny_hunyuan_video15_transformer


def close(out, true):
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)


def inputs_of(transformer, grid=(3, 5, 7), text="i2v", **more):
    return tiny_hunyuan_video15_inputs(transformer, grid, **TEXTS[text], **more)


@pytest.mark.parametrize("config", [{"patch_size": 2, "patch_size_t": 1}, {"use_meanflow": True}], ids=str)
def test_keeping_everything_is_stock_diffusers_with_other_configurations(config):
    transformer = tiny_hunyuan_video15_transformer(**config)
    inputs = inputs_of(transformer)
    if "use_meanflow" in config:
        inputs["timestep_r"] = torch.tensor([300.0])
    true = run(transformer, inputs)
    sparse(transformer, order="tiles")
    close(run(transformer, inputs), true)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("text", TEXTS)
def test_dense_calls_are_stock_diffusers_bit_for_bit(text, batch):
    transformer = tiny_hunyuan_video15_transformer()
    inputs = inputs_of(transformer, text=text, batch=batch)
    true = run(transformer, inputs)
    processor = sparse(transformer, dense_above=0.0)
    assert torch.equal(run(transformer, inputs), true)
    assert processor.report.sparse_calls == 0 and processor.report.dense_calls == 2


def test_no_mask_of_all_pairs_of_tokens_is_made():
    transformer = tiny_hunyuan_video15_transformer(num_layers=1)
    inputs = inputs_of(transformer, (9, 16, 15))
    pairs = (9 * 16 * 15 + 24) ** 2
    assert peak_bytes(lambda: run(transformer, inputs))[1] >= pairs, "the stock processor makes one"
    sparse(transformer, dense_above=0.0)
    assert peak_bytes(lambda: run(transformer, inputs))[1] < pairs / 4


@pytest.mark.parametrize(("text", "valid"), [("i2v", 16), ("t2v", 11)])
def test_padding_is_not_read(text, valid):
    """Other numbers in the padding change nothing, bit for bit; the plan covers the video and the valid text."""
    transformer = tiny_hunyuan_video15_transformer()
    inputs = inputs_of(transformer, text=text)
    engine = sparse(transformer, keep=0.3).engine
    seen = []
    engine.observer = lambda call, layout, q, k, v, plan: seen.append((call, q.shape[1], plan.to_token_mask()))
    first = run(transformer, inputs)

    def spoil(block, args):
        hidden, text, *rest = args
        text = text.clone()
        text[:, valid:] = 7.0
        return (hidden, text, *rest)

    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(spoil)
    assert torch.equal(run(transformer, inputs), first)
    call, tokens, mask = seen[0]
    end = 105 + valid
    assert call.segments == (("video", 0, 105), ("text", 105, end), ("pad", end, 129)) and tokens == end
    assert mask[..., 105:].all() and mask[..., 105:, :].all() and not mask.all()


def test_prompts_whose_lengths_add_up_alike_run_sparse():
    """More words and fewer glyphs: the valid text of both rows ends at the same token."""
    transformer = tiny_hunyuan_video15_transformer()
    inputs = tiny_hunyuan_video15_inputs(transformer, valid=(8, 10), valid_glyphs=(4, 2), batch=2)
    true = run(transformer, inputs)
    processor = sparse(transformer)
    close(run(transformer, inputs), true)
    assert processor.report.sparse_calls == 2


@pytest.mark.parametrize("method", WITH_MEMORY)
@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
def test_a_branch_is_the_same_with_and_without_the_other(method, named):
    """The branches' texts have different lengths, as a prompt and an empty one do."""
    transformer = tiny_hunyuan_video15_transformer()
    inputs = {name: inputs_of(transformer, text=text) for name, text in (("c", "t2v"), ("u", "one token"))}

    def outputs(order):
        return run_branches(transformer, remembering(method, 0.4), inputs, order, named=named)

    alone = outputs("c")
    assert torch.equal(outputs("cu"), alone) and torch.equal(outputs("uc"), alone)


def test_removing_and_copying():
    transformer = tiny_hunyuan_video15_transformer()
    inputs = inputs_of(transformer)
    stock, true = transformer.attn_processors, run(transformer, inputs)
    processor = sparse(transformer, keep=0.3)
    first = run(transformer, inputs)
    assert torch.equal(run(copy.deepcopy(transformer), inputs), first) and not torch.equal(first, true)
    processor.remove()
    assert all(transformer.attn_processors[name] is one for name, one in stock.items())
    assert torch.equal(run(transformer, inputs), true)


def test_its_blocks_compile_whole():
    transformer = tiny_hunyuan_video15_transformer()
    inputs = inputs_of(transformer)
    processor = sparse(transformer, keep=0.3)
    eager = run(transformer, inputs)
    transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(run(transformer, inputs), eager)
    assert processor.report.sparse_calls == 4 and processor.report.dense_calls == 0
    torch._dynamo.reset()


def test_a_processor_that_is_not_known_is_refused():
    transformer = tiny_hunyuan_video15_transformer()
    transformer.transformer_blocks[1].attn.set_processor(type("Mine", (HunyuanVideo15AttnProcessor2_0,), {})())
    with pytest.raises(UsageError, match=r"transformer_blocks\.1\.attn has a Mine"):
        SparseProcessor(transformer, keep=0.5)


def test_facts_and_attentions():
    transformer = tiny_hunyuan_video15_transformer()
    inputs = tiny_hunyuan_video15_inputs(transformer, valid=(8, 13), image=True, batch=2)
    facts = hunyuan_video15.read(transformer, inputs)
    assert facts.grid == (3, 5, 7) and facts.timestep == 500 and facts.text == 24
    assert facts.text_valid == (16, 21) and not facts.text_first
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is hunyuan_video15
    one_image = inputs["image_embeds"] * torch.tensor([1.0, 0.0]).view(2, 1, 1)
    assert hunyuan_video15.read(transformer, {**inputs, "image_embeds": one_image}).text_valid == (16, 21)
    assert hunyuan_video15.read(transformer, {**inputs, "image_embeds": 0 * one_image}).text_valid == (11, 16)
    with pytest.raises(LayoutError, match="at least one patch"):
        hunyuan_video15.read(transformer, {**inputs, "hidden_states": torch.zeros(1, 9, 3, 0, 8)})
    with pytest.raises(LayoutError, match="got no image_embeds"):
        hunyuan_video15.read(transformer, {**inputs, "image_embeds": None})
    paths = dict(hunyuan_video15.self_attentions(transformer))
    assert paths == {"transformer_blocks.0.attn": 0, "transformer_blocks.1.attn": 1}
    assert any("token_refiner" in path for path in transformer.attn_processors), "which stays stock"
