"""SparseProcessor in diffusers' hands: what it keeps, survives, counts and refuses."""

import copy
import json

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_accel
from dit_accel import SparseOptions, SparseProcessor
from dit_accel.errors import FallbackError, KernelUnavailable, UnknownModelError, UnknownNameError, UsageError
from dit_accel.plan import BlockPlan
from dit_accel.testing import tiny_wan_inputs, tiny_wan_pipeline, tiny_wan_transformer

GRID = (3, 5, 7)
SPARSE = {"keep": 0.5, "block": 16, "min_tokens": 0}


@pytest.fixture
def transformer():
    return tiny_wan_transformer()


def run(transformer, grid=GRID, **changes):
    with torch.no_grad():
        return transformer(**{**tiny_wan_inputs(transformer, grid), **changes}, return_dict=False)[0]


def install(transformer, **options):
    processor = SparseProcessor(transformer, **{**SPARSE, **options})
    transformer.set_attn_processor(processor)
    return processor


def test_one_line_on_a_pipeline():
    pipe = tiny_wan_pipeline()
    pipe.transformer.set_attn_processor(SparseProcessor(pipe.transformer, **SPARSE))
    pipe("a red star", height=32, width=48, num_frames=9, num_inference_steps=2, output_type="latent")
    report = pipe.transformer.blocks[0].attn1.processor.report
    assert report.sparse_calls == 8 and report.cross_attention_calls == 8 and report.runs == 1
    assert "8 of 8 self-attention calls sparse (100%)" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["self_attention_calls"] == {"sparse": 8, "linear": 0, "dense": 0}


def test_sparse_differs_from_dense_and_keeps_what_it_says(transformer):
    dense = run(transformer)
    processor = install(transformer)
    sparse = run(transformer)
    assert 1e-4 < float((sparse - dense).norm() / dense.norm()) < 0.5
    report = processor.report
    assert 0.4 < report.keep_achieved < 0.6 and report.keep_requested == 0.5
    assert set(report.keep_per_layer) == {0, 1} and set(report.keep_per_step) == {0}
    assert report.bytes_held > 0


@pytest.mark.parametrize(
    ("options", "reason", "dense"),
    [
        ({"dense_above": 0.4}, "noise level above 0.4", 2),
        ({"dense_below": 0.6}, "noise level below 0.6", 2),
        ({"dense_layers": (-1,)}, "dense layer", 1),
        ({"min_tokens": 106}, "fewer than 106 tokens, where dense is faster", 2),
        ({"min_tokens": None}, "fewer than 2048 tokens, where dense is faster", 2),
    ],
)
def test_planned_dense_is_no_fallback(transformer, options, reason, dense):
    processor = install(transformer, strict=True, **options)
    run(transformer)
    assert processor.report.dense_reasons == {reason: dense} and not processor.report.fallbacks
    assert processor.report.sparse_calls == 2 - dense


def test_planned_dense_calls_may_take_the_fastest_kernel(transformer):
    true = run(transformer)
    host = install(transformer, dense_layers=(0, 1), order="raster")
    assert torch.equal(run(transformer), true)
    assert host.report.dense_kernels == {"diffusers (native)": 2} and "diffusers (native) (2)" in str(
        host.report
    )
    fastest = install(transformer, dense_layers=(0, 1), dense="fastest")
    torch.testing.assert_close(run(transformer), true)
    assert fastest.report.dense_kernels == {"sdpa": 2}


@pytest.mark.parametrize("what", ["a mask", "parallel"])
def test_what_the_fastest_kernel_does_not_take_stays_with_diffusers(transformer, what):
    processor = install(transformer, dense_layers=(0, 1), dense="fastest")
    if what == "a mask":
        transformer.blocks[0].attn1.register_forward_pre_hook(
            lambda module, args: (*args[:2], torch.ones(1, 1, 1, 105, dtype=torch.bool), *args[3:])
        )
        run(transformer)
        assert processor.report.dense_kernels == {"diffusers (native)": 1, "sdpa": 1}
    else:
        seat = processor.engine.seating.seats[0]
        seat.stock._parallel_config = object()
        seen = []
        seat.dense = lambda *args, **call: seen.append(args)
        call = {"attn_mask": None, "is_causal": False, "dropout_p": 0.0, "enable_gqa": False, "scale": None}
        q = torch.randn(1, 8, 2, 12)
        processor.engine.attending.attend_densely(seat, q, q, q, True, call)
        assert len(seen) == 1


