"""The page in a real Chromium, where one is installed: it plays, stays together, fits and complains of nothing."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_accel.bench.results import load_results
from dit_accel.quality.page import write_page

SHOWN = ".clip:not([hidden])"
# Two seconds of every player's time, once a picture: most apart in frames, and how far the first one got.
WATCH = """async ([fps, seconds]) => {
  const videos = [...document.querySelectorAll('.clip:not([hidden]) video')];
  const told = { apart: 0, moved: videos.map(() => 0), pictures: 0 };
  let last = videos.map((video) => video.currentTime);
  for (const begun = performance.now(); performance.now() - begun < 1000 * seconds;) {
    await new Promise(requestAnimationFrame);
    const now = videos.map((video) => video.currentTime);
    told.apart = Math.max(told.apart, (Math.max(...now) - Math.min(...now)) * fps);
    told.moved = told.moved.map((sum, i) => sum + Math.max(0, now[i] - last[i]));
    told.pictures += 1;
    last = now;
  }
  return told;
}"""
TIMES = "(videos) => videos.map((video) => video.currentTime)"
# Until every player has a picture and looks for no other. The page's own policy forbids playwright's way to wait.
SETTLE = """async () => {
  const busy = (video) => video.readyState < 2 || video.seeking;
  const videos = [...document.querySelectorAll('.clip:not([hidden]) video')];
  for (let n = 0; n < 600 && videos.some(busy); n += 1) await new Promise((done) => setTimeout(done, 25));
  if (videos.some(busy)) throw new Error('a player has no picture after 15 seconds');
}"""
# The mean brightness of what a player shows.
DRAWN = """(videos) => videos.map((video) => {
  const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
  canvas.width = canvas.height = 16;
  pen.drawImage(video, 0, 0, 16, 16);
  return pen.getImageData(0, 0, 16, 16).data.reduce((sum, level) => sum + level, 0) / 1024;
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on PATH")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra browser")
    with api.sync_playwright() as driver:
        # Nothing but our own file is opened, and in a container its sandbox has no rights to be built with.
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(browser: Any, bench_folder: Path) -> Path:
    return write_page(load_results(bench_folder), bench_folder)


@pytest.fixture
def show(browser: Any, page_file: Path) -> Iterator[Callable[..., Any]]:
    """Open the page in a window; any complaint of its console, or a request beyond the file, fails the test."""
    complaints, contexts = [], []

    def open_page(*, scheme: str = "light", width: int = 1280, **options: Any) -> Any:
        window = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, **options)
        contexts.append(window)
        page = window.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        allowed = ("file:", "data:", "blob:")
        page.on("request", lambda asked: asked.url.startswith(allowed) or complaints.append(asked.url))
        page.goto(page_file.as_uri())
        page.evaluate(SETTLE)
        return page

    yield open_page
    for window in contexts:
        window.close()
    assert complaints == []


def test_all_players_move_and_stay_within_half_a_frame(show: Callable) -> None:
    page = show()
    fps = float(page.locator(SHOWN).get_attribute("data-fps"))
    page.click(f"{SHOWN} .play")
    told = page.evaluate(WATCH, [fps, 2.0])
    assert len(told["moved"]) == 4 and min(told["moved"]) > 0.3, told
    assert told["apart"] < 0.5, told
    page.click(f"{SHOWN} .play")
    before = page.eval_on_selector_all(f"{SHOWN} video", TIMES)
    page.wait_for_timeout(200)
    assert page.eval_on_selector_all(f"{SHOWN} video", TIMES) == before


def test_one_set_of_controls_moves_all(show: Callable) -> None:
    page = show()
    fps = float(page.locator(SHOWN).get_attribute("data-fps"))
    worst = int(page.locator(SHOWN).get_attribute("data-worst"))

    def frames() -> set[int]:
        page.evaluate(SETTLE)
        return {int(time * fps) for time in page.eval_on_selector_all(f"{SHOWN} video", TIMES)}

    assert frames() == {worst}  # where the reader is to look first
    page.locator(f"{SHOWN} .scrub").fill("1")
    assert frames() == {1} and page.locator(f"{SHOWN} .where").inner_text() == "frame 1 of 4"
    page.click(f"{SHOWN} .forth")
    assert frames() == {2}
    page.locator(f"{SHOWN} .scrub").press(",")
    assert frames() == {1}
    page.locator(f"{SHOWN} .scrub").press("ArrowRight")
    assert frames() == {2}
    page.click(f"{SHOWN} .worst")
    assert frames() == {worst}
    page.select_option(f"{SHOWN} .speed", "0.5")
    assert page.eval_on_selector_all(f"{SHOWN} video", "(v) => v.map((x) => x.playbackRate)") == [0.5] * 4
    assert all(level > 70 for level in page.eval_on_selector_all(f"{SHOWN} video", DRAWN))  # alpha alone is 64


def test_another_clip_is_loaded_when_it_is_chosen(show: Callable) -> None:
    page = show()
    first = page.locator(SHOWN).get_attribute("id")
    assert page.locator("#clip-1 video[src]").count() == 0
    page.locator("#choose").focus()
    page.keyboard.press("ArrowDown")
    page.evaluate(SETTLE)
    assert page.locator(SHOWN).get_attribute("id") == "clip-1" != first


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_fits_and_reads(show: Callable, scheme: str, width: int) -> None:
    page = show(scheme=scheme, width=width, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), dtype=float)
    paper = np.median(shot[:, :4])
    assert paper > 230 if scheme == "light" else paper < 50
    other = "dark" if scheme == "light" else "light"
    page.select_option("#theme", other)
    shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), dtype=float)
    assert (np.median(shot[:, :4]) > 230) == (other == "light")
    contrasts = page.evaluate(CONTRASTS)
    assert contrasts and min(contrasts.values()) >= 4.5, {k: v for k, v in contrasts.items() if v < 4.5}


# WCAG's contrast of text on what it stands on, for every kind of text outside the pictures.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (node) => {
    for (; node; node = node.parentElement) {
      const ground = parse(getComputedStyle(node).backgroundColor);
      if (ground.length < 4 || ground[3] > 0) return ground;
    }
    return [255, 255, 255];
  };
  const found = {};
  const texts = 'h1, h2, p, dt, dd, td, th, caption, summary, button, label, output, svg text';
  for (const node of document.querySelectorAll(texts)) {
    const style = getComputedStyle(node), ink = parse(node.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(under(node.closest('svg') ?? node))].sort((x, y) => y - x);
    const name = node.tagName + '.' + node.className;
    found[name] = Math.min(found[name] ?? 99, (a + 0.05) / (b + 0.05));
  }
  return found;
}"""


def test_the_numbers_can_be_saved(show: Callable, bench_folder: Path, tmp_path: Path) -> None:
    page = show(accept_downloads=True)
    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "results.json"
    waiting.value.save_as(tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == load_results(bench_folder)


def test_it_can_be_used_without_a_mouse(show: Callable) -> None:
    page = show()
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.id"))
    assert reached[0] == "skip"
    assert {"theme", "choose", "play", "back", "forth", "worst", "speed", "scrub"} <= set(reached), reached
