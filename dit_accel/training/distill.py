"""Self-distillation: a student with SLA learns the velocity of the dense model it is made of.

Both see the same noisy latents; the loss is the mean square of what their velocities differ by, and of what the guided
velocities differ by that a sampler makes of two branches. On several GPUs each process has a copy and draws samples of
its own; gradients are averaged (accelerate).
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import DitAccelError, EnvironmentProblem, UsageError, unknown_name
from dit_accel.pipelines.staging import Stage
from dit_accel.sla.weights import save_sla_weights
from dit_accel.training.ahead import Ahead
from dit_accel.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from dit_accel.training.draws import NOISES, Draws, spread_levels
from dit_accel.training.ema import Average
from dit_accel.training.guidance import count_branches, read_guidance, why_no_guidance
from dit_accel.training.interrupts import Interrupts
from dit_accel.training.samples import LatentFolder, need_samples
from dit_accel.training.student import Student
from dit_accel.training.velocity import VelocityError, make_cases, measure_velocity

PRECISIONS = ("no", "bf16")
DECAYS = ("cosine", "none")
LEVELS = 5  # noise levels at which velocities are compared
GUIDED = 4.0  # weight of the guided error by itself: see DistillOptions


@dataclass(frozen=True)
class DistillOptions:
    """How to train.

    Raises:
        UsageError: a value outside its range, or neither steps nor minutes.
    """

    steps: int | None = None  # train so many steps
    minutes: float | None = None  # or until so many minutes have passed, those of resumed runs included
    rate: float = 1e-5  # learning rate of the transformer's weights or LoRA
    projection_rate: float = 1e-3  # learning rate of the projections, which start at zero
    mix_rate: float = 0.05  # learning rate of the mixes, which are logits and start where their slope is small
    weight_decay: float = 0.01
    warmup: int = 20  # steps over which the rates rise
    decay: str = "cosine"  # the rates fall along half a cosine, to 0 at the end of the run; "none": they stay
    clip: float = 1.0  # largest norm of a step's gradient
    batch: int = 1  # samples in one forward of each process; two rows each where the guided velocity is trained
    accumulate: int = 1  # forwards in one step
    blend_steps: int = 0  # steps over which linear layers lead over from dense attention; 0: linear from the first on
    noise: str = "schedule"  # noise levels: "schedule", the pipeline's own; "lognormal", as published
    # Weight of the error of v_u + g (v_c - v_u) beside that of v_u and v_c; 0: one branch is drawn for each sample.
    # None: 4 where the pipeline runs two branches, else 0. The guided error is divided by g^2 + (g-1)^2, so that at 1
    # it counts as much as the other where the branches' errors are independent, and next to nothing where they are
    # one. It is all that the sampler sees, hence more than 1; the other keeps each branch at its place.
    guided: float | None = None
    guidance: float | None = None  # g; None: the scale that the latents were made with
    below: float = 1.0  # the highest noise level to draw; a preset's dense_above: what is noisier stays dense in use
    ema: float = 0.99  # decay of the average of the weights; 0: none
    seed: int = 0
    precision: str = "no"  # "bf16": autocast
    checkpointing: bool = False  # compute activations again in the backward: less memory, a third more time
    held_out: int = 2  # the folder's last samples, on which the velocity error is measured
    save_minutes: float = 10.0  # between checkpoints

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UsageError("how long to train? give steps, minutes or both (what comes first ends the run)")
        for name in ("steps", "batch", "accumulate", "held_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value}: at least 1 is needed")
        for name in ("minutes", "rate", "projection_rate", "mix_rate", "clip", "guidance", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} = {value}: a positive number is needed")
        for name in ("weight_decay", "warmup", "blend_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: a number from 0 is needed")
        if self.guided is not None and not 0 <= self.guided < math.inf:
            raise UsageError(f"guided = {self.guided}: a number from 0 is needed, or nothing for what the model allows")
        if not 0 < self.below <= 1:
            raise UsageError(f"below = {self.below}: a noise level above 0 and up to 1 is needed")
        if self.decay not in DECAYS:
            raise unknown_name("decay of the rates", self.decay, DECAYS)
        if self.noise not in NOISES:
            raise unknown_name("distribution of noise levels", self.noise, NOISES)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)

    def share_of_dense(self, step: int) -> float:
        """How much of dense attention is in a linear layer's output at a step: it falls evenly, to 0 at `blend_steps`.

        Source: the progressive transfer of LinVideo, arXiv:2510.08318, whose share is learned; this one is a function
        of the step, so that a run that is gone on with sees what an uninterrupted one would have.
        """
        return max(0.0, 1 - (step + 1) / (self.blend_steps + 1))

    def lasting(self) -> dict[str, Any]:
        """What must be equal for a run to be gone on with: all but how long it is, and how often it is saved."""
        free = ("steps", "minutes", "save_minutes")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}

    def share_of_rate(self, step: int, progress: float) -> float:
        """What the rates are multiplied by at a step, when this share of the run is done."""
        risen = min(1.0, (step + 1) / max(self.warmup, 1))
        return risen * (0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0)

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done, by steps or minutes, whichever is more; from 1 on it is over."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        return max(by_steps, 0.0 if self.minutes is None else seconds / (60 * self.minutes))


def make_accelerator(precision: str, cpu: bool = False) -> Any:
    """accelerate's front door to one or many GPUs.

    Args:
        precision: "no" or "bf16".
        cpu: stay on the CPU where there is a GPU.

    Raises:
        EnvironmentProblem: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise EnvironmentProblem("fine-tuning needs accelerate: pip install 'dit-accel[training]'") from None
    # some families have weights in their last block that reach no output
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[unused])