def test_tuning_asks_once_for_each_kind_of_call(transformer, monkeypatch, caplog):
    """What is found is passed on; other executors have nothing to tune."""
    from dit_accel.kernels.block_sparse import tuning

    asked, found = [], tuning.Config(64, 32, 4, 1)
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: asked.append(k) or tuning.Tuning(found, ()))
    engine = install(transformer, tune=True).engine
    with caplog.at_level("INFO", "dit_accel"):
        run(transformer)
    assert not asked and caplog.text.count("tune=True has nothing to choose from: the cpu executor") == 1
    qkv = [torch.randn(1, 2, 32, 12) for _ in range(3)]
    plan = BlockPlan.full([0, 16, 32], [0, 16, 32])
    for _ in range(2):
        assert engine.attending.config_for("triton", qkv, plan, {"scale": 0.5}) is found
    assert asked == [{"scale": 0.5, "layout": "bhsd"}]
    assert engine.attending.config_for("hopper", qkv, plan, {"scale": 0.5}) is None


def test_gradients_run_dense_and_are_counted(transformer):
    true = run(transformer)
    processor = install(transformer)
    inputs = tiny_wan_inputs(transformer, GRID)
    inputs["hidden_states"].requires_grad_()
    out = transformer(**inputs, return_dict=False)[0]
    assert torch.equal(out.detach(), true)
    out.sum().backward()
    assert inputs["hidden_states"].grad.abs().sum() > 0
    assert list(processor.report.fallbacks.values()) == [2] and processor.report.dense_calls == 2
    strict = install(transformer, strict=True)
    with pytest.raises(FallbackError, match="gradients are needed"):
        transformer(**inputs)
    strict.remove()


def test_attention_outside_a_forward_runs_dense(transformer):
    processor = install(transformer)
    block = transformer.blocks[0]
    hidden = torch.randn(1, 8, 24)
    with torch.no_grad():
        assert block.attn1(hidden).shape == hidden.shape
    assert processor.report.fallbacks == {"attention outside a forward of its transformer": 1}


def test_masks_run_dense(transformer):
    processor = install(transformer)
    hook = transformer.blocks[0].attn1.register_forward_pre_hook(
        lambda module, args: (*args[:2], torch.ones(1, 1, 1, 105, dtype=torch.bool), *args[3:])
    )
    run(transformer)
    hook.remove()
    assert processor.report.fallbacks == {"an attention mask": 1} and processor.report.sparse_calls == 1


def test_processors_that_know_nothing_of_a_split_are_refused(transformer):
    """They would attend within one process's tokens. What works under context parallelism: tests/parallel."""
    processor = install(transformer)
    stock = [seat.stock for seat in processor.engine.seating.seats]
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    transformer._parallel_config = config  # as `enable_parallelism` leaves it before processors are set anew
    with pytest.raises(UsageError, match="is on .* 2 of its 2 self-attentions .*before `enable_parallelism`"):
        run(transformer)
    transformer.blocks[0].attn1.processor._parallel_config = config
    assert all(one._parallel_config is config for one in stock) and processor._parallel_config is config
    transformer.blocks[0].attn1.set_processor(WanAttnProcessor())
    with pytest.raises(UsageError, match="is on .* 1 of its 2 self-attentions"):
        run(transformer)
    transformer._parallel_config = None
    with pytest.raises(UsageError, match="is off .* 1 of its 2 self-attentions"):
        run(transformer)


def test_a_replaced_processor_is_noticed(transformer):
    processor = install(transformer)
    transformer.blocks[0].attn1.set_processor(WanAttnProcessor())
    run(transformer)
    assert processor.report.fallbacks == {"its processor was replaced after installation": 1}
    transformer.set_attn_processor(WanAttnProcessor())
    mine = transformer.blocks[0].attn1.processor
    dense = run(transformer)
    processor.remove()
    assert transformer.blocks[0].attn1.processor is mine
    assert torch.equal(run(transformer), dense)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_processor_replaced_before_the_first_forward_is_noticed(transformer, layers):
    dense = run(transformer)
    processor = install(transformer)
    for block in transformer.blocks[:layers]:
        block.attn1.set_processor(WanAttnProcessor())
    assert torch.equal(run(transformer), dense) == (layers == 2)
    report = processor.report
    assert report.fallbacks == {"its processor was replaced after installation": layers}
    assert (report.sparse_calls, report.dense_calls) == (2 - layers, layers)
    strict = install(transformer, strict=True)
    transformer.set_attn_processor(WanAttnProcessor())
    with pytest.raises(FallbackError, match="was replaced"):
        run(transformer)
    strict.remove()


