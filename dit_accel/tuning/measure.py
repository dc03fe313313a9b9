"""Measure: one dense run, and beside it what sparse attention would have made of it.

Nothing of what is tried goes on: every step continues from dense velocities. At each step each layer's sparse attention
is computed at every keep beside the dense one, which costs about as much as reading the sum of the keeps; and the
forward runs once more with every layer sparse, which tells in which direction errors go. At a few steps single layers
run sparse alone, which tells how much a layer's error moves the velocity.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import DitAccelError, UsageError
from dit_accel.handle import Handle, accelerate
from dit_accel.options import SparseOptions
from dit_accel.planner import Experiment
from dit_accel.trajectory import Call
from dit_accel.tuning.interpose import Walk, solver_weights, transformers_of, walk
from dit_accel.tuning.tables import Sample
from dit_accel.tuning.threshold import DRY, expected_of

NEAR = 0.03  # relative distance to which branches must explain what the scheduler is given


@dataclass(frozen=True)
class Vectors:
    """What perturbed runs need of a measured one; in main memory, fp32, each the size of the latents."""

    velocities: list[Tensor]  # what the scheduler was given
    errors: list[Tensor]  # that of sparse attention in every layer
    final: Tensor  # latents
    output: Tensor  # what a transformer gave, for its shape
    frames: Any  # uint8 [F, H, W, 3]


@dataclass
class Watch:
    """Follows one run. `look` goes behind each forward, `step` before each step of the scheduler."""

    handle: Handle
    keeps: tuple[float, ...]
    close: frozenset[int]  # steps to look at closely
    reference: int
    tick: Callable[[], None]
    step_number: int = 0
    busy: bool = False  # in a forward of our own
    attention: dict[int, dict[int, list[Tensor]]] = field(default_factory=lambda: defaultdict(dict))
    outputs: list[Tensor] = field(default_factory=list)  # of this step's branches
    deltas: dict[Any, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    roles: list[str] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    alone: list[list[float]] = field(default_factory=list)
    together: list[list[float]] = field(default_factory=list)
    dense_seconds: list[float] = field(default_factory=list)
    sparse_seconds: list[list[float]] = field(default_factory=list)
    n_layers: int = 0
    noise: dict[int, float] = field(default_factory=dict)
    last_output: Tensor | None = None

    def probe(self, call: Call, dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> Tensor:
        """Compare a layer's sparse attention at every keep with its dense one, which goes on."""
        out = dense()
        whole = _norm2(out)
        found = []
        for keep in self.keeps:
            self.handle.experiment(Experiment(None, keep))
            found.append(_norm2(sparse() - out) / whole)
        self.handle.experiment(None)
        self.n_layers = max(self.n_layers, call.n_layers)
        self.noise.setdefault(self.step_number, call.noise)
        self.attention[call.layer].setdefault(self.step_number, []).append(torch.stack(found))
        return out

    def look(self, role: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Run a forward again in other ways, once it has returned."""
        if self.busy:
            return
        self.busy = True
        self.handle.probe(None)
        try:
            self._look(role, module, args, kwargs, output[0])
        finally:
            self.handle.experiment(None)
            self.handle.probe(self.probe)
            self.busy = False

    def _look(self, role: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if not self.n_layers:
            reasons = ", ".join(self.handle.report().dense_reasons) or "no self-attention ran"
            raise UsageError(
                f"nothing can run sparse here, so there is nothing to tune: {reasons}. Give a larger --size or more "
                "--frames, or --set sparse.min_tokens=0 if it is to be sparse with few tokens all the same"
            )
        if not self.outputs:
            self.roles.append(role)
        self.outputs.append(output)
        self.tick()

        def again(name: Any, experiment: Experiment) -> float:
            self.handle.experiment(experiment)
            _wait(output)
            began = time.perf_counter()
            other = module(*args, **kwargs)[0]
            _wait(other)
            self.deltas[name].append(other - output)
            self.tick()
            return time.perf_counter() - began

        if self.step_number not in self.close:
            again(("together", self.reference), Experiment(None, self.keeps[self.reference]))
            return
        self.dense_seconds.append(again("dense", Experiment(frozenset(), self.keeps[0])))
        self.sparse_seconds = self.sparse_seconds or [[] for _ in self.keeps]
        for i, keep in enumerate(self.keeps):
            self.sparse_seconds[i].append(again(("together", i), Experiment(None, keep)))
        for layer in range(self.n_layers):
            again(("alone", layer), Experiment(frozenset([layer]), self.keeps[-1]))

    def step(self, step: int, velocity: Tensor) -> Tensor:
        """Bring the branches of a step together as the pipeline did."""
        shares = branch_shares(self.outputs, velocity)
        errors = {name: _combine(parts, shares, len(velocity)) for name, parts in self.deltas.items()}
        self.velocities.append(velocity.float().cpu())
        self.errors.append(errors[("together", self.reference)].cpu())
        if step in self.close:
            self.together.append([float(_norm2(errors[("together", i)])) for i in range(len(self.keeps))])
            self.alone.append([float(_norm2(errors[("alone", layer)])) for layer in range(self.n_layers)])
        self.last_output = self.outputs[0]
        self.outputs, self.deltas, self.step_number = [], defaultdict(list), step + 1
        return velocity

    def sample(self, noted: Walk) -> Sample:
        """The tables of a run that has ended."""
        n = noted.steps
        expected = expected_of(self.handle.trials(), n)
        table = [
            [torch.stack(self.attention[layer][step]).mean(0).tolist() for step in range(n)]
            for layer in range(self.n_layers)
        ]
        vectors = [x.flatten().double() for x in (*self.velocities, *self.errors)]
        gram = [[float(a @ b) for b in vectors] for a in vectors]
        return Sample(
            noise=[self.noise[step] for step in range(n)],
            roles=self.roles,
            attention=table,
            steps=sorted(self.close),
            alone=self.alone,
            together=self.together,
            reference=self.reference,
            gram=gram,
            weights=solver_weights(noted.scheduler),
            elements=self.velocities[0].numel(),
            dense_seconds=self.dense_seconds,
            sparse_seconds=self.sparse_seconds,
            expected=expected,
        )


def close_steps(n: int, count: int) -> frozenset[int]:
    """So many of n steps, spread over them: each in the middle of its part."""
    count = min(count, n)
    return frozenset((2 * i + 1) * n // (2 * count) for i in range(count))


def measure(
    pipe: Any,
    options: SparseOptions,
    keeps: tuple[float, ...],
    steps: int,
    close: int,
    make: Callable[[], Any],
    tick: Callable[[], None],
) -> tuple[Sample, Vectors]:
    """Measure one run.

    Args:
        options: sparse ones, without a schedule of their own.
        keeps: the largest first.
        steps: of denoising.
        close: how many of them to look at closely.
        make: makes the clip and gives its frames.
        tick: called behind every forward.

    Raises:
        UsageError: nothing can run sparse here, or the scheduler draws noise.
        DitAccelError: a pipeline whose guidance is no sum of its branches.
    """
    with accelerate(pipe, options, cache=DRY) as handle:
        watch = Watch(handle, keeps, close_steps(steps, close), len(keeps) // 2, tick)
        handle.probe(watch.probe)
        hooks = [
            module.register_forward_hook(
                lambda module, args, kwargs, output, role=role: watch.look(role, module, args, kwargs, output),
                with_kwargs=True,
            )
            for role, module in transformers_of(pipe).items()
        ]
        try:
            with torch.no_grad(), walk(pipe.scheduler, watch.step) as noted:
                frames = make()
        finally:
            for hook in hooks:
                hook.remove()
    sample = watch.sample(noted)
    final, output = noted.final.float().cpu(), torch.zeros_like(watch.last_output)
    return sample, Vectors(watch.velocities, watch.errors, final, output, frames)


def forwards(n_steps: int, branches: int, n_layers: int, keeps: int, close: int) -> int:
    """How many forwards `measure` runs."""
    close = min(close, n_steps)
    return branches * (2 * n_steps + close * (n_layers + keeps))


def branch_shares(outputs: list[Tensor], velocity: Tensor) -> list[float]:
    """With which factors a pipeline added up its branches, (guidance, 1 - guidance) say; found by least squares.

    Args:
        outputs: of a step's forwards; one with several times the velocity's rows holds as many branches.

    Raises:
        DitAccelError: they do not add up to it.
    """
    parts = [part.flatten().double() for part in _branches(outputs, len(velocity))]
    target = velocity.flatten().double()
    products = torch.stack([torch.stack([a @ b for b in parts]) for a in parts])
    shares = torch.linalg.pinv(products) @ torch.stack([a @ target for a in parts])
    made = sum(share * part for share, part in zip(shares, parts, strict=True))
    if float((made - target).norm()) > NEAR * float(target.norm()):
        raise DitAccelError(
            f"this pipeline makes its velocity of {len(parts)} branches in a way that is no sum of them, which tune "
            "does not understand; turn guidance_rescale and the like off"
        )
    return shares.tolist()


def _branches(outputs: list[Tensor], rows: int) -> list[Tensor]:
    return [part for output in outputs for part in output.split(rows)]


def _combine(parts: list[Tensor], shares: list[float], rows: int) -> Tensor:
    branches = _branches(parts, rows)
    return sum(share * part.float() for share, part in zip(shares, branches, strict=True))


def _norm2(x: Tensor) -> Tensor:
    """Squared norm, 0-d fp32, on the device."""
    return torch.linalg.vector_norm(x, dtype=torch.float32).square()


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
