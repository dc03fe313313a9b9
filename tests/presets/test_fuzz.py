"""10,000 files that were tampered with: each is a preset or one line that says what is wrong, never a traceback."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.preset import Preset, examine, load_preset
from dit_accel.preset_files import parse_presets, read_shipped

sys.path.insert(0, str(Path(__file__).parent))
from mutations import mutate, write_toml

PARTS, EACH = 8, 1250


def judge(text: str, shipped: dict) -> list[str]:
    """The word "sound" or the error's kind, for each preset of a file. Any error that we do not mean comes through."""
    try:
        file = parse_presets(text, "my.toml")
    except UsageError as error:
        found = [error]
    else:
        looked = [examine(name, file, shipped) for name in file.tables]
        assert all((preset is None) == bool(mistakes) for preset, mistakes in looked)
        found = [verdict for preset, mistakes in looked for verdict in mistakes or [preset]]
    for verdict in found:
        if isinstance(verdict, Preset):
            json.dumps(verdict.to_dict(), allow_nan=False)
            assert list(verdict.rows())
        else:
            # A file of trained weights that is named and not there is no mistake in the preset.
            line = str(verdict)
            assert isinstance(verdict, UsageError) or "side file of SLA" in line or "safetensors" in line
            assert line and line == " ".join(line.split()) and line.isprintable(), repr(line)
    return ["sound" if isinstance(verdict, Preset) else type(verdict).__name__ for verdict in found]


@pytest.mark.parametrize("part", range(PARTS))
def test_a_tampered_file_is_a_preset_or_one_line(part: int) -> None:
    shipped, seen = read_shipped(), Counter()
    for seed in range(part * EACH, (part + 1) * EACH):
        text = mutate(seed, shipped)
        try:
            seen.update(judge(text, shipped))
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}\n{text[:3000]}")
    assert sum(seen.values()) >= EACH
    assert min(seen[kind] for kind in ("sound", "UsageError", "UnknownNameError")) > 50, seen
    print(f"{EACH} files from seed {part * EACH}: {dict(seen)}")


def test_the_number_of_files() -> None:
    assert PARTS * EACH == 10_000


def test_what_is_written_is_what_was_meant() -> None:
    """The writer of the test is right: an unchanged document comes back as it was."""
    import tomllib

    shipped = {name: dict(table) for name, table in read_shipped().items()}
    assert tomllib.loads(write_toml(shipped)) == shipped


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[a]\nmodel = '\xc3'", b"", b"\xef\xbb\xbf[a]"], ids=repr)
def test_bytes_that_are_no_preset(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_preset(path)
    assert len(str(caught.value).splitlines()) == 1 and not isinstance(caught.value, UnknownNameError)