def test_the_stock_processors_set_again_before_the_first_forward_are_noticed(transformer):
    """Known where it is sure that ours had been set; one that was only constructed counts nothing."""
    stock = dict(transformer.attn_processors)
    processor = SparseProcessor(transformer, **SPARSE, strict=True)
    run(transformer)
    assert processor.report.dense_calls == 0
    with dit_accel.accelerate(transformer, None, **SPARSE) as handle:
        transformer.set_attn_processor(dict(stock))
        run(transformer)
        assert handle.report().fallbacks == {"its processor was replaced after installation": 2}


def test_an_empty_processor_is_adopted(transformer):
    """`load_ip_adapter` makes processors by calling their class with nothing."""
    processor = install(transformer)
    empties = {path: type(p)() for path, p in transformer.attn_processors.items()}
    transformer.set_attn_processor(empties)
    transformer.blocks[0].attn1.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    run(transformer)
    adopted = transformer.blocks[0].attn1.processor
    assert adopted.report.sparse_calls == processor.report.sparse_calls == 2
    assert processor._attention_backend is AttentionBackendName._NATIVE_MATH
    with pytest.raises(UsageError, match="belongs to no transformer"):
        SparseProcessor().remove()


def test_a_processor_of_another_transformer_is_refused(transformer):
    other = tiny_wan_transformer()
    other.set_attn_processor(SparseProcessor(transformer, **SPARSE))
    with pytest.raises(UsageError, match="not made for"):
        run(other)
    with pytest.raises(UsageError, match="another transformer"):
        SparseProcessor(other, **SPARSE)


def test_constructing_twice_unwraps(transformer):
    stock = transformer.blocks[0].attn1.processor
    first = install(transformer)
    second = install(transformer, keep=1.0)
    assert transformer.blocks[0].attn1._dit_accel.stock is stock
    run(transformer)
    assert second.report.keep_achieved == 1.0 and first.report.sparse_calls == 0
    second.remove()
    assert transformer.blocks[0].attn1.processor is stock


def test_constructing_without_setting_changes_nothing(transformer):
    dense = run(transformer)
    processor = SparseProcessor(transformer, **SPARSE)
    assert torch.equal(run(transformer), dense)
    assert processor.report.sparse_calls == processor.report.dense_calls == 0


def test_a_deep_copy_is_its_own(transformer):
    processor = install(transformer)
    sparse = run(transformer)
    twin = copy.deepcopy(transformer)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.zero_()
    assert torch.equal(run(twin), sparse)
    copied = twin.blocks[0].attn1.processor
    assert copied is not processor and copied.report.sparse_calls == 2 and processor.report.sparse_calls == 2
    copied.remove()
    assert isinstance(twin.blocks[0].attn1.processor, WanAttnProcessor) and not twin._forward_pre_hooks
    run(transformer)
    assert processor.report.sparse_calls == 4
    assert copy.deepcopy(processor).engine is None


def test_a_deep_copied_pipeline_has_its_own_clock():
    pipe = tiny_wan_pipeline()
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    handle = dit_accel.accelerate(pipe, None, **SPARSE)
    twin = copy.deepcopy(pipe)
    first = pipe("a star", **call, generator=torch.Generator().manual_seed(0)).frames
    second = twin("a star", **call, generator=torch.Generator().manual_seed(0)).frames
    assert torch.equal(first, second)
    assert handle.report().sparse_calls == 8 == twin.transformer.blocks[0].attn1.processor.report.sparse_calls
    assert twin.transformer.blocks[0].attn1.processor.engine.trajectory._pipe() is twin


def test_fused_projections_survive(transformer):
    install(transformer)
    sparse = run(transformer)
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(run(transformer), sparse, rtol=1e-4, atol=1e-5)
    transformer.unfuse_qkv_projections()
    assert torch.equal(run(transformer), sparse)


def test_lora_survives(transformer):
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    transformer.requires_grad_(False)
    with_lora = run(transformer)
    processor = install(transformer, keep=1.0)
    torch.testing.assert_close(run(transformer), with_lora, rtol=1e-4, atol=1e-5)
    transformer.disable_adapters()
    assert not torch.allclose(run(transformer), with_lora, atol=1e-3)
    assert processor.report.sparse_calls == 4 and not processor.report.fallbacks


def test_save_and_load(transformer, tmp_path):
    install(transformer)
    sparse = run(transformer)
    transformer.save_pretrained(tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path)
    assert isinstance(loaded.blocks[0].attn1.processor, WanAttnProcessor)
    install(loaded)
    torch.testing.assert_close(run(loaded), sparse, rtol=1e-5, atol=1e-6)


