"""The recipes for other programs: what can run here runs, what needs another program is sound code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from .messages import ROOT

PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- python: (.+?) -->\n```python\n(.+?)```", PAGE, re.S))
SPARSE = "self-attention calls sparse"
RUN = {"a script": SPARSE, "one processor": SPARSE, "bare calls": "18 of 20 self-attention calls sparse"}


def run(code: str, folder: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    known = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=250)
    done = subprocess.run([sys.executable, "-P", "-c", code], **known)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", RUN)
def test_a_recipe_runs_and_is_sparse(name: str, tmp_path: Path) -> None:
    """As it stands, but for the number of the pipeline's steps: two of the twenty."""
    told = run(BLOCKS[name].replace("num_inference_steps=20", "num_inference_steps=2"), tmp_path)
    assert RUN[name] in told and "no fall-backs" in told
    assert not told.startswith("0 of")


def test_xdits_function_answers_as_xdit_calls_it(tmp_path: Path) -> None:
    """With a registry in the place of xDiT's: its functions take `[B, H, S, D]` and these names."""
    stand_in = (
        "import sys, types\n"
        "registry, module = {}, types.ModuleType('xfuser.core.distributed.attention_backend')\n"
        "module.AttentionBackendType = types.SimpleNamespace(SDPA_MATH='SDPA_MATH')\n"
        "module.register_attention_function = lambda name: lambda f: registry.setdefault(name, f)\n"
        "for name in ('xfuser', 'xfuser.core', 'xfuser.core.distributed'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules[module.__name__] = module\n"
    )
    call = (
        "import torch\n"
        "x = [torch.randn(1, 4, 9 * 16 * 16, 32) for _ in range(3)]\n"
        "known = dict(dropout_p=0.0, is_causal=False)\n"
        "out, lse = registry['SDPA_MATH'](*x, **known, attention_kwargs={'thw': (9, 16, 16)})\n"
        "assert out.shape == x[0].shape and lse is None\n"
        "assert registry['SDPA_MATH'](x[0], x[1][:, :, :9], x[2][:, :, :9], **known)[0].shape == x[0].shape\n"
        "print(sparse.report())"
    )
    assert "1 of 2 self-attention calls sparse" in run(stand_in + BLOCKS["xdit"] + call, tmp_path)


def test_every_block_of_code_is_sound() -> None:
    for language, text in re.findall(r"```(python|toml)\n(.+?)```", PAGE, re.S):
        (ast.parse if language == "python" else tomllib.loads)(text)
