"""Poisoned memory for every kernel test: an output that was never written cannot pass."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and `torch.empty_like` return with NaN, integers with the largest."""

    def poison(create: Callable) -> Callable:
        def create_poisoned(*args, **kwargs):
            tensor = create(*args, **kwargs)
            if tensor.dtype in (torch.int32, torch.int64):
                return tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return create_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation of a kernel that has these two; Triton's on a GPU, or interpreted."""
    if request.param == "triton" and not (torch.cuda.is_available() or INTERPRETING):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    return request.param


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
