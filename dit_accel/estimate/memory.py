"""Memory: bytes of weights, of a forward's peak, and of what the fast path holds beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dit_accel.caches import Cache
from dit_accel.estimate.architectures import FLUX, HUNYUAN, WAN, Published
from dit_accel.estimate.count import Work
from dit_accel.estimate.timing import BYTES, Sparse
from dit_accel.options import SparseOptions
from dit_accel.region.options import Region

_FLOAT32 = 4
# Tensors of `[tokens, channels]` that are alive at a forward's peak, in the model's dtype. FLUX.1 and HunyuanVideo: in
# a single block, where queries get their positions, beside the feed-forward's 4. Stable Diffusion 3: at the activation.
_FLUX_ALIVE, _HUNYUAN_ALIVE = 17, 18
_SD3_ALIVE, _SD3_TEXT_ALIVE = 13, 3
_WAN_ALIVE, _WAN_RESIDUAL = 4, 11  # at the activation, beside twice the feed-forward; at the last residual in float32


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU while a transformer runs. Text encoders and the autoencoder are not in it."""

    weights: int  # of all transformers
    activations: int  # of a dense forward, at its peak
    plans: int  # layouts, and plans kept between steps
    cache: int
    region: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.plans + self.cache + self.region


def weight_bytes(work: Work) -> int:
    """Of one transformer: its products' matrices and biases. Norms and small tables, under 1 %, are left out."""
    return BYTES * sum((product.inner + 1) * product.outer * product.times for product in work.products)


def activation_bytes(model: Published, work: Work) -> int:
    """The peak of a dense forward above its weights and arguments."""
    d = model.width
    unit = BYTES * d
    positions = 2 * _FLOAT32 * work.head_dim  # a cosine and a sine for each channel of a head
    if model.transformer == WAN:
        alive = max(_WAN_ALIVE + 2 * model.config["ffn_dim"] / d, _WAN_RESIDUAL)
        return round(work.tokens * (work.batch * alive * unit + positions))
    if model.transformer in (FLUX, HUNYUAN):
        alive = _FLUX_ALIVE if model.transformer == FLUX else _HUNYUAN_ALIVE
        return work.joint * (work.batch * alive * unit + positions)
    return work.batch * unit * (_SD3_ALIVE * work.tokens + _SD3_TEXT_ALIVE * work.text)


def plan_bytes(options: SparseOptions, work: Work, calls: Iterable[Sparse], branches: int) -> int:
    """Layouts, and as bitmaps the plans that serve several steps.

    Args:
        calls: of the layers that are sparse in any step.
        branches: of guidance, each with plans of its own unless they share them.
    """
    calls = list(calls)
    if not calls:
        return 0
    blocks = calls[0].blocks
    layout = 16 * work.tokens + 2 * blocks**2  # places both ways as int64; which blocks touch
    if options.predict_every == 1 and not options.share_plans:
        return layout
    plan = work.batch * work.heads * blocks * math.ceil(blocks / 32) * 4
    return layout + plan * len(calls) * (1 if options.share_plans else branches)


def region_bytes(region: Region, work: Work, branches: int) -> int:
    """Keys and values of all tokens."""
    if region.keys == "drop":
        return 0
    layers = work.layers if region.layers is None else min(region.layers, work.layers)
    return 2 * BYTES * layers * branches * work.batch * work.joint * work.heads * work.head_dim


def cache_bytes(cache: Cache, model: Published, work: Work, branches: int) -> int:
    """The most that a step cache keeps, by what it says that it keeps."""
    kept, d = cache.kept(), model.width
    f, h, w = model.patch
    channels = model.config.get("out_channels") or model.config["in_channels"]
    if model.transformer == FLUX:
        f = h = w = 1  # its channels are those of a packed token
    text = work.text or model.text
    each = {
        "latents": work.tokens * f * h * w * channels * BYTES,
        "hidden": work.tokens * d * BYTES,
        "text": text * d * BYTES if work.text else 0,
        "time": 6 * d * BYTES,
        "figures": _FLOAT32,
        # an attention's and an MLP's output of every block, Wan's cross-attention too
        "modules": work.layers * work.joint * d * BYTES * (3 if model.transformer == WAN else 2),
        "ages": work.layers * work.tokens,
    }
    return branches * work.batch * sum(number * each[kind] for kind, number in kept.items())
