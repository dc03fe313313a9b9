"""Options of one transformer of a pipeline: how they are said, inherited, replaced and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dit_accel
from dit_accel.caches import load_cache, override_cache
from dit_accel.errors import UsageError
from dit_accel.options import SparseOptions, override
from dit_accel.preset import Preset, load_preset
from dit_accel.region import load_region
from dit_accel.roles import nest
from dit_accel.settings import parse_setting
from dit_accel.testing import tiny_wan_pipeline, tiny_wan_transformer

TEXT = """
[a]
pipeline = "wan"
model = "tiny-wan"
[a.sparse]
keep = 0.3
neighbours = 1
transformer = false
[a.sparse.transformer_2]
neighbours = 2
dense_layers = [0]
[a.cache]
name = "latent"
threshold = 0.1
transformer = { threshold = 0.05, order = 2 }
[a.region]
transformer_2 = { sample_ratio = 0.25 }
[b]
extends = "a"
[b.sparse]
keep = 0.4
transformer = { keep = 0.6 }
[b.cache]
name = "easy"
threshold = 0.2
"""


def preset(tmp_path: Path, name: str) -> Preset:
    (tmp_path / "mine.toml").write_text(TEXT)
    return load_preset(f"{tmp_path / 'mine.toml'}#{name}")


def test_a_role_has_the_common_values_but_for_its_own():
    sparse = SparseOptions.from_mapping({"keep": 0.3, "neighbours": 1, "transformer_2": {"keep": 0.5}})
    assert sparse.for_role("transformer") == SparseOptions.from_mapping({"keep": 0.3, "neighbours": 1})
    assert sparse.for_role("transformer_2") == SparseOptions.from_mapping({"keep": 0.5, "neighbours": 1})
    cache = load_cache({"name": "latent", "order": 1, "threshold": 0.1, "transformer": {"warmup": 4}})
    assert cache.for_role("transformer") == load_cache(
        {"name": "latent", "order": 1, "threshold": 0.1, "warmup": 4}
    )
    region = load_region({"sample_ratio": 0.5, "transformer": {"start": 3}, "transformer_2": False})
    assert region.for_role("transformer") == load_region({"sample_ratio": 0.5, "start": 3})
    assert region.for_role("transformer_2").sample_ratio == 1
    assert load_cache({"name": "easy", "transformer": False}).for_role("transformer") is None
    assert SparseOptions(keep=0.3, roles={"transformer": False}).for_role("transformer") is None


@pytest.mark.parametrize(
    "options",
    [
        SparseOptions.from_mapping({"keep": 0.3, "transformer_2": {"neighbours": 1}, "transformer": False}),
        load_cache({"name": "latent", "transformer": {"threshold": 0.1}}),
        load_region({"transformer": {"error_reset": [1, 2]}}),
    ],
    ids=lambda options: type(options).__name__,
)
def test_plain_data_is_read_again(options):
    read = SparseOptions.from_mapping if isinstance(options, SparseOptions) else None
    read = read or (load_cache if hasattr(options, "threshold") else load_region)
    assert read(json.loads(json.dumps(options.to_mapping()))) == options


def test_another_cache_for_a_role_has_its_own_defaults():
    """taylor's threshold and warm-up are not easy's; what was said for all roles still holds."""
    cache = load_cache({"name": "easy", "max_reused": 3, "transformer_2": {"name": "taylor", "interval": 2}})
    assert cache.for_role("transformer_2") == load_cache({"name": "taylor", "interval": 2, "max_reused": 3})


def test_another_method_for_a_role_drops_what_was_said_to_the_common_one():
    options = SparseOptions.from_mapping(
        {"keep": 0.3, "neighbours": 1, "order": "tiles", "transformer_2": {"method": "random", "seed": 3}}
    )
    own = options.for_role("transformer_2")
    assert (own.method, own.keep, own.order, own.method_options) == ("random", 0.3, None, {"seed": 3})


def test_a_change_of_kind_reaches_the_roles_that_follow_it():
    lot = {"method": "random", "seed": 1}
    base = {"keep": 0.3, "transformer": {"neighbours": 2, "keep": 0.5}, "transformer_2": lot}
    changed = override(base, {"method": "random"})
    assert changed == {"keep": 0.3, "method": "random", "transformer": {"keep": 0.5}, "transformer_2": lot}
    base = {"name": "latent", "transformer": {"order": 1, "warmup": 2}, "transformer_2": False}
    assert override_cache(base, {"name": "easy", "transformer_2": {"warmup": 1}}) == {
        "name": "easy", "transformer": {"warmup": 2}, "transformer_2": {"warmup": 1},
    }  # fmt: skip


def test_presets_inherit_role_by_role(tmp_path):
    first, second = preset(tmp_path, "a"), preset(tmp_path, "b")
    assert first.sparse.for_role("transformer") is None
    assert first.sparse.for_role("transformer_2").method_options == {"neighbours": 2}
    assert second.sparse.for_role("transformer").keep == 0.6
    own = second.sparse.for_role("transformer_2")
    assert (own.keep, own.dense_layers) == (0.4, (0,))
    # easy has no order; a role's own threshold wins over a common one that was said later
    assert second.cache.roles == {"transformer": {"threshold": 0.05}} and second.cache.threshold == 0.2
    assert second.sources["cache.transformer.threshold"] == "preset a"
    assert second.sources["sparse.transformer.keep"] == "preset b"
    assert "cache.transformer.order" not in second.sources and "sparse.transformer" not in second.sources
    assert second.to_dict()["region"]["transformer_2"] == {"sample_ratio": 0.25}


def test_settings_by_dotted_name(tmp_path):
    texts = ["cache.transformer_2.threshold=.4", "sparse.transformer.keep=0.7", "region.transformer=false"]
    changed = preset(tmp_path, "a").with_values(dict(map(parse_setting, texts)), "cli")
    assert changed.cache.roles == {"transformer": {"threshold": 0.05, "order": 2}, "transformer_2": {"threshold": 0.4}}
    assert changed.sparse.roles["transformer"] == {"keep": 0.7}
    assert changed.region.roles == {"transformer_2": {"sample_ratio": 0.25}, "transformer": False}
    assert changed.sources["cache.transformer_2.threshold"] == "cli"
    assert nest({"a.b.c": 1, "a.d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    for order in (1, -1):
        twice = {"cache.transformer": False, "cache.transformer.warmup": 2}
        with pytest.raises(UsageError, match="both given"):
            changed.with_values(dict(list(twice.items())[::order]), "cli")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache.transformer_2.treshold": 1}, r"cache options of transformer_2: .*Did you mean 'threshold'"),
        ({"cache.transformer_2.threshold": -1}, r"cache options of transformer_2: .*threshold=-1 is out of range"),
        ({"cache.transformer": True}, "a table of cache options for this transformer alone, or false"),
        ({"cache.transformr_2.threshold": 1}, "Did you mean 'transformer_2'"),
        ({"region.transformer_2.transformer.start": 1}, "hold no other role's"),
        ({"region.transformer_3.start": 1}, "Did you mean 'transformer"),
        ({"sparse.transformer.kep": 0.5}, r"sparse options of transformer: .*Did you mean 'keep'"),
        ({"sparse.transformer_2.keep": 2}, r"sparse options of transformer_2: keep=2"),
        ({"sparse.transformers.keep": 0.5}, "Did you mean 'transformer"),
        ({"sparse.transformer_2.method": "poled"}, "Did you mean 'pooled'"),
        ({"generate.transformer.steps": 2}, "generate option"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, values: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message) as caught:
        preset(tmp_path, "a").with_values(values, "cli")
    assert "\n" not in str(caught.value) and "preset 'a'" in str(caught.value)


OWN = {"transformer_2": {}}


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("sparse", {"keep": 0.3, **OWN}),
        ("cache", {"cache": {"name": "easy", **OWN}}),
        ("region", {"region": OWN}),
    ],
)
def test_a_role_that_the_pipeline_lacks_is_refused(what, given):
    pipe = tiny_wan_pipeline()
    message = f"{what} options are given for transformer_2, and WanPipeline has transformer alone"
    with pytest.raises(UsageError, match=message):
        dit_accel.accelerate(pipe, **given)
    assert "_diffusers_hook" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


def test_a_method_object_has_no_options_of_single_roles():
    from dit_accel.methods import load_method

    pipe, method = tiny_wan_pipeline(two_experts=True), load_method("pooled", keep=0.5)
    with pytest.raises(UsageError, match=r"transformer_2.keep is of a method, and method= is an object"):
        dit_accel.accelerate(pipe, method=method, transformer_2={"keep": 0.3})
    own = dict(transformer={"block": 16}, transformer_2={"method": "random"})
    handle = dit_accel.accelerate(pipe, method=method, keep=1, **own)
    first, second = handle._engines
    assert first.method is method and first.options.block == 16
    assert type(second.method).__module__.endswith("random") and second.method.keep == 1
    with pytest.raises(UsageError, match="is on one transformer"):
        dit_accel.SparseProcessor(tiny_wan_transformer(), keep=0.3, transformer_2={"keep": 0.4})
