"""The side file of SLA: what is saved comes back, published layouts are read, and what does not fit is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dit_accel
from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.sla.changed import ChangedTensors
from dit_accel.sla.spec import SlaSpec, read_spec
from dit_accel.sla.weights import LayerWeights, SlaWeights, load_sla_weights, save_sla_weights
from dit_accel.testing import tiny_flux_transformer, tiny_wan_inputs, tiny_wan_transformer

SPEC = SlaSpec(2, 12, "WanTransformer3DModel", None, "complement", "softmax", 0.3, 0.1, "tiles", 16, (1, 4, 4))
ROW = "blocks.0.attn1.to_q.weight"  # [24, 24]


def some_weights(spec=SPEC, layers=(0, 1), mix=False, **others):
    size = spec.head_size
    made = {
        layer: LayerWeights(torch.randn(size, size), torch.randn(size), torch.randn(2) if mix else None)
        for layer in layers
    }
    return SlaWeights(spec, made, **others)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sla.safetensors"


@torch.no_grad()
def run(transformer):
    return transformer(**tiny_wan_inputs(transformer), return_dict=False)[0]


# -- reading and writing


@pytest.mark.parametrize("mix", [False, True])
def test_what_is_saved_comes_back(path, mix):
    whole = {ROW: torch.randn(24, 24, dtype=torch.bfloat16)}
    pair = {"blocks.1.attn1.to_k.weight": (torch.randn(24, 2), torch.randn(2, 24))}
    weights = some_weights(mix=mix, tensors=whole, lora=pair)
    save_sla_weights(path, weights)
    found = load_sla_weights(path)
    assert found.spec == SPEC == read_spec(path)
    for layer, of in weights.layers.items():
        for name in ("weight", "bias", "mix"):
            mine, theirs = getattr(of, name), getattr(found.layers[layer], name)
            assert mine is theirs is None or torch.equal(mine, theirs)
    assert torch.equal(found.tensors[ROW], whole[ROW]) and found.tensors[ROW].dtype == torch.bfloat16
    for mine, theirs in zip(pair.popitem()[1], found.lora.popitem()[1], strict=True):
        assert torch.equal(mine, theirs)
    assert [x.name for x in path.parent.iterdir()] == [path.name], "no partial file stays behind"


def test_a_file_that_cannot_be_written_leaves_the_old_one(path):
    save_sla_weights(path, some_weights())
    before = path.read_bytes()
    broken = some_weights(tensors={ROW: torch.empty(2, device="meta")})
    with pytest.raises(NotImplementedError):
        save_sla_weights(path, broken)
    assert path.read_bytes() == before and [x.name for x in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "key", ["net.blocks.{}.self_attn.attn_op.local_attn.proj_l.", "blocks.{}.attn1.proj_l.", "{}.proj_l."]
)
def test_published_layouts_are_read(path, key):
    made = {key.format(i) + "weight": torch.randn(12, 12) for i in (0, 1, 10)}
    made |= {key.format(i) + "bias": torch.randn(12) for i in (0, 1, 10)}
    save_file({**made, "net.blocks.0.self_attn.q.weight": torch.randn(24, 24)}, path)
    found = load_sla_weights(path)
    assert found.spec == SlaSpec(11, 12, None, None, "all", "softmax", 0.1, 0.0, "raster", 64)
    assert sorted(found.layers) == [0, 1, 10] and not found.tensors
    assert torch.equal(found.layers[10].weight, made[key.format(10) + "weight"])


def write(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata)


def spoil(path, change=lambda tensors: None, **metadata):
    """A side file with some tensors or some of its metadata changed."""
    save_sla_weights(path, some_weights(tensors={ROW: torch.randn(24, 24)}))
    tensors = load_file(path)
    change(tensors)
    write(path, tensors, SPEC.to_metadata() | metadata)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, EnvironmentProblem, "cannot read .*No such file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), EnvironmentProblem, "not a safetensors file"),
        (lambda path: path.write_bytes(b""), EnvironmentProblem, "not a safetensors file"),
        (lambda path: path.mkdir(), EnvironmentProblem, "cannot read"),
        (lambda path: write(path, {"weight": torch.zeros(2)}), UsageError, "holds no weights of SLA"),
        (lambda path: write(path, {"blocks.3.x.proj_l.weight": torch.zeros(4, 4)}), UsageError, "no proj_l.bias"),
        (lambda path: spoil(path, version="9"), UsageError, "version '9'"),
        (lambda path: spoil(path, variant='"rest"'), UsageError, "variant of SLA 'rest'. Allowed: all, complement"),
        (lambda path: spoil(path, keep="much"), UsageError, "metadata is not what format"),
        (lambda path: spoil(path, n_layers="1"), UsageError, "name layer 1, of a transformer of 1"),
        (lambda path: spoil(path, head_size="16"), UsageError, r"proj_l.weight must be \(16, 16\)"),
        (lambda path: spoil(path, lambda x: x.pop("layers.0.proj_l.bias")), UsageError, "layer 0 has no proj_l.bias"),
        (lambda path: spoil(path, lambda x: x.update(others=torch.zeros(1))), UsageError, "'others' is no tensor of"),
        (
            lambda path: spoil(path, lambda x: x.update({"lora.to_q.up": torch.zeros(4, 2)})),
            UsageError,
            "lora.to_q needs .up and .down, and has up alone",
        ),
    ],
)
def test_files_that_are_none_are_refused(path, make, error, words):
    make(path)
    with pytest.raises(error, match=words):
        load_sla_weights(path)


def test_a_file_cut_short_is_refused(path):
    save_sla_weights(path, some_weights())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EnvironmentProblem, match="damaged"):
        load_sla_weights(path)


def test_the_metadata_can_be_read_by_others(path):
    from safetensors import safe_open

    save_sla_weights(path, some_weights())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "dit_accel sla" and json.loads(metadata["block"]) == 16


# -- on a transformer


def accelerate(transformer, path, **options):
    return dit_accel.accelerate(transformer, None, method="sla", weights=str(path), min_tokens=0, **options)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_it_acts_and_goes_away(path, changed, mix):
    transformer = tiny_wan_transformer()
    names = dict(transformer.named_parameters())
    before = {name: (x, x.data_ptr(), x.clone()) for name, x in names.items()}
    dense = run(transformer)
    up, down = torch.randn(24, 2), torch.randn(2, 24)
    more = {"tensors": {ROW: torch.randn(24, 24)}, "lora": {"blocks.1.attn1.to_k.weight": (up, down)}}
    weights = some_weights(mix=mix, **(more if changed else {}))
    save_sla_weights(path, weights)
    handle = accelerate(transformer, path)
    out = run(transformer)
    assert transformer.get_parameter(ROW) is names[ROW]
    assert torch.equal(names[ROW], more["tensors"][ROW] if changed else before[ROW][2])
    key = before["blocks.1.attn1.to_k.weight"][2]
    torch.testing.assert_close(names["blocks.1.attn1.to_k.weight"].data, key + up @ down if changed else key)
    report = handle.report()
    assert report.executors == {"cpu + linear attention (complement)": 2} and report.bytes_held > 0
    assert handle._engines[0].layouts.arrangement.tile == (1, 4, 4), "as trained"
    handle.remove()
    for name, (parameter, at, value) in before.items():
        assert transformer.get_parameter(name) is parameter and parameter.data_ptr() == at
        assert torch.equal(parameter, value)
    assert torch.equal(run(transformer), dense) and not torch.equal(out, dense)
    handle.remove()


def test_the_linear_part_is_what_differs_from_plain_top_k(path):
    transformer = tiny_wan_transformer()
    save_sla_weights(path, some_weights())
    with accelerate(transformer, path):
        trained = run(transformer)
    arrangement = {"order": "tiles", "tile": (1, 4, 4), "block": 16}
    with dit_accel.accelerate(transformer, None, method="sla", keep=0.3, min_tokens=0, **arrangement):
        plain = run(transformer)
    with dit_accel.accelerate(
        transformer, None, method="pooled", neighbours=None, keep=0.3, min_tokens=0, **arrangement
    ):
        assert torch.equal(run(transformer), plain)
    assert float((trained - plain).norm() / plain.norm()) > 1e-2


def test_another_handle_takes_over(path):
    transformer = tiny_wan_transformer()
    dense = run(transformer)
    save_sla_weights(path, some_weights(tensors={ROW: torch.randn(24, 24)}))
    first, out = accelerate(transformer, path), run(transformer)
    second = accelerate(transformer, path)
    assert torch.equal(run(transformer), out)
    first.remove()
    assert torch.equal(run(transformer), out)
    second.remove()
    assert torch.equal(run(transformer), dense)


def test_what_is_cast_meanwhile_comes_back_cast(path):
    transformer = tiny_wan_transformer()
    plain = transformer.get_parameter(ROW).clone()
    save_sla_weights(path, some_weights(tensors={ROW: torch.randn(24, 24)}))
    handle = accelerate(transformer, path)
    transformer.to(torch.bfloat16)
    handle.remove()
    assert torch.equal(transformer.get_parameter(ROW), plain.bfloat16())


def test_a_copy_has_weights_of_its_own(path):
    import copy

    transformer = tiny_wan_transformer()
    dense = run(transformer)
    save_sla_weights(path, some_weights(tensors={ROW: torch.randn(24, 24)}))
    handle, out = accelerate(transformer, path), run(transformer)
    other = copy.deepcopy(transformer)
    handle.remove()
    assert torch.equal(run(transformer), dense) and torch.equal(run(other), out)
    next(m for m in other.modules() if hasattr(m, "_dit_accel"))._dit_accel.owner.remove()
    assert torch.equal(run(other), dense)


def test_an_adapter_around_a_changed_tensor_stays(path):
    from peft import LoraConfig

    transformer = tiny_wan_transformer()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    transformer.requires_grad_(False)
    before = run(transformer)
    new = torch.randn(24, 24)
    save_sla_weights(path, some_weights(tensors={ROW: new}))
    handle = accelerate(transformer, path)
    assert torch.equal(transformer.blocks[0].attn1.to_q.base_layer.weight, new)
    handle.remove()
    assert torch.equal(run(transformer), before)


def test_dense_layers_need_no_weights(path):
    transformer = tiny_wan_transformer()
    save_sla_weights(path, some_weights(layers=[1]))
    with accelerate(transformer, path, dense_layers=[0]) as handle:
        run(transformer)
    assert handle.report().sparse_calls == 1
    with pytest.raises(UsageError, match="no layer 0: add what is missing to dense_layers"):
        accelerate(transformer, path)


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        (lambda: some_weights(replace(SPEC, transformer="FluxTransformer2DModel")), {}, "trained on a Flux"),
        (lambda: some_weights(replace(SPEC, transformer=None, head_size=16)), {}, "heads of 16, and .* heads of 12"),
        (lambda: some_weights(replace(SPEC, n_layers=40)), {}, "for 40 layers .* has 2"),
        (lambda: some_weights(mix=True, layers=(0, 1)), {"heads": 3}, "for 2 heads, and this .* has 3"),
        (lambda: some_weights(tensors={"blocks.9.x": torch.zeros(1)}), {}, "'blocks.9.x', which this Wan"),
        (lambda: some_weights(tensors={ROW: torch.zeros(24, 12)}), {}, r"shape \(24, 12\), and this .* \(24, 24\)"),
        (lambda: some_weights(lora={ROW: (torch.zeros(24, 2), torch.zeros(2, 12))}), {}, r"shape \(24, 12\)"),
        (some_weights, {"block": 32, "tile": None}, "trained with .*block=16.* as_trained=False"),
        (some_weights, {"order": "raster"}, "trained with .*'tiles'"),
        (some_weights, {"variant": "all"}, "leave variant out"),
    ],
)
def test_weights_that_do_not_fit_touch_nothing(path, weights, options, words):
    options = dict(options)
    transformer = tiny_wan_transformer(num_attention_heads=options.pop("heads", 2))
    before = [id(m.processor) for m in transformer.modules() if hasattr(m, "get_processor")]
    dense = run(transformer)
    save_sla_weights(path, weights())
    with pytest.raises(UsageError, match=words):
        accelerate(transformer, path, **options)
    assert before == [id(m.processor) for m in transformer.modules() if hasattr(m, "get_processor")]
    assert not transformer._forward_hooks and torch.equal(run(transformer), dense)


def test_another_arrangement_can_be_had_on_purpose(path):
    transformer = tiny_wan_transformer()
    save_sla_weights(path, some_weights())
    with accelerate(transformer, path, order="packed", block=32, as_trained=False) as handle:
        run(transformer)
        assert handle._engines[0].layouts.arrangement.block == 32
    assert handle.report().sparse_calls == 2


def test_what_holds_no_numbers_is_not_changed():
    transformer = tiny_wan_transformer()
    weights = some_weights(tensors={ROW: torch.zeros(24, 24)})
    with pytest.raises(UsageError, match="offloaded"):
        ChangedTensors(transformer.to("meta"), weights)
    quantised = nn.Module()
    quantised.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UsageError, match="quantised"):
        ChangedTensors(quantised, some_weights(tensors={"weight": torch.zeros(4)}))


def test_it_is_no_affair_of_wan_alone(path):
    """Joint attention: text is always read, and its rows read everything, so that nothing is left for them."""
    from dit_accel.testing import tiny_flux_inputs

    transformer = tiny_flux_transformer()
    layers = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    spec = SlaSpec(layers, 16, "FluxTransformer2DModel", order="packed", block=16, keep=0.3)
    save_sla_weights(path, some_weights(spec, layers=range(layers)))
    inputs = tiny_flux_inputs(transformer)
    with torch.no_grad():
        dense = transformer(**inputs, return_dict=False)[0]
        with accelerate(transformer, path) as handle:
            out = transformer(**inputs, return_dict=False)[0]
    assert handle.report().sparse_calls == layers and not torch.equal(out, dense)
