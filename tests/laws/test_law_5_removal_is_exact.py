"""Law 5: remove() leaves everything as it was, by identity."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName


def anatomy(pipe):
    """Everything that installing touches."""
    patched = [name for name, value in vars(pipe.scheduler).items() if callable(value)]
    found = {"scheduler": pipe.scheduler, "scheduler methods": patched}
    for role in ("transformer", "transformer_2"):
        transformer = getattr(pipe, role, None)
        if transformer is None:
            continue
        found[role, "attributes"] = set(vars(transformer))
        for path, module in transformer.named_modules():
            found[role, path, "hooks"] = (
                tuple(module._forward_hooks.values()),
                tuple(module._forward_pre_hooks.values()),
                tuple(getattr(getattr(module, "_diffusers_hook", None), "hooks", {})),
            )
            assert "forward" not in vars(module)
            assert module.forward.__func__ is type(module).forward
            if hasattr(module, "get_processor"):
                found[role, path, "attributes"] = set(vars(module))
                found[role, path, "processor"] = id(module.processor)
                found[role, path, "backend"] = getattr(module.processor, "_attention_backend", None)
                found[role, path, "parallel"] = getattr(module.processor, "_parallel_config", None)
    return found


def test_remove_restores_by_identity(bench, method, install):
    for transformer in bench.transformers():
        if hasattr(transformer, "_reset_stateful_cache"):
            transformer._reset_stateful_cache()  # a pipeline's end makes this registry anyway
    before, dense = anatomy(bench.pipe), bench.sample(steps=1)
    handle = install(bench.pipe, method(0.4))
    bench.sample(steps=1)
    handle.remove()
    assert anatomy(bench.pipe) == before
    assert torch.equal(bench.sample(steps=1), dense)
    handle.remove()
    assert anatomy(bench.pipe) == before


def test_a_registry_we_made_goes_with_us(bench, method, install):
    assert not any(hasattr(t, "_diffusers_hook") for t in bench.transformers())
    install(bench.pipe, method(0.4)).remove()
    assert not any(hasattr(t, "_diffusers_hook") for t in bench.transformers())


def test_leaving_a_with_block_removes(bench, method, install):
    before = anatomy(bench.pipe)
    with install(bench.pipe, method(0.4)) as handle:
        bench.sample(steps=1)
    assert handle.report().sparse_calls > 0
    for transformer in bench.transformers():
        vars(transformer).pop("_diffusers_hook", None)  # made by the pipeline at its end
    assert anatomy(bench.pipe) == before


def test_installing_twice_removes_to_the_stock_processors(bench, method, install):
    before = anatomy(bench.pipe)
    first = install(bench.pipe, method(0.4))
    second = install(bench.pipe, method(0.9))
    first.remove()  # has nothing left to undo
    bench.sample(steps=1)
    assert second.report().sparse_calls > 0 and first.report().sparse_calls == 0
    second.remove()
    for transformer in bench.transformers():
        vars(transformer).pop("_diffusers_hook", None)  # made by the pipeline at its end
    assert anatomy(bench.pipe) == before


@pytest.mark.where("backend")
def test_a_backend_chosen_meanwhile_stays(bench, method, install):
    transformer = bench.transformers()[0]
    found = [m for m in transformer.modules() if hasattr(m, "get_processor")]
    attentions = [m for m in found if hasattr(m.processor, "_attention_backend")]  # not a text refiner's
    assert set(bench.attentions()) <= set(attentions)
    for attention in attentions:
        attention.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    handle = install(bench.pipe, method(0.4))
    assert bench.attentions()[0].processor._attention_backend is AttentionBackendName._NATIVE_MATH
    try:
        transformer.set_attention_backend("native")
        bench.sample(steps=1)
        handle.remove()
        assert {a.processor._attention_backend for a in attentions} == {AttentionBackendName.NATIVE}
    finally:
        transformer.reset_attention_backend()
