"""A sampler's run: from noise to latents, with two prompts."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

import torch
from torch import Tensor

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
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.model_options["transformer_options"]["sample_sigmas"] = sigmas
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent_image
        return sampler(self._predict, x, sigmas)

    def _predict(self, x: Tensor, sigma: Tensor) -> Tensor:
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
            text = torch.cat([self.conds[kind][0] for kind in group])
            more = {name: torch.cat([self.conds[kind][1][name] for kind in group]) for name in self.conds[0][1]}
            rows = len(group)
            out = self.model_patcher.model.apply_model(
                torch.cat([x] * rows), sigma.repeat(rows), c_crossattn=text, transformer_options=options, **more
            )
            found |= dict(zip(group, out.chunk(rows), strict=True))
        if len(wanted) == 1:
            return found[0]
        return found[1] + self.cfg * (found[0] - found[1])


def sampler_object(name: str) -> Any:
    assert name == "euler"
    return _euler


def _euler(predict: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for now, then in itertools.pairwise(sigmas):
        x = x + (x - predict(x, now)) / now * (then - now)
    return x
