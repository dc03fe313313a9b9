"""Import `dit_accel` from this source tree without installing it: `import _source_tree` before `import dit_accel`.

Putting the repository's root on `sys.path` is not enough and not safe: `dit_accel.kernels` lives in `kernels/`, and a
root on the path would shadow Hugging Face's `kernels` package, which diffusers imports.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MAPPED = {f"dit_accel.{name}": ROOT / name for name in ("kernels", "pipelines", "presets")}


class SourceTreeFinder(MetaPathFinder):
    """Finds `dit_accel` and the three packages that are mapped into it; everything below them is found as usual."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname == "dit_accel":
            return PathFinder.find_spec(fullname, [str(ROOT)])
        if fullname in _MAPPED:
            folder = _MAPPED[fullname]
            return importlib.util.spec_from_file_location(
                fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
        return None


# torchrun, `python -m` and notebooks put the working directory on the path, which may be the root. It must go: even
# at the path's end transformers would import our `kernels` folder, where Hugging Face's package is not installed.
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != str(ROOT)]
if not any(isinstance(finder, SourceTreeFinder) for finder in sys.meta_path):
    sys.meta_path.insert(0, SourceTreeFinder())
