"""The scripts' builder of full-size models, which builds tiny ones too."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def building() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import _full_size
    finally:
        sys.path.remove(str(SCRIPTS))
    return _full_size