def test_bf16(transformer):
    transformer.to(torch.bfloat16)
    inputs = tiny_wan_inputs(transformer, GRID)
    inputs = {k: x.to(torch.bfloat16) if x.is_floating_point() else x for k, x in inputs.items()}
    with torch.no_grad():
        dense = transformer(**inputs, return_dict=False)[0]
        processor = install(transformer, keep=1.0)
        sparse = transformer(**inputs, return_dict=False)[0]
    assert sparse.dtype == torch.bfloat16 and processor.report.sparse_calls == 2
    assert float((sparse - dense).float().norm() / dense.float().norm()) < 2e-2


def test_bad_options_change_nothing(transformer):
    before = dict(transformer.attn_processors)
    for error, match, options in (
        (UnknownNameError, "Did you mean 'pooled'", {"method": "poolde"}),
        (UnknownNameError, "Did you mean 'neighbours'", {"neighbor": 1}),
        (UnknownNameError, "Did you mean 'raster'", {"order": "rastar"}),
        (UnknownNameError, "Did you mean 'triton'", {"impl": "trition"}),
        (UnknownNameError, "Did you mean 'int8_fp8'", {"precision": "int8_fp"}),
        (UsageError, r"keep=1.5 is not possible: .*up to 1", {"keep": 1.5}),
        (UsageError, r"block=4096 is not possible", {"block": 4096}),
        (UsageError, r"nothing to choose from: it is for impl .triton.", {"tune": True, "impl": "hopper"}),
        (UsageError, r"nothing to choose from", {"tune": True, "precision": "int8"}),
        (UsageError, r"layer 7, but this transformer has 2", {"dense_layers": (7,)}),
        (UsageError, "needs a budget", {"keep": None}),
    ):
        with pytest.raises(error, match=match):
            SparseProcessor(transformer, **{**SPARSE, **options})
    assert dict(transformer.attn_processors) == before and not transformer._forward_pre_hooks
    with pytest.raises(UnknownModelError):
        SparseProcessor(torch.nn.Linear(1, 1), keep=0.5)
    with pytest.raises(UsageError, match="no transformer to accelerate"):
        dit_accel.accelerate(object(), None, keep=0.5)


def test_an_executor_asked_for_by_name_runs_or_raises(transformer):
    install(transformer, impl="reference")
    reference = run(transformer)
    torch.testing.assert_close(reference, run_with(transformer, impl="cpu"), rtol=1e-4, atol=1e-5)
    install(transformer, impl="triton")
    with pytest.raises(KernelUnavailable, match="triton"):
        run(transformer)


def test_precision_reaches_the_kernel(transformer):
    full = run_with(transformer, impl="reference")
    processor = install(transformer, precision="int8_fp8")
    quantised = run(transformer)
    assert not torch.equal(full, quantised)
    assert (quantised - full).norm() < 0.05 * full.norm()
    assert processor.report.executors.keys() == {"reference (int8_fp8)"}
    install(transformer, impl="cpu", precision="int8_fp8")
    with pytest.raises(KernelUnavailable, match="precision 'int8_fp8' runs on"):
        run(transformer)


def run_with(transformer, **options):
    install(transformer, **options)
    return run(transformer)


def test_options_are_flat_and_come_back():
    options = SparseOptions.from_mapping({"keep": 0.25, "dense_layers": [0, -1], "neighbours": 1})
    assert options.dense_layers == (0, -1) and options.method_options == {"neighbours": 1}
    assert SparseOptions.from_mapping(options.to_mapping()) == options
    json.dumps(options.to_mapping())
    other = options.merged({"method": "random", "keep": 0.5})
    assert other.method == "random" and other.keep == 0.5 and not other.method_options
    with pytest.raises(UnknownNameError, match="'keeep'.*Did you mean 'keep'"):
        SparseOptions.from_mapping({"keeep": 0.25})


def test_a_handle_clears_its_report():
    pipe = tiny_wan_pipeline()
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 1, "output_type": "latent"}
    with dit_accel.accelerate(pipe, SparseOptions(keep=0.5), block=16, min_tokens=0) as handle:
        pipe("a star", **call)
        assert handle.report(clear=True).sparse_calls == 4
        assert handle.report().sparse_calls == 0
    with dit_accel.accelerate(pipe, None) as handle:
        pipe("a star", **call)
        assert handle.report().closing_line == "No self-attention has run yet."
