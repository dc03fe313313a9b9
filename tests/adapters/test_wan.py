"""What the Wan adapter says about Wan's tokens, held against Wan itself."""

import pytest
import torch
from joint_models import assert_the_models_order, run

from dit_accel import SparseProcessor
from dit_accel.adapters import find_adapter, wan
from dit_accel.errors import LayoutError, UnknownModelError
from dit_accel.testing import tiny_wan_inputs, tiny_wan_transformer


def test_vace_control_of_another_size_keeps_the_models_order():
    transformer = tiny_wan_transformer(vace_layers=[0], vace_in_channels=4)
    inputs = tiny_wan_inputs(transformer, (3, 5, 7))
    inputs["control_hidden_states"] = inputs["control_hidden_states"][:, :, :2]
    assert_the_models_order(transformer, inputs, "VACE control of another size than the latents")


def test_a_subclass_keeps_the_models_order():
    transformer = tiny_wan_transformer()
    transformer.__class__ = type("MyWan", (type(transformer),), {})
    processor = SparseProcessor(transformer, keep=1.0, block=16, min_tokens=0)
    transformer.set_attn_processor(processor)
    run(transformer, tiny_wan_inputs(transformer))
    assert list(processor.report.token_orders) == ["raster: reordering is not proven for MyWan"]


def test_facts():
    transformer = tiny_wan_transformer()
    inputs = tiny_wan_inputs(transformer, (3, 5, 7))
    inputs["timestep"] = torch.tensor([[0] * 35 + [640] * 70])
    facts = wan.read(transformer, inputs)
    assert facts.grid == (3, 5, 7) and facts.timestep == 640
    assert facts.condition is inputs["encoder_hidden_states"]
    with pytest.raises(LayoutError, match="at least one patch"):
        wan.read(transformer, {**inputs, "hidden_states": torch.zeros(1, 16, 3, 1, 8)})


def test_self_attentions_are_those_without_text():
    transformer = tiny_wan_transformer(vace_layers=[0], vace_in_channels=4)
    paths = dict(wan.self_attentions(transformer))
    assert paths == {"blocks.0.attn1": 0, "blocks.1.attn1": 1, "vace_blocks.0.attn1": 2}
    assert all(not transformer.get_submodule(path).is_cross_attention for path in paths)


def test_an_unknown_family_is_named():
    with pytest.raises(UnknownModelError, match=r"Linear is of no family.*WanTransformer3DModel"):
        find_adapter(torch.nn.Linear(1, 1))
