"""Block-sparse attention that can be trained through."""

from __future__ import annotations

from torch import Tensor

from dit_accel.plan import BlockPlan

from .api import Layout, validate


def block_sparse_trainable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    layout: Layout = "bhsd",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `block_sparse` in full precision, and differentiable in q, k and v, through out and through lse.

    It keeps q, k, v, out, lse and the plan for the backward; what the backward holds besides is
    `backward.workspace_bytes`. A row that reads nothing gives no gradient, whatever it is given. The plan itself is not
    differentiated, and gradients have no gradients. Equal inputs give bitwise equal gradients. To torch.compile the
    forward and the backward are one opaque operator each.

    Args:
        q, k, v: as in `block_sparse`, but layout "bhsd" is the default; float64 for "reference" and "cpu".
        plan: as in `block_sparse`, orders included.
        scale: factor of the scores; None is `D ** -0.5`.
        impl: of the forward, as in `block_sparse`. The backward is "reference" where the forward is "reference" or
            "cpu", else "triton".

    Returns:
        `out`, shaped and typed like q, and `lse [B, H, S]`, as `block_sparse`.

    Raises:
        UsageError: shapes, types, devices or the plan do not fit together; or, from the backward, a gradient of a
            gradient is asked for.
        UnknownNameError: no such implementation or layout.
        KernelUnavailable: the named implementation cannot run this call, or the backward cannot.
    """
    from .trainable_op import attend

    q, k, v, scale = validate(q, k, v, plan, scale, layout)
    out, lse = attend(q, k, v, plan, scale, impl)
    return (out.transpose(1, 2) if layout == "bshd" else out), lse
