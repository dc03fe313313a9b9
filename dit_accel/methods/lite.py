"""lite: begin with everything, and drop for the rest of the run what a step found not to matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call


@dataclass(frozen=True)
class Method:
    """The attention kernel itself tells which key blocks mattered; those that did not are skipped from the next step
    on.

    A key block matters to a query block if in any row its largest score comes above `m + threshold`, m being the row's
    running maximum when the kernel comes to it (last block first), in powers of two. The first block that is visited is
    always kept. Nothing is predicted: the verdict costs a comparison in the kernel. Lists only become shorter, so what
    is read falls from step to step. Memory is kept for each transformer, branch and layer until the run ends; a step
    that runs densely tells nothing.

    Errors of early steps live on in all later ones, so the threshold may change with the noise level: from `threshold`
    at noise 1 to `last_threshold` at noise 0, in a straight line. Rules can set either by layer or noise level, too.

    Source: LiteAttention, arXiv:2511.11062. The published code shares one list between cond and uncond and keeps it
    into the next video; its lists hold one block more for each run of skipped ones.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("packed", 128)

    threshold: float = -10.0  # powers of two, at most 0: about what a weight may be below a row's largest
    last_threshold: float | None = None  # at noise level 0; none: the same
    neighbours: int | None = 0  # never skip blocks so near; 0 is the own block, none forces nothing
    first_frame: bool = False  # never skip a block of the first frame

    def __post_init__(self) -> None:
        for name in ("threshold", "last_threshold"):
            value = getattr(self, name)
            if value is not None and not value <= 0:
                raise UsageError(
                    f"{name}={value} is not possible: it is at most 0, in powers of two below a row's maximum, say -10."
                )
        if self.neighbours is not None and self.neighbours < 0:
            raise UsageError(
                f"neighbours={self.neighbours} is not possible: neighbours is 0 or more, or none."
            )

    def init_state(self, query: Tensor, layout: TokenLayout) -> dict[str, Tensor | None]:
        """Nothing has been skipped yet."""
        return {"bits": None}

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """What the calls before have left; everything in a run's first call, or where the branch is not known.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.
        """
        from dit_accel.kernels.bitmaps import unpack_lists
        from dit_accel.methods.parts.plans import full_plan

        plan = full_plan(layout, query.device)
        if state is None or state["bits"] is None:
            return plan
        counts, indices = unpack_lists(state["bits"], layout.n_blocks)
        return replace(plan, counts=counts, indices=indices)

    def threshold_at(self, call: Call) -> float:
        """The verdict's threshold at this call's noise level, in powers of two."""
        last = self.threshold if self.last_threshold is None else self.last_threshold
        return last + (self.threshold - last) * call.noise

    def learn(
        self,
        needed: Tensor,
        plan: BlockPlan,
        layout: TokenLayout,
        call: Call,
        state: dict[str, Tensor | None],
    ) -> None:
        """Keep what mattered for the next step.

        Args:
            needed: bool `[B, H, N, M]`, the verdict of each entry of the plan's lists.
        """
        from dit_accel.kernels.bitmaps import pack_lists
        from dit_accel.kernels.compaction import compact_lists
        from dit_accel.methods.parts.force import forced_blocks

        forced = forced_blocks(layout, self.neighbours, self.first_frame)
        forced = None if forced is None else forced.to(needed.device)
        state["bits"] = pack_lists(compact_lists(plan, needed, forced))
