"""The package's face."""

import subprocess
import sys

import pytest

import dit_accel


def test_public_names():
    assert sorted(dit_accel.__all__) == dit_accel.__all__
    assert all(getattr(dit_accel, name) is not None for name in dit_accel.__all__)
    assert callable(dit_accel.accelerate)  # and not a submodule of that name
    with pytest.raises(AttributeError, match="accelerrate"):
        dit_accel.accelerrate  # noqa: B018


def test_importing_is_light():
    code = (
        "import sys, dit_accel, dit_accel.options, dit_accel.methods, dit_accel.errors;"
        "dit_accel.SparseOptions.from_mapping({'keep': .5, 'neighbours': 1});"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
