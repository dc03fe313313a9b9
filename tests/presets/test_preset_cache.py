"""A preset's `[cache]` table: inherited, replaced, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel.errors import UsageError
from dit_accel.preset import Preset, load_preset

TEXT = """
[a]
pipeline = "wan"
model = "tiny-wan"
[a.cache]
name = "latent"
order = 2
warmup = 3
[b]
extends = "a"
[b.cache]
name = "easy"
threshold = 0.1
"""


def preset(tmp_path: Path, name: str, text: str = TEXT) -> Preset:
    (tmp_path / "mine.toml").write_text(text)
    return load_preset(f"{tmp_path / 'mine.toml'}#{name}")


def test_another_cache_keeps_what_both_know(tmp_path: Path) -> None:
    first, second = preset(tmp_path, "a"), preset(tmp_path, "b")
    assert (first.cache.name, first.cache.order, first.cache.warmup) == ("latent", 2, 3)
    assert (second.cache.name, second.cache.threshold, second.cache.warmup) == ("easy", 0.1, 3)
    assert second.sources["cache.warmup"] == "preset a" and second.sources["cache.name"] == "preset b"
    assert "cache.order" not in second.sources and second.sources["cache.max_reused"] == "default"
    assert second.to_dict()["cache"]["name"] == "easy" and not second.is_stock and second.sparse is None


def test_a_schedule_needs_no_quotes(tmp_path: Path) -> None:
    assert preset(tmp_path, "a").with_values({"cache.schedule": 1101}, "cli").cache.schedule == "1101"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('name = "esay"', "Did you mean 'easy'"),
        ('name = "easy"\ntreshold = 1', "Did you mean 'threshold'"),
        ('name = "easy"\nthreshold = "x"', "threshold='x' is out of range"),
        ("threshold = 0.1", "needs its name"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, line: str, message: str) -> None:
    text = f'[a]\npipeline = "wan"\nmodel = "tiny-wan"\n[a.cache]\n{line}\n'
    with pytest.raises(UsageError) as caught:
        preset(tmp_path, "a", text)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("preset 'a'")
