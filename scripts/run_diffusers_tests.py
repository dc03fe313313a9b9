"""Run diffusers' own model tests with sparse attention in every model they build.

    python scripts/run_diffusers_tests.py CHECKOUT [pytest arguments]

CHECKOUT is a folder with diffusers' `tests`, `setup.py` and `pyproject.toml` (its wheels hold no tests), as
`git archive HEAD tests setup.py pyproject.toml | tar -x -C CHECKOUT` makes in a clone of
https://github.com/huggingface/diffusers. The diffusers that is tested is the installed one. Needs pytest, peft,
parameterized and requests-mock; nothing is downloaded.

Exit code: pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent / "tests" / "conformance"
TESTS = "tests/models/transformers"
# of the families that dit_accel describes
FILES = ("wan*", "hunyuan_video*", "hunyuan_1_5", "flux", "flux2", "sd3", "qwenimage", "ltx", "minimax_h3")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    checkout = Path(arguments[0])
    found = [sorted((checkout / TESTS).glob(f"test_models_transformer_{name}.py")) for name in FILES]
    files = [file for some in found for file in some]
    if not all(found):
        print(
            f"{checkout} does not hold {TESTS}/test_models_transformer_*.py of {', '.join(FILES)}; see --help for how "
            "to make a checkout."
        )
        return 2
    paths = [str(PLUGINS), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    selected = [
        "-m",
        "not compile and not quantization",
        "-p",
        "inject_sparse",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    names = [str(file.relative_to(checkout)) for file in files]
    command = [sys.executable, "-m", "pytest", *selected, *names, *arguments[1:]]
    return subprocess.run(command, cwd=checkout, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
