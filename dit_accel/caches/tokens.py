"""Token cache: between two computed steps attention is held, and a share of the tokens passes through the MLPs anew.

Source: ToCa (arXiv 2410.05317) and DuCa (arXiv 2412.18911). ToCa chooses tokens by sums over the attention map, which
fast kernels do not make; DuCa by the size of their values, or at random. At a step that computes no attention there are
no values either: "norm" takes the tokens to which the block's MLP added most when it last computed them. "random" is
the control that such a choice must beat, and the default because this one has not (`docs/caches.md`). Published for
FLUX.1: interval 5, ratio .10. Three things differ from the published code: the interval is constant, all layers compute
the same share, and the staleness bound holds for every token (ToCa adds age to its score, which bounds nothing).

Every layer's outputs are kept, two or three tensors a layer and branch: `docs/caches.md` says how many GiB that is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.caches import cache as base
from dit_accel.caches.cache import Parts, View, need, number, whole

if TYPE_CHECKING:
    from torch import Tensor

SELECTORS = ("random", "norm", "staleness")


@dataclass(frozen=True)
class Cache(base.Cache):
    """Modules of all blocks, a fixed interval, outputs are held but for the chosen rows."""

    boundary: ClassVar[str] = "modules"

    threshold: float = 1.0  # of the share of an interval that is over
    warmup: int = 3
    interval: int = 4  # one step of so many is computed
    mlp_ratio: float = 0.1  # share of the image's or video's tokens that MLPs compute at a reused step
    # which tokens: "random"; "norm", those to which the MLP added most; "staleness", the oldest
    selector: str = "random"
    # Most steps for which a token's outputs serve. The oldest tokens are chosen first, a (max_stale + 1)th of all, also
    # where mlp_ratio is less. None: as long as no step is computed.
    max_stale: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        need(whole(self.interval) and self.interval >= 1, "interval", self.interval, "a whole number from 1 on")
        ratio, stale = self.mlp_ratio, self.max_stale
        need(number(ratio) and 0 <= ratio <= 1, "mlp_ratio", ratio, "a share from 0 to 1")
        need(self.selector in SELECTORS, "selector", self.selector, ", ".join(map(repr, SELECTORS)))
        need(stale is None or (whole(stale) and stale >= 1), "max_stale", stale, "a whole number from 1 on")

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        memory["since"] += 1
        return memory["since"] / self.interval

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        memory["since"] = 0

    @property
    def counts_age(self) -> bool:
        """Whether `choose` reads ages."""
        return self.selector == "staleness" or self.max_stale is not None

    def choose(self, kept: Tensor, age: Tensor | None, step: int, layer: int) -> Tensor:
        """The tokens that a block's MLP computes at a reused step.

        Args:
            kept: `[B, N, C]`, what the MLP gave for each token when it was last computed.
            age: int16 `[B, N]`, for how many steps these will have served if they are passed over; None where
                `counts_age` is false.
            step, layer: of the run; they seed what is random.

        Returns:
            int64 `[B, k]`, ascending, without repeats.
        """
        import torch

        from dit_accel.caches.parts.rows import chance_of, choose_rows

        batch, tokens, _ = kept.shape
        oldest = 0 if self.max_stale is None else math.ceil(tokens / (self.max_stale + 1))
        count = max(oldest, math.ceil(round(self.mlp_ratio * tokens, 6)))
        if self.selector != "norm" or age is not None:
            chance = chance_of(tokens, step, layer, kept.device).expand(batch, tokens)
            age = None if age is None else age + chance  # spreads equals over the picture
        if self.selector == "norm":
            score = torch.linalg.vector_norm(kept, dim=-1, dtype=torch.float32)
        else:
            score = chance if self.selector == "random" else age
        return choose_rows(score, age, count, oldest)

    def kept(self) -> dict[str, int]:
        return {"modules": 1, "ages": int(self.counts_age)}
