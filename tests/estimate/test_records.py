"""The estimate against every case that was timed: within 15 % of it, with rates that follow from the records.

What is kept and the peak of memory are counted, and took no part in any fit. (Which tensors are alive at the peak was
settled with these records at hand; test_counts holds it against real models of other widths.)
"""

from __future__ import annotations

import math
import re
import sys
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from dit_accel.estimate.gpus import MEASURED, find_gpu, read_data
from dit_accel.estimate.memory import region_bytes
from dit_accel.region.options import Region

SCRIPTS = Path(__file__).parents[2] / "scripts"
BOUND = 0.15
# Cases that are further off when no variant of them took part in the fit, and why.
MASK = "the only model that was timed with a mask: without it nothing tells what a mask costs"
HOST = "the only step that waited for the host: the rate is this one case, so that its agreement above says nothing"
CALL = "the only small image with heads of 128: without it nothing tells the fixed time of a sparse call"
FAR_LEFT_OUT = {
    "bench_pipeline_h200: hunyuanvideo-720p, dense": MASK,
    "bench_pipeline_h200: hunyuanvideo-720p, hunyuanvideo-fast": MASK,
    "bench_pipeline_h200: hunyuanvideo-720p, hunyuanvideo-balanced": MASK,
    "bench_pipeline_h200: flux-1024, flux-fast": CALL,
    "bench_region_flux_1024_h200: flux-1024, flux-fast, region 0.5 by blocks": HOST,
}


@cache
def fitting() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import fit_estimate
    finally:
        sys.path.remove(str(SCRIPTS))
    return fit_estimate


@cache
def found() -> dict[str, dict[str, float]]:
    return fitting().table(lambda case: find_gpu(MEASURED))


@cache
def left_out() -> dict[str, dict[str, float]]:
    return fitting().left_out()


NAMES = [case.name for case in (*fitting().cases(), *fitting().region_cases())]


@pytest.mark.parametrize("name", NAMES)
def test_an_estimate_is_within_15_percent_of_the_record(name: str) -> None:
    errors = found()[name]
    print(name, {key: f"{error:+.1%}" for key, error in errors.items()})
    assert {"forward", "share", "peak"} <= set(errors) or set(errors) == {"step"}
    assert all(abs(error) <= BOUND for error in errors.values()), errors


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=FAR_LEFT_OUT[name]))
        if name in FAR_LEFT_OUT
        else name
        for name in NAMES
    ],
)
def test_left_out_of_the_fit_a_case_is_within_15_percent_still(name: str) -> None:
    errors = left_out()[name]
    assert all(abs(error) <= BOUND for error in errors.values()), errors


@pytest.mark.parametrize(("name", "case"), [("bench_region_full_h200.json", 0), ("bench_region_full_h200.json", 1)])
def test_what_region_sampling_holds_is_the_records(name: str, case: int) -> None:
    told = fitting().read(name)["cases"][case]
    work = next(each.whole for each in fitting().cases() if each.case == told["case"])
    variants = told["variants"]
    held = variants["region 0.5"]["peak_bytes"] - variants["dense"]["peak_bytes"]
    assert region_bytes(Region(sample_ratio=0.5), work, branches=1) == pytest.approx(held, rel=0.02)


def test_every_case_of_the_records_is_looked_at() -> None:
    """7 cases in 3 variants, and one more in 3; 12 region steps."""
    assert len(NAMES) == len(set(NAMES)) == 7 * 3 + 3 + 12


def test_what_is_kept_is_the_records() -> None:
    kept = {name: errors["keep"] for name, errors in found().items() if "keep" in errors}
    assert len(kept) == 16
    assert max(map(abs, kept.values())) < 0.002, kept


def test_the_rates_follow_from_the_records() -> None:
    told = {name: rate["value"] for name, rate in read_data()["rates"].items()}
    assert fitting().fit(find_gpu(MEASURED)) == pytest.approx(told, rel=1e-3)


def test_every_rate_names_its_records_and_where_in_them() -> None:
    for name, rate in read_data()["rates"].items():
        assert rate["unit"] and rate["key"], name
        assert rate["records"] and all((SCRIPTS / "results" / record).is_file() for record in rate["records"]), name


def test_a_fit_minds_what_was_timed() -> None:
    """Twice as long in the records is half the rate."""
    script, gpu = fitting(), find_gpu(MEASURED)
    dense = [case for case in script.cases() if case.sparse is None]
    rates = script._fit_dense(dense, {"unaligned_times": 1.0})
    for case in dense:
        case.attention *= 2
    slower = script._fit_dense(dense, {"unaligned_times": 1.0})
    assert slower["attention_tflops_128"] == pytest.approx(rates["attention_tflops_128"] / 2)
    assert slower["masked_times"] == pytest.approx(rates["masked_times"])
    assert math.isfinite(replace(gpu, rates=rates).rate("masked_times"))


def test_rates_are_written_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fitting()
    copy = tmp_path / "gpus.toml"
    copy.write_text(script.DATA.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "DATA", copy)
    script.write({"matrix_tflops": 123.456})
    before = read_data()["rates"]
    after = tomllib.loads(copy.read_text(encoding="utf-8"))["rates"]
    assert after["matrix_tflops"] == {**before["matrix_tflops"], "value": 123.46}
    assert {**after, "matrix_tflops": 0} == {**before, "matrix_tflops": 0}
    with pytest.raises(SystemExit, match="no_such_rate"):
        script.write({"no_such_rate": 1.0})


def worst(errors: dict[str, dict[str, float]], key: str) -> float:
    return max(abs(each[key]) for each in errors.values() if key in each)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ("time of a forward", "forward"),
        ("attention's share", "share"),
        ("gain of a sparse forward", "gain"),
        ("time of a region step", "step"),
        ("peak above the weights", "peak"),
        ("keys read", "keep"),
    ],
)
def test_the_document_tells_the_largest_errors(row: str, key: str) -> None:
    page = (SCRIPTS.parent / "docs" / "estimate.md").read_text(encoding="utf-8")
    told = re.search(rf"^\| {row} \| ([\d.]+) % \| (?:([\d.]+) %|not fitted) \|", page, re.M)
    assert told, row
    for text, errors in ((told[1], found()), (told[2], left_out())):
        if text is not None:
            assert abs(float(text) - 100 * worst(errors, key)) <= (0.06 if "." in text else 0.51)
