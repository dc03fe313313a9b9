"""random: as many blocks as a real method would read, chosen by lot. A control for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call


@dataclass(frozen=True)
class Method:
    """Blocks drawn anew for each step, branch, layer, head and query block; forced ones as in `pooled`."""

    rows_apart: ClassVar[bool] = True

    keep: float  # share of key blocks to read, forced ones included
    neighbours: int | None = 0  # also read blocks so near; 0 is the own block, none forces nothing
    first_frame: bool = False  # also read every block of the first frame
    seed: int = 0  # another seed, another draw; equal seeds draw the same blocks in every run

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Draw a plan. Rows of a batch share it, so that a row's result does not depend on its neighbours."""
        import torch

        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.force import forced_blocks
        from dit_accel.methods.parts.plans import plan_of

        # drawn on the CPU: a GPU's generator would draw other blocks
        place = f"{self.seed} {call.role} {call.branch} {call.step} {call.layer}"
        generator = torch.Generator().manual_seed(int.from_bytes(_digest(place), "little"))
        # heads before ours are drawn too: a head has the same lot on however many processes
        heads = call.first_head + query.shape[2]
        scores = torch.rand(1, heads, layout.n_blocks, layout.n_blocks, generator=generator)
        scores = scores[:, call.first_head :]
        forced = forced_blocks(layout, self.neighbours, self.first_frame)
        scores = scores.to(query.device)
        return plan_of(*choose_blocks(scores, forced, self.keep, text_blocks=layout.n_text_blocks), layout)


def _digest(text: str) -> bytes:
    import hashlib

    return hashlib.blake2b(text.encode(), digest_size=7).digest()
