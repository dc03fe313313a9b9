"""Lets a script use the repository without installing it: `import _source_tree` first.

`dit_accel.kernels`, `dit_accel.pipelines` and `dit_accel.presets` are folders of the repository's root that
packaging maps into the package. In a bare clone Python cannot find them there; this adds a finder that can. Where
dit_accel is installed it stays as it is, and nothing is added.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {f"dit_accel.{folder}": ROOT / folder for folder in ("kernels", "pipelines", "presets")}


class SourceTreeFinder:
    """Finds the three mapped folders under the name they have when installed; everything below them follows."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        folder = MAPPED.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if importlib.util.find_spec("dit_accel") is None:
    sys.path.append(str(ROOT))
if importlib.util.find_spec("dit_accel.kernels") is None:
    sys.meta_path.append(SourceTreeFinder)
