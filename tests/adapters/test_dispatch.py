"""Our place in diffusers' dispatcher: found by member, never by name, and no way to reach ourselves."""

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

from dit_accel.adapters.dispatch import NAME, slot
from dit_accel.testing import tiny_wan_transformer


def test_the_member_is_unlisted():
    member = slot()
    assert slot() is member and member in _AttentionBackendRegistry._backends
    assert member not in list(AttentionBackendName)
    assert NAME not in AttentionBackendName._value2member_map_
    assert NAME.upper() not in AttentionBackendName.__members__
    with pytest.raises(ValueError, match=NAME):
        AttentionBackendName(NAME)
    with pytest.raises(ValueError, match="must be one of"):
        tiny_wan_transformer().set_attention_backend(NAME)


def test_reached_without_a_processor_it_runs_dense(caplog):
    query, key, value = torch.randn(3, 1, 6, 2, 4).unbind()
    true = dispatch_attention_fn(query, key, value, backend=AttentionBackendName.NATIVE)
    assert torch.equal(dispatch_attention_fn(query, key, value, backend=slot()), true)
    assert "without a SparseProcessor" in caplog.text
    with attention_backend(slot()):  # as the process's choice it must not come back to itself
        assert torch.equal(dispatch_attention_fn(query, key, value), true)
    assert _AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName.NATIVE
