"""Training steps as CUDA graphs: the host launches a step's kernels once, and from then on all of them at once.

A step of a small model is some two thousand kernels, which take longer to launch than to run. Whatever changes from
step to step is drawn on the device or lies in a tensor that is filled before (`Learner.set_pace`); a step that waits
for the device cannot be captured, and torch says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps that run as they are: they compile, and make what optimisers remember


class GraphedStep:
    """A step that is captured at its fourth call and replayed since.

    Args:
        step: draws, computes, and moves the weights; returns its losses.
    """

    def __init__(self, step: Callable[[], Tensor]):
        self._step, self._calls = step, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses: Tensor | None = None

    def __call__(self) -> Tensor:
        """Take a step.

        Returns:
            Its losses.
        """
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._take_aside()
        if self._graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # other threads, such as the one that watches over several GPUs, may go on
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._losses = self._step()
            self._graph = graph
        self._graph.replay()
        assert self._losses is not None
        return self._losses.clone()

    def _take_aside(self) -> Tensor:
        """On another stream, as what is captured will be: gradients remember theirs."""
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            losses = self._step()
        here.wait_stream(aside)
        return losses