@dataclass(frozen=True)
class Outcome:
    """The files of a run, by the transformer it trained: those of a pipeline's two experts share a folder."""

    folder: Path
    role: str = "transformer"

    @property
    def weights(self) -> Path:
        """Where method "sla" looks for this transformer's weights when it is given the folder."""
        return self.folder / f"{self.role}.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"checkpoint-{self.role}.safetensors"

    @property
    def record(self) -> Path:
        return self.folder / f"record-{self.role}.json"


class Distiller:
    """One run of self-distillation.

    Args:
        student: on the CPU or the accelerator's device.
        folder: the latents; made by a model of the same class.
        options: how to train.
        accelerator: as `make_accelerator` gives it.
        out: where the side file, the checkpoint and the record go.

    Raises:
        UsageError: latents of another model's class, a student without anything to train, or one whose linear layers
            would not be so by the end of the run.
        DitAccelError: too few samples.
        UsageError: as of `read_guidance`, where the guided velocity is trained, and of `Schedule.below`.
    """

    def __init__(
        self, student: Student, folder: LatentFolder, options: DistillOptions, accelerator: Any, out: Path
    ) -> None:
        name = type(student.transformer).__name__
        if folder.index.transformer != name:
            raise UsageError(
                f"{folder.folder} holds latents of a {folder.index.transformer}, and the student is a {name}; make "
                "latents with this model"
            )
        need_samples(folder, options.held_out + 1, f"training with {options.held_out} held out")
        if options.blend_steps and not student.sla.linear_layers:
            raise UsageError(f"blend_steps = {options.blend_steps} leads over to linear layers, and there are none")
        if options.steps is not None and options.steps < options.blend_steps:
            raise UsageError(
                f"steps = {options.steps} ends the run before its linear layers are linear, with step "
                f"{options.blend_steps} (blend_steps); give more steps, or fewer of those"
            )
        self.student, self.folder, self.options = student, folder, options
        self.accelerator, self.out = accelerator, Outcome(out, student.sla.options.role)
        self.dtype = student.transformer.dtype
        train = range(len(folder) - options.held_out)
        self.held_out = range(len(train), len(folder))
        self.guided = options.guided
        if self.guided is None:
            self.guided = GUIDED if count_branches(folder) == 2 else 0.0
        asked = folder, self.out.role, options.guidance
        # without a weight it is measured all the same, where there is one
        known = self.guided > 0 or options.guidance is not None or why_no_guidance(*asked) is None
        self.guidance = read_guidance(*asked) if known else None
        shared = dict(batch=options.batch, accumulate=options.accumulate, noise=options.noise, seed=options.seed)
        pairs = self.guidance if self.guided > 0 else None
        self.draws = Draws(folder, train, **shared, role=self.out.role, below=options.below, guidance=pairs)
        self._inputs = Ahead(self._make_inputs)
        if options.checkpointing:
            student.transformer.enable_gradient_checkpointing()
        student.place(accelerator.device)
        groups = self._group(student.trainable())
        # in the order in which the optimiser, and so a checkpoint, counts them
        self.parameters = {name: p for group in groups for name, p in group.items()}
        rates = (options.mix_rate, options.projection_rate, options.rate)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": list(group.values()), "lr": rate, "top": rate, "weight_decay": decay}
                for group, rate, decay in zip(groups, rates, (0.0, *[options.weight_decay] * 2), strict=True)
                if group
            ]
        )
        self.average = Average(self.parameters, options.ema)
        self.wrapped = accelerator.prepare(student)
        self.step, self.seconds, self.losses, self.before = 0, 0.0, [], None

    def resume(self) -> None:
        """Go on from the checkpoint in `out`.

        Raises:
            EnvironmentProblem: there is none, or it is damaged.
            UsageError: it is of other options or another model.
        """
        reached = load_checkpoint(self.out.checkpoint, self.parameters, self.optimiser, self.average, self._lasting())
        self.step, self.seconds, self.losses = reached.step, reached.seconds, list(reached.losses)
        self.before = reached.before

    def run(self, told: dict[str, Any], progress: Callable[[int, float], None] | None = None) -> dict[str, Any]:
        """Train until the time is up, or an interrupt; write the side file, the checkpoint and the record.

        Args:
            told: what else the record shall say.
            progress: called after each step with its number and its loss.

        Returns:
            The record; `interrupted` says whether an interrupt ended the run. There is no side file then, but the
            checkpoint to go on from.

        Raises:
            DitAccelError: a loss that is not finite.
        """
        self.measure_before()
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        with Interrupts() as interrupts, contextlib.closing(self._inputs):
            interrupted = False
            while not interrupted and (progress_now := self._progress(time.monotonic() - began)) < 1:
                loss, interrupted = self._take_step(progress_now, interrupts.came)
                self.seconds = time.monotonic() - began
                self.losses.append(loss)
                if progress is not None:
                    progress(self.step, loss)
                if time.monotonic() - saved > 60 * self.options.save_minutes:
                    self.save()
                    saved = time.monotonic()
            self.save()
            if interrupted:
                return {**told, "interrupted": True, "steps": self.step}
        with self.average.applied():
            after = self.measure().to_dict()
            record = {**told, **self._record(after), "interrupted": False}
            if self.accelerator.is_main_process:
                self._give_out(record)
        self.accelerator.wait_for_everyone()
        return record

    def measure_before(self) -> None:
        """Measure the velocity error of the untrained student, unless a checkpoint told it."""
        if self.before is None:
            self.before = self.measure().to_dict()

    def measure(self) -> VelocityError:
        """The velocity error on the held-out samples, each process its share of them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        levels = spread_levels(self.draws.schedule, LEVELS)
        told = dict(device=self.accelerator.device, dtype=self.dtype, seed=self.options.seed, guidance=self.guidance)
        return measure_velocity(
            make_cases(self.folder, self.held_out[rank::world], levels, **told),
            lambda inputs: self._velocity(self.student, inputs),
            lambda inputs: self._velocity(self.student.teacher, inputs),
            levels,
            device=self.accelerator.device,
            total=lambda sums: self.accelerator.reduce(sums, "sum"),
        )

    def save(self) -> None:
        """Write the checkpoint, on the first process."""
        if self.accelerator.is_main_process:
            reached = Progress(self.step, self.seconds, tuple(self.losses), self.before)
            known = (self.parameters, self.optimiser, self.average, reached, self._lasting())
            save_checkpoint(self.out.checkpoint, *known)

    def end(self) -> None:
        """Leave the other processes, after the last call of any of them: no step can be taken from here on.

        The copy that averages gradients goes first. Were it the last to hold the process group, it would wait for the
        group's threads with Python's lock in its hand, and those need that lock to drop a tensor: both would hang.
        """
        del self.wrapped
        self.accelerator.free_memory()  # its own reference, too
        gc.collect()  # the copy is in cycles with its hooks
        self.accelerator.end_training()

    def _take_step(self, progress: float, wants_end: bool) -> tuple[float, bool]:
        """One step of the optimiser: its loss over all processes, and whether any of them wants an end."""
        options, accelerator = self.options, self.accelerator
        losses = []
        for micro in range(options.accumulate):
            inputs = self._inputs.take((self.step, micro), self._following(micro))
            # the teacher first: where both are one model, the backward is the student's forward's
            aim = self._velocity(self.student.teacher, inputs).float()
            waits = micro + 1 < options.accumulate
            blended = self.student.sla.blended(options.share_of_dense(self.step))
            with blended, accelerator.no_sync(self.wrapped) if waits else contextlib.nullcontext():
                with accelerator.autocast():
                    given = self.wrapped(**inputs)
                loss = self._loss(given.float() - aim)
                accelerator.backward(loss / options.accumulate)
            losses.append(loss.detach())
        shared = torch.stack([torch.stack(losses).mean(), loss.new_tensor(float(wants_end))])
        mean, ends = accelerator.reduce(shared, "mean").tolist()
        if not math.isfinite(mean):
            raise DitAccelError(
                f"the loss of step {self.step + 1} is {mean}; start anew, in another folder, with a smaller --rate, "
                "--projection-rate or --mix-rate"
            )
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), options.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = group["top"] * options.share_of_rate(self.step, progress)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        return mean, ends > 0

    def _make_inputs(self, place: tuple[int, int]) -> dict[str, Any]:
        """The transformer's arguments for a micro-batch of a step, on the device."""
        accelerator = self.accelerator
        batch = self.draws.draw(*place, accelerator.process_index, accelerator.num_processes)
        return batch.inputs(accelerator.device, self.dtype)

    def _following(self, micro: int) -> tuple[int, int] | None:
        """The micro-batch behind one of this step; none behind the run's last."""
        options = self.options
        if micro + 1 < options.accumulate:
            return self.step, micro + 1
        return None if self.step + 1 == options.steps else (self.step + 1, 0)

    def _loss(self, error: Tensor) -> Tensor:
        """The loss of the velocities' errors `[B, ...]`, fp32: pairs of rows where the guided velocity counts."""
        plain = error.square().mean()
        if self.draws.guidance is None:
            return plain
        guidance = self.draws.guidance
        return plain + self.guided * guidance.combine(error).square().mean() / guidance.growth

    def _group(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
        """Those of mixes, of projections and of the transformer, by name."""
        own = {id(p) for p in self.student.sla.projections()}
        mixes = {name: p for name, p in parameters.items() if id(p) in own and name.endswith(".mix")}
        projections = {name: p for name, p in parameters.items() if id(p) in own and name not in mixes}
        rest = {name: p for name, p in parameters.items() if id(p) not in own}
        return [mixes, projections, rest]

    def _velocity(self, model: Callable[..., Tensor], inputs: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast(), torch.no_grad():
            return model(**inputs)

    def _progress(self, seconds: float) -> float:
        progress = self.options.progress(self.step, seconds)
        if self.options.minutes is None or self.accelerator.num_processes == 1:
            return progress
        # the first process' clock counts: one that stopped alone would hang the others
        shared = torch.tensor(progress, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.broadcast(shared, 0)
        return shared.item()

    def _lasting(self) -> dict[str, Any]:
        return {
            **self.options.lasting(),
            "guided": self.guided,
            "guidance": None if self.guidance is None else self.guidance.scale,
            "trains": self.student.trains,
            "sla": asdict(self.student.sla.options),
            "processes": self.accelerator.num_processes,
            "samples": len(self.folder),
        }

    def _record(self, after: dict[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {
            "steps": self.step,
            "seconds": round(self.seconds, 2),
            "losses": self.losses,
            "velocity_error": {"before": self.before, "after": after},
            "options": {**asdict(self.options), **self._lasting()},
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "index": self.folder.index.to_dict(),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }

    def _give_out(self, record: dict[str, Any]) -> None:
        self.out.folder.mkdir(parents=True, exist_ok=True)
        save_sla_weights(self.out.weights, self.student.sla.weights())
        with Stage() as stage:
            stage.write_text(self.out.record, json.dumps(record, indent=1) + "\n")
