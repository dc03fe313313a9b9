"""What the HunyuanVideo adapter says about its tokens, held against the model itself. Odd grids, text with padding."""

import pytest
import torch
from joint_models import run, sparse

from dit_accel.adapters import find_adapter, hunyuan_video
from dit_accel.errors import LayoutError
from dit_accel.testing import tiny_hunyuan_video_inputs, tiny_hunyuan_video_transformer


def test_padding_is_not_read():
    """Other numbers in the padding change nothing, bit for bit; the plan covers the video and the valid text."""
    transformer = tiny_hunyuan_video_transformer()
    inputs = tiny_hunyuan_video_inputs(transformer, valid=11)
    engine = sparse(transformer, keep=0.3).engine
    seen = []
    engine.observer = lambda call, layout, q, k, v, plan: seen.append((call, q.shape[1], plan.to_token_mask()))
    first = run(transformer, inputs)
    text = inputs["encoder_hidden_states"].clone()
    text[:, 11:] = 7.0
    assert torch.equal(run(transformer, {**inputs, "encoder_hidden_states": text}), first)
    call, tokens, mask = seen[0]
    assert call.segments == (("video", 0, 105), ("text", 105, 116), ("pad", 116, 124)) and tokens == 116
    assert mask[..., 105:].all() and mask[..., 105:, :].all() and not mask.all()


def test_long_prompts_are_counted_exactly_in_bf16():
    transformer = tiny_hunyuan_video_transformer()
    inputs = tiny_hunyuan_video_inputs(transformer, text=400, valid=331)  # 331 is no bf16 number
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bfloat16()
    assert hunyuan_video.read(transformer, inputs).text_valid == (331,)


@pytest.mark.parametrize("order", ["tiles", "packed", "gilbert"])
def test_a_first_frame_by_tokens_must_stay_first(order):
    """Ordered as any other video the result is wrong, so the parity tests can tell."""
    transformer = tiny_hunyuan_video_transformer(image_condition_type="token_replace")
    inputs = tiny_hunyuan_video_inputs(transformer, valid=11)
    true = run(transformer, inputs)
    transformer.register_to_config(image_condition_type=None)  # which the adapter looks at, and no forward does
    sparse(transformer, order=order)
    assert float((run(transformer, inputs) - true).norm() / true.norm()) > 1e-3


def test_facts_and_attentions():
    transformer = tiny_hunyuan_video_transformer()
    inputs = tiny_hunyuan_video_inputs(transformer, valid=(11, 19), batch=2)
    facts = hunyuan_video.read(transformer, inputs)
    assert facts.grid == (3, 5, 7) and facts.timestep == 500 and facts.text == 19
    assert facts.text_valid == (11, 19) and not facts.text_first
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is hunyuan_video
    with pytest.raises(LayoutError, match="at least one patch"):
        hunyuan_video.read(transformer, {**inputs, "hidden_states": torch.zeros(1, 4, 3, 1, 8)})
    paths = dict(hunyuan_video.self_attentions(transformer))
    assert paths == {"transformer_blocks.0.attn": 0, "single_transformer_blocks.0.attn": 1}
    assert any("token_refiner" in path for path in transformer.attn_processors), "which stays stock"
