"""The page: one file that needs nothing beside it, and says what results.json says."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dit_accel.bench.results import EqualTime, Gain, Results, load_results, results_of
from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.pipelines.video import read_clip, write_clip
from dit_accel.quality.against import measure_quality
from dit_accel.quality.page import write_page
from dit_accel.quality.page.clips import Take, show_clip
from dit_accel.quality.page.costs import skipped_steps
from dit_accel.quality.page.media import draw_difference, embed
from dit_accel.quality.page.report import lay_out


class Seen(HTMLParser):
    """Every attribute, every id, and the text of every element by its name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._open = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.text.setdefault(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text[self._open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def of(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


@pytest.fixture(scope="module")
def results(bench_folder: Path) -> Results:
    return load_results(bench_folder)


@pytest.fixture(scope="module")
def text(bench_folder: Path, results: Results) -> str:
    path = write_page(results, bench_folder)
    assert path == bench_folder / "index.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def seen(text: str) -> Seen:
    return Seen(text)


def test_nothing_is_fetched_from_anywhere(text: str, seen: Seen) -> None:
    for tag, name, value in seen.attributes:
        if name in ("src", "data-src", "poster", "href", "srcset", "action", "data"):
            assert value.startswith(("data:", "#")), (tag, name, value[:80])
        assert not re.search(r"https?://|//\w+\.", value) or value.startswith("data:"), (tag, name, value[:80])
    assert not re.search(r"@import|url\((?!#)", text)
    (policy,) = [value for value in seen.of("meta", "content") if "default-src" in value]
    assert "default-src 'none'" in policy and "http" not in policy
    assert "<link" not in text.replace('<link rel="icon" href="data:,">', "")


def test_ids_are_one_each_and_references_lead_somewhere(text: str, seen: Seen) -> None:
    ids = Counter(value for _, name, value in seen.attributes if name == "id")
    assert not {name for name, count in ids.items() if count > 1}
    named = {value[1:] for _, name, value in seen.attributes if name == "href" and value.startswith("#")}
    assert (named | set(re.findall(r"url\(#([^)]+)\)", text))) <= set(ids)


def test_the_numbers_are_those_of_the_results(text: str, seen: Seen, results: Results) -> None:
    (raw,) = [text for text in seen.text["script"] if text.startswith("{")]
    assert results_of(json.loads(raw), "page") == results
    preset = results.variant("tiny-wan-fast")
    (verdict,) = seen.text["h1"]
    assert verdict == results.verdict
    cells = seen.text["td"]
    assert f"{results.gains[0].whole:.2f}×" in cells and f"{results.gains[0].amdahl_bound:.2f}×" in cells
    assert f"{preset.seconds:.3g}" in cells and "transformer: 101" in cells
    assert f"{preset.ran.dense_calls} of {preset.ran.dense_calls + preset.ran.sparse_calls}" in cells
    assert "noise level above 0.97" in cells and "skipped by the cache" in cells
    for made in preset.clips:
        for frame in made.quality.frame_psnr_db:
            assert f"{frame:.2f}" in cells
    assert any("dense again" in line and "dense" in line for line in seen.text["p"])
    assert {one.what for one in results.not_run} <= set(seen.text["dt"])
    assert results.command in seen.text["code"] and results.environment.chip in cells


def test_the_worst_clip_comes_first(bench_folder: Path, results: Results) -> None:
    made = results.variant("tiny-wan-fast").clips
    lows = sorted((one.quality.worst_psnr_db, one.clip) for one in made)
    page = lay_out(results, bench_folder)
    assert [results.clips[n].prompt in clip.told for (_, n), clip in zip(lows, page.clips, strict=True)] == [True, True]
    assert page.clips[0].worst_frame == next(o.quality.worst_frame for o in made if o.clip == lows[0][1])
    labels = [player.label for player in page.clips[0].players]
    assert labels[:3] == ["dense", "tiny-wan-fast", "dense, 2 steps"] and labels[3].startswith("difference ×")


def test_a_prompt_is_text_and_never_markup(text: str, results: Results) -> None:
    assert results.clips[1].prompt.endswith("</script>")  # as the fixture has it
    assert "<b>green</b>" not in text and "&lt;b&gt;green&lt;/b&gt;" in text
    assert text.count("</script>") == 2  # of the numbers and of the program


def test_no_gain_is_claimed_where_a_check_failed(bench_folder: Path, results: Results) -> None:
    assert lay_out(results, bench_folder).before[0].key == "gain"
    bad = replace(results, problems=("tiny-wan-fast, clip 1: not finite",), gains=(), verdict="No gain is told")
    page = lay_out(bad, bench_folder)
    assert [section.key for section in page.before] == ["variants"] and "not finite" in page.warnings[0]
    assert {row[5] for row in page.before[0].tables[0].rows} == {"–"}
    assert "Whole generation" not in [fact.label for fact in page.facts]


def test_what_limits_the_figures_is_said_above_them(bench_folder: Path, results: Results) -> None:
    random = replace(results.workload, weights="random")
    page = lay_out(replace(results, complete=False, workload=random), bench_folder)
    told = " ".join(page.warnings)
    assert "ended early" in told and "weights are random" in told and "few runs: 2" in told


def test_the_rival_at_equal_time_is_in_a_table(bench_folder: Path, results: Results) -> None:
    fewer = results.variant("dense, 2 steps")
    rival = EqualTime("tiny-wan-fast", 2.25, fewer.name, fewer.name, 21.5, 20.0)
    gain = Gain("tiny-wan-fast", 1.5, 1.4, 1.6, None, 3.0, 1.2)
    page = lay_out(replace(results, equal_time=(rival,), gains=(gain,)), bench_folder)
    assert page.before[1].tables[1].rows == (("tiny-wan-fast", "20.0", "2.25 steps", "21.5"),)
    assert page.before[0].tables[0].rows[0][1:4] == ("3.00×", "not measured", "1.50×")
    assert [fact.value for fact in page.facts if fact.label.startswith("Fewer")] == ["21.5 dB"]


def test_before_the_first_run_is_done(bench_folder: Path, results: Results, tmp_path: Path) -> None:
    begun = replace(results, variants=(), gains=(), equal_time=(), verdict=None, complete=False, not_run=())
    page = lay_out(begun, bench_folder)
    assert page.clips == () and page.verdict.startswith("Not finished")
    assert write_page(begun, tmp_path).is_file()


def test_videos_are_what_every_browser_plays(seen: Seen, bench_folder: Path, results: Results) -> None:
    sources = seen.of("video", "src") + seen.of("video", "data-src")
    assert len(seen.of("video", "src")) == 4 and len(sources) == 8  # the other clip's wait until they are chosen
    for source in sources:
        kind, _, data = source.partition(";base64,")
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(data))) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (384, 384, results.workload.fps)
            assert sum(1 for _ in container.decode(video=0)) == 5


def test_small_frames_grow_by_whole_factors_to_even_sides() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 201, 333, 3), dtype=np.uint8)
    uri, poster, width, height = embed(frames, 0.0, 0)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert poster == "" and (width, height) == (666, 402) and shown.shape == (402, 666, 3)
    assert np.array_equal(shown[::2, ::2], frames[0]) and np.array_equal(shown[1::2, 1::2], frames[0])
    _, _, width, height = embed(np.zeros((1, 401, 451, 3), np.uint8), 0.0, 0)
    assert (width, height) == (452, 402)


