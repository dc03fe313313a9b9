"""sla: exact attention to the few best key blocks, and a learned linear attention for the rest."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError
from dit_accel.sla.spec import SlaSpec, check_variant, file_for, read_spec
from dit_accel.typed import check_type

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor, nn

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.sla.trained import Trained
    from dit_accel.trajectory import Call

logger = logging.getLogger("dit_accel")


@dataclass(frozen=True)
class Method:
    """Top-k of the logits between block means; `O = O_s + Proj(O_l)`, with one learned projection for each layer.

    O_s is attention to the chosen blocks. O_l is linear attention, with feature map `feature`, to the blocks that were
    not chosen ("complement") or to all keys ("all"). Of those not chosen, the share `negligible` of lowest scores is in
    neither part.

    What is not given is as the weights' file says. Without weights the linear part is off: SLA needs training, and this
    is plain top-k then, as `pooled` without its own block.

    Source: SLA, arXiv:2509.24006 ("complement", with critical, marginal and negligible blocks); its later code and
    TurboDiffusion ("all"); SLA2 (the mix that a file may hold). The published code rounds the number of blocks down,
    and to none on short sequences; here it is rounded up, as everywhere. Text blocks are always read.
    """

    rows_apart: ClassVar[bool] = True
    fixed: ClassVar[tuple[str, ...]] = ("variant", "feature", "weights", "as_trained")

    keep: float | None = None  # share of key blocks to read, forced ones included; else as the file says, or 0.1
    variant: str | None = None  # "complement" or "all"; else as the file says, or "complement"
    feature: str | None = None  # "softmax", "elu" or "relu"; else as the file says, or "softmax"
    negligible: float | None = None  # share of key blocks in neither part; else as the file says, or 0
    # a side file (dit_accel.sla.spec), a folder of them named by a pipeline's transformers, or the name of one that
    # ships; none: no linear part
    weights: str | os.PathLike | None = None
    as_trained: bool = True  # refuse another order or block than the weights were trained with
    neighbours: int | None = None  # also read blocks so near; 0 is the own block, none forces nothing
    first_frame: bool = False  # also read every block of the first frame

    def __post_init__(self) -> None:
        if self.weights is not None:
            check_type(self.weights, str | os.PathLike, "weights", "method 'sla'")
            object.__setattr__(self, "weights", str(self.weights))
        trained = self.trained
        for name in ("variant", "feature"):
            given = getattr(self, name)
            if trained is not None and given not in (None, getattr(trained, name)):
                raise UsageError(
                    f"{name}={given!r}, and the weights of {self.weights} were trained with "
                    f"{getattr(trained, name)!r}: leave {name} out, or give weights trained so."
                )
        known = trained or SlaSpec  # the class has its fields' defaults
        for name in ("keep", "variant", "feature", "negligible"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(known, name))
        check_variant(self.variant, self.feature, self.negligible)
        if self.neighbours is not None and self.neighbours < 0:
            raise UsageError(
                f"neighbours={self.neighbours} is not possible: neighbours is 0 or more, or none."
            )

    @cached_property
    def trained(self) -> SlaSpec | None:
        """What the weights were trained for; None without weights."""
        return None if self.weights is None else read_spec(self.weights)

    @property
    def arrangement(self) -> Arrangement:
        """As trained; without weights in full blocks of 128 neighbours."""
        known = self.trained or SlaSpec
        return Arrangement(known.order, known.block, known.tile)

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Choose the same number of key blocks for each query block.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.

        Returns:
            A plan of its own for every batch row and head.
        """
        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.force import forced_blocks
        from dit_accel.methods.parts.plans import plan_of
        from dit_accel.methods.parts.score import block_means, scores_of_means

        query_means, key_means = block_means(query, layout), block_means(key, layout)
        # The published code takes the mean of all keys from each first. That lowers all scores of a row alike: it saves
        # digits in bf16, and changes nothing here, where means and scores are fp32.
        scores = scores_of_means(query_means, key_means)
        forced = forced_blocks(layout, self.neighbours, self.first_frame)
        chosen = choose_blocks(scores, forced, self.keep, text_blocks=layout.n_text_blocks)
        plan = plan_of(*chosen, layout, key_means)
        least = math.floor(self.negligible * layout.n_video_blocks)
        return replace(plan, skipped=_lowest(scores, plan.to_mask(), least)) if least else plan

    def weights_for(
        self, transformer: nn.Module, layers: Collection[int], arrangement: Arrangement, role: str
    ) -> Trained | None:
        """The file's weights for one transformer; None without a file, which is said.

        Raises:
            EnvironmentProblem: a file that cannot be read.
            UsageError: weights that are not for this transformer, these layers or this arrangement.
        """
        if self.weights is None:
            logger.info(
                "method 'sla' has no trained weights, so its linear part is off and it is plain top-k: give weights=, "
                "or train some (docs/sla.md)"
            )
            return None
        from dit_accel.sla.trained import Trained
        from dit_accel.sla.weights import load_sla_weights

        if self.as_trained and arrangement != self.arrangement:
            raise UsageError(
                f"The weights of {self.weights} were trained with {self.arrangement}, and {arrangement} was asked for: "
                "leave order, block and tile out, or say as_trained=False to have it all the same."
            )
        weights = load_sla_weights(file_for(self.weights, role))
        self._check_role(weights.spec, role)
        return Trained(weights, transformer, layers, f"linear attention ({self.variant})")

    def _check_role(self, spec: SlaSpec, role: str) -> None:
        """Refuse what was trained for another of a pipeline's transformers, or differently from the first."""
        if spec.role not in (None, role):
            raise UsageError(
                f"The weights of {self.weights} were trained for a pipeline's {spec.role}, and this is its {role}: "
                "give a folder that holds transformer.safetensors and transformer_2.safetensors."
            )
        if self.trained is not None:
            for name in ("variant", "feature", "order", "block", "tile"):
                first, own = getattr(self.trained, name), getattr(spec, name)
                if first != own:
                    raise UsageError(
                        f"In {self.weights} {name} is {first!r} for transformer and {own!r} for {role}: train both "
                        "alike."
                    )

    def compensate(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        call: Call,
        weights: Trained | None,
    ) -> Tensor:
        """Join the linear part to the sparse one.

        Args:
            out: the sparse part, `[B, H, S, D]`, as are query, key and value; written over where nothing needs
                gradients.
            plan: what it has read.
            weights: of `weights_for`.

        Returns:
            Like `out`.
        """
        if weights is None:
            return out
        place = call.layer, call.first_head
        return weights.layers.add_linear(out, query, key, value, plan, *place, self.variant, self.feature)


def _lowest(scores: Tensor, read: Tensor, least: int) -> Tensor:
    """The so many key blocks of lowest score in each row that are not read, bool like scores; fewer if all others are.

    Of equal scores the higher index goes first, since the lower one is read first.
    """
    import torch

    ranked = scores.masked_fill(read, math.inf).flip(-1).sort(dim=-1, stable=True).indices[..., :least]
    lowest = torch.zeros_like(read).expand_as(scores).scatter(-1, scores.shape[-1] - 1 - ranked, True)
    return lowest & ~read
