"""Latents of tiny random models, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel.preset import GenerateOptions
from dit_accel.testing import tiny_wan_pipeline

# 3 x 6 x 6 tokens: a ragged tail in blocks of 16
SIZE = GenerateOptions(width=96, height=96, frames=9, steps=6, guidance=5.0)


@pytest.fixture(scope="session")
def tiny_latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples of rendered scenes, for `tiny_wan_pipeline()`."""
    from dit_accel.training.latents import make_latents
    from dit_accel.training.sources import Scenes

    folder = tmp_path_factory.mktemp("latents")
    make_latents(tiny_wan_pipeline(), Scenes(seed=0), SIZE, folder, count=6, seed=0, model="tiny")
    return folder
