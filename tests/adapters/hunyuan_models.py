"""For tests of the HunyuanVideo models: a method that catches state which leaks, and branches run side by side."""

import contextlib
import sys
from pathlib import Path

import torch
from joint_models import run

import dit_accel

sys.path.insert(0, str(Path(__file__).parents[1] / "laws"))
from methods_table import METHODS as LAW_METHODS

WITH_MEMORY = ("remember", "lite", "svg2")


def remembering(name, keep):
    """A method that keeps something between steps, as the laws have it."""
    return LAW_METHODS[name](keep)


def run_branches(transformer, method, inputs, order, *, named):
    """Three steps of some branches, each through a forward of its own; returns the outputs of the branch "c".

    Args:
        inputs: arguments of a forward, by branch.
        order: of the branches in each step, such as "cu".
        named: whether they say their name, as some pipelines do.
    """
    handle = dit_accel.accelerate(transformer, None, method=method, block=16, min_tokens=0, strict=True)
    outputs = []
    for step, timestep in enumerate((900.0, 600.0, 300.0)):
        for name in order:
            call = {**inputs[name], "timestep": torch.full_like(inputs[name]["timestep"], timestep)}
            call["hidden_states"] = call["hidden_states"] * (1 + step)
            with transformer.cache_context(name) if named else contextlib.nullcontext():
                out = run(transformer, call)
            if name == "c":
                outputs.append(out)
    report = handle.report()
    assert report.dense_calls == 0 and not report.stateless
    handle.remove()
    return torch.stack(outputs)
