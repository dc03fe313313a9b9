"""What is FLUX's own about IP-Adapters: they replace the processors of dual blocks only, which take a backend."""

import copy

import pytest
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from ip_adapters import FLUX, OPTIONS, REPLACED, STEPS, accelerate, differs, first

from dit_accel import SparseProcessor
from dit_accel.errors import UsageError

close, run = FLUX.close, FLUX.run
CALLS = FLUX.layers * STEPS


@pytest.fixture
def stock():
    return FLUX.loaded()


def test_single_blocks_have_the_stock_processor_again(stock):
    with accelerate(stock):
        run(stock)
    assert type(stock.transformer.single_transformer_blocks[0].attn.processor) is FluxAttnProcessor


def test_the_backend_is_kept(stock):
    with accelerate(stock, 0.3) as handle:
        for backend in ("_native_math", "native"):
            stock.transformer.set_attention_backend(backend)
            run(stock)
        assert handle.report().sparse_calls == 2 * CALLS
        stock.transformer.set_attention_backend("_native_math")
    backends = {p._attention_backend.value for p in stock.transformer.attn_processors.values()}
    stock.transformer.set_attention_backend("native")
    assert backends == {"_native_math"}


def test_a_deep_copys_processor_removes_ours_from_the_copy(stock):
    with accelerate(stock, 0.3):
        run(stock)
        twin = copy.deepcopy(stock)
    twin.transformer.single_transformer_blocks[0].attn.processor.remove()
    assert type(first(twin)) is FluxIPAdapterAttnProcessor and "_attention_backend" not in vars(first(twin))


def test_through_the_processor_alone(stock):
    """The scale is refused as long as ours stands in its place, which is until the first forward."""
    true = run(stock)
    transformer = stock.transformer
    processor = SparseProcessor(transformer, keep=1.0, **OPTIONS)
    close(run(stock), true)
    assert processor.report.sparse_calls == 0, "constructed, but not set"
    transformer.set_attn_processor(processor)
    with pytest.raises(UsageError, match="IP-Adapter"):
        stock.set_ip_adapter_scale(0.5)
    close(run(stock), true)
    stock.set_ip_adapter_scale(0.5)
    assert differs(run(stock), true)
    assert processor.report.sparse_calls == 2 * CALLS and processor.report.dense_calls == 0
    processor.remove()
    first(stock).scale = [1.0]
    close(run(stock), true)


def test_opting_out_is_still_noticed(stock):
    handle = accelerate(stock, 0.3, strict=False)
    run(stock)
    stock.transformer.single_transformer_blocks[1].attn.set_processor(FluxAttnProcessor())
    run(stock)
    assert handle.report().fallbacks == {REPLACED: STEPS}
    handle.remove()
