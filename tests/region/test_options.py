"""What may be said about region sampling: ranges, presets, settings by keyword."""

from __future__ import annotations

import json

import pytest
import torch

from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.preset import load_preset
from dit_accel.region import Region, load_region
from dit_accel.settings import parse_setting


@pytest.mark.parametrize(
    ("name", "value"),
    [("sample_ratio", 0), ("sample_ratio", 1.5), ("sample_ratio", True), ("high_ratio", -0.1), ("starvation", -1),
     ("start", 1.0), ("start", -1), ("error_reset", (0.5, 1.5)), ("layers", 0), ("bucket", 0), ("memory", -1),
     ("seed", 0.5)],
)  # fmt: skip
def test_values_outside_their_range(name, value):
    with pytest.raises(UsageError, match=f"region option {name}="):
        Region(**{name: value})


def test_names_that_there_are_not():
    with pytest.raises(UnknownNameError, match="Did you mean 'std'"):
        Region(selector="stdd")
    with pytest.raises(UnknownNameError, match="keys of region sampling"):
        Region(keys="none")
    with pytest.raises(UnknownNameError, match="Did you mean 'sample_ratio'"):
        load_region({"sample_ration": 0.5})
    with pytest.raises(UsageError, match="give a mapping"):
        load_region(0.5)


def test_options_that_exclude_one_another():
    with pytest.raises(UsageError, match="needs a mask"):
        Region(selector="mask")
    with pytest.raises(UsageError, match="looks at no mask"):
        Region(mask=torch.ones(1, 2, 2))
    with pytest.raises(UsageError, match="layers says where keys are kept"):
        Region(keys="drop", layers=3)


def test_a_mapping_there_and_back():
    region = Region(sample_ratio=0.4, error_reset=(0.5, 12), keys="drop")
    assert load_region(json.loads(json.dumps(region.to_mapping()))) == region


def test_a_preset_has_it_by_setting():
    key, value = parse_setting("region.sample_ratio=.25")
    preset = load_preset("tiny-wan").with_values({key: value, "region.selector": "l2"}, "cli")
    assert preset.region == Region(sample_ratio=0.25, selector="l2") and not preset.is_stock
    assert preset.to_dict()["region"]["selector"] == "l2" and preset.sources["region.sample_ratio"] == "cli"
    assert preset.sources["region.start"] == "default"
    assert load_preset("tiny-wan").region is None
    with pytest.raises(UnknownNameError, match="preset 'tiny-wan'.*sample_ratio"):
        load_preset("tiny-wan").with_values({"region.sample_rati": 1}, "cli")