def test_the_difference_is_amplified_as_far_as_it_goes() -> None:
    flat = np.full((2, 20, 20, 3), 100, np.uint8)
    apart = flat.copy()
    apart[1, :10] += 9
    drawn = draw_difference(flat, apart)
    assert drawn.gain == 16  # 9 x 16 = 144, 9 x 32 would leave the scale
    levels = drawn.frames.astype(int).sum(-1)
    assert levels[0].max() == levels[1, 10:].max() == levels.min() < levels[1, :10].min()
    assert draw_difference(flat, flat).gain == 64 and draw_difference(flat, 255 - flat).gain == 4
    with pytest.raises(UsageError, match="one shape"):
        draw_difference(flat, apart[:1])


def test_charts_take_the_pages_colours(text: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 6  # frames of two clips, time twice, keys twice
    for drawing in drawings:
        assert 'role="img"' in drawing and re.search(r'aria-label="[^"]{40,}"', drawing)
        assert "currentColor" in drawing and "var(--series-" in drawing and "<metadata" not in drawing
        assert not re.search(r"#0[0-9a-f]0[0-9a-f]{3}\b|#000000", drawing), "a stand-in, or black on black"
        words = re.findall(r"<text[^>]*style=\"([^\"]*)", drawing)
        assert words and all("fill: currentColor" in style and "system-ui" in style for style in words)


def test_every_picture_and_control_has_a_name(seen: Seen, text: str) -> None:
    assert all(seen.of("video", "aria-label")) and len(seen.of("video", "aria-label")) == 8
    for tag, names in (("button", ("aria-label",)), ("input", ("aria-label",))):
        for element in re.findall(rf"<{tag}\b[^>]*>(?:[^<]*)", text):
            assert any(name in element for name in names) or element.split(">")[1].strip(), element
    assert text.count("<caption>") == text.count("<table") > 8
    assert seen.of("html", "lang") == ["en"]


def test_an_image_is_a_picture_without_controls(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense, fast = (rng.integers(0, 256, (1, 32, 48, 3), dtype=np.uint8) for _ in range(2))
    for name, frames in (("a", dense), ("b", fast)):
        write_clip(tmp_path / f"{name}.png", frames, 0.0)
    quality = measure_quality(fast, dense, "not run")
    takes = [Take("dense", (tmp_path / "a.png",), None), Take("fast", (tmp_path / "b.png",), quality)]
    clip = show_clip("clip-0", "b.png", "a prompt", takes)
    assert clip.frames == 1 and clip.chart is None and len(clip.players) == 3
    assert all(player.uri.startswith("data:image/png") and not player.poster for player in clip.players)
    short = [takes[0], Take("fast", (tmp_path / "c.gif",), quality)]
    write_clip(tmp_path / "c.gif", np.concatenate([fast, dense]), 8.0)
    with pytest.raises(UsageError, match="one size and length"):
        show_clip("clip-0", "b.png", "a prompt", short)


def test_equal_clips_are_said_to_be_equal(bench_folder: Path, results: Results) -> None:
    file = bench_folder / results.variant("dense").clips[0].files[0]
    frames, fps, _ = read_clip(file)
    takes = [Take("dense", (file,), None), Take("fast", (file,), measure_quality(frames, frames, "not run"))]
    clip = show_clip("clip-0", "a", "a", takes)
    assert clip.fps == fps and clip.chart is None and clip.table.rows[0] == ("PSNR, dB", "equal")


@pytest.mark.parametrize(
    ("decisions", "skipped"),
    [
        ({}, set()),
        ({"transformer": "1101"}, {2}),
        ({"transformer": "cond=1001; uncond=1011"}, {1}),
        ({"transformer": "1100", "transformer_2": "1000"}, {2, 3}),
    ],
)
def test_skipped_is_what_nobody_computed(decisions: dict[str, str], skipped: set[int]) -> None:
    assert skipped_steps(decisions) == skipped


def test_without_matplotlib_one_line_says_what_to_install(
    bench_folder: Path, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'dit-accel\[report\]'") as told:
        write_page(results, bench_folder)
    assert told.value.exit_code == 3
