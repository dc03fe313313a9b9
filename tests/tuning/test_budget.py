"""Budgets as they are written."""

from __future__ import annotations

import pytest

from dit_accel.errors import UsageError
from dit_accel.tuning.budget import Budget, parse_budget


def test_what_can_be_asked() -> None:
    assert parse_budget("psnr>=30") == Budget("psnr", 30.0)
    assert parse_budget(" time <= .5 ") == Budget("time", 0.5)
    assert parse_budget("error<=5e-2") == Budget("error", 0.05)
    assert str(parse_budget("error<=0.05")) == "error<=0.05"
    assert Budget("psnr", 30).met_by(30.0) and not Budget("psnr", 30).met_by(29.99)
    assert Budget("time", 0.5).met_by(0.5) and not Budget("time", 0.5).met_by(0.51)


@pytest.mark.parametrize(
    "text",
    ["", "30", "psnr", "psnr<=30", "psnr>=nan", "psnr>=900", "time>=.5", "time<=0", "time<=1", "error<=-1", "time<=1e",
     "speed>=2", "psnr>=30 time<=.5"],
)  # fmt: skip
def test_what_cannot(text: str) -> None:
    with pytest.raises(UsageError, match="psnr>=X .*time<=X .*error<=X"):
        parse_budget(text)
