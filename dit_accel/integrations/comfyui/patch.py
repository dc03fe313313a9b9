"""Patch: what is on a model of ComfyUI, put there without touching it.

A model carries wrappers around its sampling, its guider's predictions and each call of it. The attention override is
made anew for every call, at the last moment before the model runs: behind whatever other nodes put there, at sampling
or in its course, and in front of it. So it cannot be lost to them, nothing of it is copied along with a model's
options, and nothing outlives a sampling but its report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import WrappersMP

from dit_accel.attending import Observer
from dit_accel.integrations.comfyui.families import find_family
from dit_accel.integrations.comfyui.sampling import Sampling
from dit_accel.integrations.comfyui.settings import Settings
from dit_accel.report import Report

KEY = "dit_accel"


class Patch:
    """One model's settings, and what came of its latest sampling. Clones of the model share it."""

    def __init__(self, settings: Settings, observer: Observer | None = None) -> None:
        self.settings, self._observer = settings, observer
        self.report: Report | None = None  # of the latest sampling
        self.samplings = 0
        self._seconds, self._size, self._outside = 0.0, "", 0

    def put_on(self, model: Any) -> None:
        model.set_attachments(KEY, self)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self._around_sampling())
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self._around_prediction())
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._around_call())

    def describe(self) -> str:
        """The report of the latest sampling."""
        lines = [f"DiT-Accel, {self.settings.title}"]
        if self.report is None:
            lines.append("No sampler has run this model yet.")
        else:
            lines.append(f"sampling {self.samplings} of this model: {self._size}, {self._seconds:.2f} s")
            lines.append(str(self.report))
        if self._outside:
            lines.append(
                f"  left alone, because no sampler of ComfyUI ran them: {self._outside} calls of the model"
            )
        return "\n".join(lines)

    # ComfyUI copies what a model carries, and functions alone stay what they are.

    def _around_sampling(self) -> Callable[..., Any]:
        def sample(
            executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args, **kwargs
        ) -> Any:
            guider = executor.class_obj
            before = guider.model_options
            model = guider.model_patcher.model
            sampling = Sampling(self.settings, model, len(sigmas) - 1, sampler, self._observer)
            options = {**before.get("transformer_options", {}), KEY: sampling}
            guider.model_options = {**before, "transformer_options": options}
            try:
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            finally:
                guider.model_options = before
                self.report = sampling.close()
                self.samplings += 1
                self._seconds, self._size = (
                    sampling.seconds,
                    f"latents {list(noise.shape)}, {len(sigmas) - 1} steps",
                )

        return sample

    def _around_prediction(self) -> Callable[..., Any]:
        def predict(executor: Any, x: Any, timestep: Any, *args, **kwargs) -> Any:
            sampling = executor.class_obj.model_options.get("transformer_options", {}).get(KEY)
            if sampling is None:
                return executor(x, timestep, *args, **kwargs)
            return sampling.predict(executor, x, timestep, args, kwargs)

        return predict

    def _around_call(self) -> Callable[..., Any]:
        def apply(
            executor: Any,
            x: Any,
            t: Any,
            c_concat=None,
            c_crossattn=None,
            control=None,
            transformer_options=None,
            **given,
        ) -> Any:
            options = transformer_options or {}
            sampling = options.get(KEY)
            if sampling is None:
                self._outside += 1
                return executor(x, t, c_concat, c_crossattn, control, options, **given)
            return sampling.apply(executor, x, t, c_concat, c_crossattn, control, options, given)

        return apply


def put_settings(model: Any, settings: Settings | None, observer: Observer | None = None) -> Any:
    """A clone of a model with these settings in place of those it had; None, or settings that are off, leave none.

    Args:
        model: ComfyUI's ModelPatcher.
        observer: told of each sparse call.

    Raises:
        UnknownModelError: settings for a model of no known family.
    """
    off = settings is None or settings.is_off
    if not off:
        find_family(model.model.diffusion_model)
    model = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.APPLY_MODEL):
        model.remove_wrappers_with_key(kind, KEY)
    model.remove_attachments(KEY)
    if not off:
        Patch(settings, observer).put_on(model)
    return model


def change_settings(model: Any, **parts: Any) -> Any:
    """A clone of a model with some of its settings replaced; `parts` as the fields of `Settings`."""
    patch = patch_on(model)
    had = Settings() if patch is None else patch.settings
    return put_settings(model, dataclasses.replace(had, **parts, title=Settings.title))


def patch_on(model: Any) -> Patch | None:
    """What DiT-Accel's nodes put on a model."""
    return model.get_attachment(KEY)


def report_on(model: Any) -> str:
    """What ran in a model's latest sampling, as a text."""
    patch = patch_on(model)
    if patch is None:
        return "DiT-Accel is off: every attention and every step of this model is ComfyUI's own."
    return patch.describe()
