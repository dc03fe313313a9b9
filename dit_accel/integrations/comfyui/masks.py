"""A look at which keys are read: one step of a model, with somebody watching."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.integrations.comfyui.patch import patch_on, put_settings
from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan
from dit_accel.quality.mask_pictures import draw_masks
from dit_accel.trajectory import Call

_MOST = 4  # heads that are drawn


def view_masks(
    model: Any, positive: Any, latent: dict[str, Any], layer: int, noise: float, seed: int
) -> Tensor:
    """Draw which key blocks some heads of a layer read in one step.

    Nothing but the step's own settings is changed: it is sparse whatever its noise level, size and place in the
    schedule, and computed whatever a cache would say.

    Args:
        model: ComfyUI's ModelPatcher, with sparse attention.
        positive: conditioning.
        latent: ComfyUI's, of the size to look at.
        layer: of the self-attentions; negative ones count from the last.
        noise: level of the step.
        seed: of the noise that is mixed in.

    Returns:
        `[1, H, W, 3]`, float 0 to 1.

    Raises:
        UsageError: no sparse attention, a layer that is not there, or one that does not run sparse.
    """
    patch = patch_on(model)
    if patch is None or patch.settings.sparse is None:
        raise UsageError(
            "Mask View was given a model without sparse attention: put a DiT-Accel Sparse or Preset node before it."
        )
    sparse = patch.settings.sparse.merged(
        dict(dense_above=1.0, dense_below=0.0, dense_first=0.0, min_tokens=0)
    )
    watcher = _Watcher(layer)
    watched = put_settings(model, dataclasses.replace(patch.settings, sparse=sparse, cache=None, region=None), watcher)
    _run_one_step(watched, positive, latent, noise, seed)
    if watcher.mask is None:
        raise UsageError(
            f"Layer {layer} read every key in this look, so there is no mask to show. "
            f"{patch_on(watched).describe()}"
        )
    return _as_image(
        watcher.draw(f"keys read in layer {watcher.layer}, {sparse.method}, noise level {noise:g}")
    )


class _Watcher:
    """Keeps the mask of the first sparse call of a layer."""

    def __init__(self, layer: int) -> None:
        self.layer, self.mask, self._heads = layer, None, 0

    def __call__(
        self, call: Call, layout: TokenLayout, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan
    ) -> None:
        if not -call.n_layers <= self.layer < call.n_layers:
            raise UsageError(
                f"layer={self.layer}, but this model has {call.n_layers} self-attentions: give 0 to "
                f"{call.n_layers - 1}, or -1 to {-call.n_layers} to count from the last."
            )
        self.layer %= call.n_layers
        if call.layer == self.layer and self.mask is None:
            self.mask = plan.to_mask()[0].expand(query.shape[2], -1, -1).cpu().numpy()

    def draw(self, title: str) -> Any:
        alike = all(np.array_equal(self.mask[0], mask) for mask in self.mask)
        heads = (
            [0]
            if alike
            else np.unique(np.linspace(0, len(self.mask) - 1, _MOST).round().astype(int)).tolist()
        )
        names = [f"all {len(self.mask)} heads are alike"] if alike else [f"head {head}" for head in heads]
        return draw_masks([[self.mask[head] for head in heads]], title, [""], names)


def _run_one_step(model: Any, positive: Any, latent: dict[str, Any], noise: float, seed: int) -> None:
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)  # so that the prompt alone is computed
    sigmas = torch.tensor([noise, 0.0])
    drawn = comfy.sample.prepare_noise(samples, seed)
    guider.sample(
        drawn, samples, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=seed
    )


def _as_image(picture: Any) -> Tensor:
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
