"""A pytest plugin for diffusers' own test-suite: every model of a known family attends through our sparse kernel.

`scripts/run_diffusers_tests.py` runs it. With everything kept in blocks of 16 tokens and no auto-dense, each
model must still do all that its tests ask: save and load, change type, fuse, take LoRA, be cast layer by layer.

Importing it patches classes for the whole process. Its name must not look like a test file's (`test_*`, `*_test`),
or pytest would import it among our own tests.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from typing import Any

import diffusers
import pytest
from diffusers.models.attention_dispatch import AttentionBackendName

from dit_accel import SparseProcessor
from dit_accel.adapters import FAMILIES

TALLIES: list[Any] = []


def put_under_test(cls: type) -> None:
    """Make a model class set a SparseProcessor on every instance it constructs."""
    construct = cls.__init__

    @functools.wraps(construct)  # register_to_config reads the signature
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if type(self) is cls:
            processor = SparseProcessor(self, keep=1.0, block=16, min_tokens=0)
            for module in self.modules():  # one of the classes lacks set_attn_processor
                if hasattr(module, "set_processor"):
                    module.set_processor(processor)
            TALLIES.append(processor.engine.tally)

    cls.__init__ = init


for name in FAMILIES:
    put_under_test(getattr(diffusers, name))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have the tests of attention backends meet those of a CPU: by itself diffusers tries some that need CUDA."""
    for cls in getattr(metafunc.cls, "__mro__", ()):
        if cls.__name__ == "AttentionBackendTesterMixin":
            tried = sys.modules[cls.__module__]._ALL_BACKEND_PARAMS  # the very list that its tests are marked with
            tried += [x for x in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH) if x not in tried]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    sparse, dense = sum(t.sparse for t in TALLIES), sum(t.dense for t in TALLIES)
    cross = sum(t.cross for t in TALLIES)
    terminalreporter.section("dit_accel")
    terminalreporter.write_line(
        f"{len(TALLIES)} models, self-attention calls: {sparse} sparse, {dense} dense; {cross} cross-attention calls"
    )
    for reason, count in sum((t.dense_reasons for t in TALLIES), Counter()).most_common():
        terminalreporter.write_line(f"  dense because {reason}: {count}")
