"""A sampler's run: from noise to latents, with two prompts."""

from __future__ import annotations

import uuid
from typing import Any

import torch
from torch import Tensor

from comfy.k_diffusion import sampling
from comfy.patcher_extension import WrapperExecutor, WrappersMP, wrappers_in


class CFGGuider:
    one_batch = True  # whether memory allows both prompts at once

    def __init__(self, model_patcher: Any) -> None:
        self.model_patcher, self.model_options = model_patcher, model_patcher.model_options
        self.cfg = 1.0

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.conds = [(conds[0][0], conds[0][1], uuid.uuid4()) for conds in (positive, negative)]

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any):
        before = self.model_options
        options = {**before["transformer_options"], "wrappers": self.model_patcher.wrappers}
        self.model_options = {**before, "transformer_options": options}
        wrappers = wrappers_in(options, WrappersMP.OUTER_SAMPLE)
        try:
            executor = WrapperExecutor(self.outer_sample, self, wrappers)
            return executor.execute(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self.model_options = before

    @torch.no_grad()
    def outer_sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Tensor | None = None,
        *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        self.given = {} if denoise_mask is None else {"denoise_mask": denoise_mask}
        self.model_options["transformer_options"]["sample_sigmas"] = sigmas
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent_image
        return sampler.sampler_function(self._outer_predict, x, sigmas, **sampler.extra_options)

    def _outer_predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        wrappers = wrappers_in(self.model_options["transformer_options"], WrappersMP.PREDICT_NOISE)
        return WrapperExecutor(self.predict_noise, self, wrappers).execute(x, sigma.repeat(len(x)), {}, None)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None) -> Tensor:
        sigma = timestep[0]
        wanted = (0, 1) if self.cfg != 1 else (0,)
        self.model_patcher.prepare_state(sigma)
        groups = [wanted] if self.one_batch else [(kind,) for kind in wanted]
        found = {}
        for group in groups:
            options = {**self.model_patcher.model_options["transformer_options"]}
            options |= self.model_options["transformer_options"]
            options |= {
                "cond_or_uncond": list(group), "uuids": [self.conds[kind][2] for kind in group],
                "sigmas": sigma.view(1),
            }  # fmt: skip
            each = [self.conds[kind][0].repeat(len(x), 1, 1) for kind in group]
            more = {name: torch.cat([self.conds[kind][1][name] for kind in group]) for name in self.conds[0][1]}
            out = self.model_patcher.model.apply_model(
                torch.cat([x] * len(group)), timestep.repeat(len(group)), c_crossattn=torch.cat(each),
                transformer_options=options, **more, **self.given,
            )  # fmt: skip
            found |= dict(zip(group, out.chunk(len(group)), strict=True))
        if len(wanted) == 1:
            return found[0]
        return found[1] + self.cfg * (found[0] - found[1])


class KSAMPLER:
    def __init__(self, sampler_function: Any, extra_options: dict[str, Any] | None = None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}


def sampler_object(name: str) -> KSAMPLER:
    return KSAMPLER(getattr(sampling, f"sample_{name}"))
