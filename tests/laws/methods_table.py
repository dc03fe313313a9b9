"""Methods under the laws. A new one adds a line to `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel.methods import load_method, sla
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.trained import Trained
from dit_accel.sla.weights import LayerWeights, SlaWeights


@dataclass(frozen=True)
class Remember:
    """A method with memory, to catch state that leaks: half of each score is that of the step before."""

    keep: float

    def init_state(self, query: torch.Tensor, layout: Any) -> dict[str, Any]:
        return {"scores": None, "owner": None}

    def predict(self, query: torch.Tensor, key: torch.Tensor, layout: Any, call: Any, state: Any) -> Any:
        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.plans import plan_of
        from dit_accel.methods.parts.score import block_means, mean_scores

        scores = mean_scores(query, block_means(key, layout), layout)
        if state is not None:
            owner = (call.run, call.role, call.branch, call.layer)
            assert state["owner"] in (None, owner), (
                "this state was made by another run, role, branch or layer"
            )
            state["owner"] = owner
            if state["scores"] is not None:
                scores = (scores + state["scores"]) / 2
            state["scores"] = scores
        return plan_of(*choose_blocks(scores, None, self.keep), layout)


@dataclass(frozen=True)
class TrainedSla(sla.Method):
    """SLA with a random projection in each layer, whatever the transformer."""

    def weights_for(self, transformer: torch.nn.Module, layers: Any, arrangement: Any, role: str) -> Trained:
        shape = attention_shape(transformer)
        spec = SlaSpec(len(shape.layers), shape.head_size, keep=self.keep)
        generator = torch.Generator().manual_seed(0)
        size = shape.head_size

        def projection() -> LayerWeights:
            # Without a bias, which is there also where no key is left for the linear part.
            return LayerWeights(torch.randn(size, size, generator=generator) / size, torch.zeros(size))

        return Trained(SlaWeights(spec, {layer: projection() for layer in layers}), transformer, layers, "linear")


# `random` is a control: it draws anew for each branch name. At 1.0 each reads everything; below, about as much as the
# number says.
METHODS: dict[str, Callable[[float], Any]] = {
    "pooled": lambda keep: load_method("pooled", keep=keep),
    "remember": Remember,
    "lite": lambda keep: load_method("lite", threshold=-1e4 if keep == 1 else -0.5),
    "rectified": lambda keep: load_method("rectified", keep=keep, top_p=0.1, neighbours=None, anchor=False),
    "sparge": lambda keep: load_method("sparge", keep=keep),
    "sparge-l1": lambda keep: load_method("sparge", l1=0.4, keep=1.0 if keep == 1 else None),
    "svg1": lambda keep: load_method("svg1", keep=keep),
    "svg2": lambda keep: load_method("svg2", keep=keep),
    "nabla": lambda keep: load_method("nabla", top_p=keep, keep=keep),
    "radial": lambda keep: load_method("radial", **({"decay_factor": 100, "vote": 0} if keep == 1 else {})),
    "neighborhood": lambda keep: load_method("neighborhood", window=[1.0 if keep == 1 else 0.6] * 3),
    "sla": TrainedSla,
    "clear": lambda keep: load_method("clear", radius=100 if keep == 1 else 3),
}
# Under every law on every family; the others on the first, and under law 1 on all. What differs between families is
# the host, not the method.
EVERYWHERE = ("pooled", "remember", "lite", "svg2")
