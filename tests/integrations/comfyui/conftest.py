"""ComfyUI for the tests: the real core where COMFYUI_ROOT names its folder, else a stand-in for its contract.

The cases of `test_pack` and `test_nodes` run on either. Those of `test_real_core` need a server and its pages, and are
collected with the core alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

_HERE = Path(__file__).parent
CORE = os.environ.get("COMFYUI_ROOT")
collect_ignore = [] if CORE else ["test_real_core.py", "core_models.py", "core_pack", "core_server.py"]
sys.path[:0] = [CORE or str(_HERE / "stub"), str(_HERE)]

if CORE:
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import core_models as models_of_host
else:
    import stub_models as models_of_host


@pytest.fixture
def host() -> ModuleType:
    """What makes models, prompts and latents."""
    return models_of_host


@pytest.fixture(params=models_of_host.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
