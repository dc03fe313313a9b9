"""What several tests of this folder share is a module beside them: `from joint_models import run`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("joint_models")
