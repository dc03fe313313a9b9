"""The attention backend that the user chose: dense calls keep running on it, and it can be changed at any time."""

import pytest
from diffusers import attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _process_default():
    """`set_attention_backend` also changes the process's default, and resetting leaves that as it is."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def skip_without_backends(transformer):
    if not any(hasattr(p, "_attention_backend") for p in transformer.attn_processors.values()):
        pytest.skip("stock processors of this family know no backend")


def dense_kernels(processor, family, transformer):
    """What a forward's dense calls ran on."""
    before = processor.report.dense_kernels
    family.run(transformer)
    after = processor.report.dense_kernels
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


def choose(transformer):
    transformer.set_attention_backend("_native_math")


def test_sparse_calls_are_the_same_on_any_backend(family, when):
    family.compare(choose, when)


def test_dense_layers_run_on_the_chosen_backend(family, when):
    transformer = family.make()
    skip_without_backends(transformer)
    if when == "before":
        choose(transformer)
    processor = family.install(transformer, 0.3, dense_layers=(0,))
    if when == "after":
        choose(transformer)
    assert dense_kernels(processor, family, transformer) == {"diffusers (_native_math)": 1}
    assert processor.report.sparse_calls > 0
    transformer.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert dense_kernels(processor, family, transformer) == {"diffusers (native)": 1}
    choose(transformer)
    processor.remove()
    layers = [p for path, p in transformer.attn_processors.items() if hasattr(p, "_attention_backend")]
    assert layers and all(p._attention_backend == "_native_math" for p in layers)


def test_the_context_manager_reaches_dense_calls_and_leaves_sparse_ones(family):
    transformer = family.make()
    skip_without_backends(transformer)
    processor = family.install(transformer, 0.3, dense_layers=(0,))
    plain = family.run(transformer)
    with attention_backend("_native_math"):
        assert dense_kernels(processor, family, transformer) == {"diffusers (_native_math)": 1}
        assert float((family.run(transformer) - plain).abs().max()) < 1e-4
    assert dense_kernels(processor, family, transformer) == {"diffusers (native)": 1}
    assert processor.report.fallbacks == {}


def test_ours_cannot_be_chosen_by_name(family):
    """It needs what `accelerate` installs, so the host refuses the name and says which there are."""
    with pytest.raises(ValueError, match="must be one of the following"):
        family.make().set_attention_backend("dit_accel")


def test_diffusers_has_no_public_way_to_register_a_backend():
    """Where one appears, the name could be offered there (docs/integrations.md): look at it when this fails."""
    import diffusers
    from diffusers.models import attention_dispatch

    names = {name for module in (diffusers, attention_dispatch) for name in dir(module) if not name.startswith("_")}
    assert not [name for name in names if "regist" in name.lower() and "backend" in name.lower()]
    assert not hasattr(AttentionBackendName, "register")
    with pytest.raises(ValueError, match="'dit_accel' is not a valid"):
        AttentionBackendName("dit_accel")
