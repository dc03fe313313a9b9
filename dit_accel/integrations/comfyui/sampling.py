"""Sampling: one run of a sampler. Its clock, its sparse attention, its step cache and its counts live as long as it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.attending import Observer
from dit_accel.caches.cache import View
from dit_accel.caches.decider import Decider
from dit_accel.forwards import method_of
from dit_accel.integrations.comfyui.families import find_family
from dit_accel.integrations.comfyui.region_forwards import GuidedChooser, SampledRegion, why_sampler
from dit_accel.integrations.comfyui.settings import Settings
from dit_accel.integrations.comfyui.sparse_forwards import SparseForwards
from dit_accel.options import SparseOptions
from dit_accel.region import Region
from dit_accel.report import Report, Tally
from dit_accel.trajectory import Context, Trajectory

ROLE = "transformer"
_NO_VELOCITY = "the model predicts no velocity, and caches are for those that do"
_NONE_TO_HOLD = "the model predicts no velocity that could be held"


class Sampling:
    """What is on a model while a sampler runs it.

    Args:
        settings: of its nodes.
        model: ComfyUI's BaseModel.
        steps: steps of the sampler's schedule.
        sampler: ComfyUI's.
        observer: told of each sparse call.

    Raises:
        UnknownModelError: a model of no known family.
        UsageError: layers that the model has not, or region sampling of a model that cannot.
    """

    def __init__(
        self, settings: Settings, model: Any, steps: int, sampler: Any, observer: Observer | None = None
    ) -> None:
        self._settings, self._diffusion = settings, model.diffusion_model
        self._family = find_family(self._diffusion)
        self._trajectory = Trajectory(told_steps=steps)
        self._tally = Tally.of(self._trajectory)
        sparse = settings.sparse
        method = None if sparse is None else method_of(sparse)
        slots = self._family.slots(self._diffusion)
        self._forwards = SparseForwards(
            sparse or SparseOptions(), method, self._trajectory, self._tally, ROLE, slots
        )
        self._forwards.observer = observer
        self._decider = None
        if settings.cache is not None:
            self._decider = Decider(settings.cache, self._trajectory, self._tally, ROLE)
            self._trajectory.on_new_run(self._decider.begin)
        self._region = None if settings.region is None else self._make_region(settings.region, model, sampler)
        self._labels: dict[Any, str] = {}  # of branches, by what ComfyUI tells them by
        self._began = time.perf_counter()
        self.seconds = 0.0

    def _make_region(self, region: Region, model: Any, sampler: Any) -> SampledRegion:
        why_never = why_sampler(sampler) if _predicts_velocity(model) else _NONE_TO_HOLD
        dtype = getattr(model, "manual_cast_dtype", None) or model.get_dtype()
        made = SampledRegion(
            self._forwards,
            GuidedChooser(region, self._trajectory),
            self._diffusion,
            self._family,
            dtype.itemsize,
            why_never,
        )
        self._forwards.region = made
        return made

    def close(self) -> Report:
        """Let go of everything but the counts, and say what they come to."""
        parts = (self._forwards, self._decider, self._region)
        held = sum(part.bytes_held() for part in parts if part is not None)
        report = self._tally.report(self._forwards.keep_requested, held)  # waits for the device
        self.seconds = time.perf_counter() - self._began
        self._forwards.clear()
        if self._decider is not None:
            self._decider.memory.clear()
        if self._region is not None:
            self._region.forget()
        return report

    def predict(
        self, executor: Callable[..., Tensor], x: Tensor, sigma: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        """A guider's prediction: what guidance makes of the calls of one step.

        Args:
            executor: the guider's.
            x: noisy latents `[B, C, (F,) H, W]`.
            sigma: noise level of each row.

        Returns:
            The latents without noise, as the guider sees them.
        """
        if self._region is None:
            return executor(x, sigma, *args, **kwargs)
        return self._region.predict(executor, x, sigma, args, kwargs)

    def apply(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor,
        concat: Tensor | None,
        text: Tensor,
        control: Any,
        options: dict[str, Any],
        given: dict[str, Any],
    ) -> Tensor:
        """One call of the model by the sampler: computed, or made up.

        Args:
            executor: the model.
            x: noisy latents `[B, C, (F,) H, W]`, without channels that condition them.
            sigma: noise level of each row, `[B]`, 0 to 1 for models that predict a velocity.
            concat: the channels that condition them.
            text: embeddings `[B, L, C]`.
            control: what a ControlNet adds.
            options: ComfyUI's `transformer_options`.
            given: the other conditioning, by name.

        Returns:
            The latents without noise, as the model sees them.
        """
        noise = min(1.0, float(sigma.max()))
        facts = self._family.facts(self._diffusion, x, noise, text, given)
        context = Context(self._branch(options), _step(options, noise))
        call = self._trajectory.enter(ROLE, facts, context, self._forwards.n_layers)

        def compute() -> Tensor:
            region = self._region
            if self._settings.sparse is None and region is None:
                return executor(x, sigma, concat, text, control, options, **given)
            active = None if region is None else region.enter(call, facts, x, control, options, given)
            self._forwards.enter(call, facts, x, text.shape[1], whole=active is None)
            override = self._forwards.override(options.get("optimized_attention_override"))
            changed = {**options, "optimized_attention_override": override}
            if active is not None:
                changed = region.stand_in(changed, active, facts.text_first)
            out = executor(x, sigma, concat, text, control, changed, **given)
            if region is not None:
                out = region.settle(x, sigma, out)
            self._forwards.leave()
            return out

        out = (
            compute()
            if self._decider is None
            else self._compute_or_make_up(compute, View(call, x), sigma, executor.class_obj)
        )
        self._trajectory.leave(ROLE)
        return out

    def _compute_or_make_up(
        self, compute: Callable[[], Tensor], view: View, sigma: Tensor, model: Any
    ) -> Tensor:
        """What a cache makes up is a velocity: that is what changes little from step to step."""
        decider = self._decider
        assert decider is not None
        if not _predicts_velocity(model):
            decider.count(view.call, False, _NO_VELOCITY)
            return compute()
        # a sampler may write over its latents
        view = View(view.call, view.x.detach().clone())
        verdict = decider.decide(view)
        level = sigma.view(-1, *(1,) * (view.x.ndim - 1)).to(view.x)
        if verdict.reuse:
            velocity = decider.cache.fill(view, verdict.memory)[0]
            decider.commit(verdict, view, None)
            if self._region is not None:
                self._region.pass_by(view.call, view.x)
            return view.x - level * velocity
        out = compute()
        velocity = None if verdict.entry is None else (view.x - out.detach()) / level
        decider.settle(verdict, view, None if velocity is None else (velocity, None))
        return out

    def _branch(self, options: dict[str, Any]) -> str | None:
        """What tells this call from others of its step: the prompts that its rows are for, and its part of a video."""
        kinds, names = options.get("cond_or_uncond"), options.get("uuids")
        if not kinds:
            return None
        window = options.get("context_window")
        part = "" if window is None else f" of frames {list(window.index_list)}"
        return "+".join(map(self._label, kinds, names or kinds)) + part

    def _label(self, kind: int, name: Any) -> str:
        if (kind, name) not in self._labels:
            count = sum(known == kind for known, _ in self._labels)
            label = {0: "cond", 1: "uncond"}.get(kind, f"cond of kind {kind}")
            self._labels[kind, name] = label if not count else f"{label} {count + 1}"
        return self._labels[kind, name]


def _step(options: dict[str, Any], noise: float) -> int | None:
    """Which step of its schedule the sampler is at: how many levels it has left behind."""
    levels: Sequence[float] | Tensor | None = options.get("sample_sigmas")
    if levels is None:
        return None
    return int((torch.as_tensor(levels).float() > noise * (1 + 1e-4) + 1e-7).sum())


def _predicts_velocity(model: nn.Module) -> bool:
    """Whether what the model gives is its input less noise level times velocity."""
    return any(cls.__name__ == "CONST" for cls in type(model.model_sampling).__mro__)
