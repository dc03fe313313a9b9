"""SparseAttention: for hosts that hand over query, key and value, and little else.

A serving engine's attention slot knows no layer, no branch of guidance and no noise level. What needs these is refused
when it is asked for. What is left is a function of one call: predict a plan from its queries and keys, attend by it,
and count what ran. diffusers is not needed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.arrangement import arrange
from dit_accel.attending import Attending, Laid
from dit_accel.errors import UsageError
from dit_accel.forwards import method_of
from dit_accel.guards import Guards
from dit_accel.layouts import Layouts
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.planner import Planner
from dit_accel.report import Report, Tally
from dit_accel.roles import ROLES
from dit_accel.trajectory import Call, Context, Facts, Trajectory, segments_of

logger = logging.getLogger("dit_accel")

_ROLE = "transformer"
# Options by what a call would have to tell for them to mean anything.
_NEEDS = {
    "its layer": ("dense_layers",),
    "its noise level": ("dense_above", "dense_below", "predict_drift"),
    "its layer or noise level": ("rules",),
    "its layer and branch, to remember a plan by": ("predict_every", "share_plans", "drift_every"),
    "its transformer": ROLES,
}
_UNTOLD_STEP = "dense_first is set, and the host tells no step"
_NO_GRID = "the method looks at places, and the tokens are not known to be a grid"
_GRADIENTS = "gradients are needed, and the sparse kernels have no backward"


class SparseAttention:
    """Attend sparsely, call by call.

    Args:
        options: as `SparseOptions` has them, and the method's own. Those that speak of layers, noise levels, branches
            or transformers are refused, and so are methods that learn from step to step or have trained weights.

    Raises:
        UsageError: such an option or method, or a value outside its range.
        UnknownNameError: a name that is neither an option nor one of the method's own.
    """

    def __init__(self, **options: Any) -> None:
        self.options = _check(SparseOptions.from_mapping(options))
        self.method = _load(self.options)
        self._trajectory = Trajectory()
        self._tally = Tally.of(self._trajectory)
        planner = Planner(self.options, self.method, self._trajectory, self._tally, n_layers=1)
        self._layouts = Layouts(arrange(self.method, self.options))
        guards = Guards(self.options, planner, self._trajectory)
        self._attending = Attending(self.options, planner, self._layouts, self._tally, guards)
        self._call: Call | None = None  # of the run under way

    def begin(self) -> None:
        """Note that the next call is the first of a run: what failed in the one before is tried again."""
        self._call = None

    # A host's compiled blocks go around it: grid, step and plan change from call to call.
    @torch.compiler.disable(recursive=True)
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: tuple[int, int, int] | None = None,
        step: int | None = None,
        steps: int | None = None,
        scale: float | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend: sparsely where nothing speaks against it, else densely by torch, counted with the reason.

        Args:
            query: `[B, S, H, D]`, post-RoPE; key and value may have other S and fewer heads, and are then attended to
                densely.
            grid: frames, rows and columns that the tokens are, in raster order; None, or one that they do not fill:
                they are a line.
            step: denoising step from 0; one that is lower than the call's before begins a new run.
            steps: how many there are.
            scale: of the logits; None: one over the square root of D.

        Returns:
            `[B, S, H, D]`, in the tokens' order.

        Raises:
            FallbackError: under `strict`, if the call would run dense unplanned.
            KernelUnavailable: if an executor was asked for by name and cannot run this.
        """
        tokens = query.shape[1]
        if grid is not None and math.prod(grid) != tokens:
            grid = None
        call = {"attn_mask": None, "dropout_p": 0.0, "is_causal": is_causal, "scale": scale}
        call["enable_gqa"] = query.shape[2] != key.shape[2]
        now = self._enter(grid or (1, 1, tokens), step)
        reason = self._why_dense((query, key, value), grid, step, steps, is_causal)
        if reason is not None:
            self._attending.count_dense(*reason, 1)
            return self._attending.attend_densely(_TORCH, query, key, value, reason[1], call)
        order = "raster" if grid is None else self._layouts.arrangement.order
        layout = self._layouts.find(now.grid, order, query.device, 0, False, False, 1)
        self._tally.token_orders[order if grid else "raster: no grid is known"] += 1
        query, key, value = (layout.apply(x, dim=1) for x in (query, key, value))
        out = self._attending.attend_sparsely(query, key, value, call, now, Laid(layout, (), None), _TORCH)
        return layout.undo(out, dim=1)

    def report(self) -> Report:
        """What ran since this was built. Layers are not known: all calls count as layer 0."""
        return self._tally.report(getattr(self.method, "keep", None), self._layouts.bytes_held())

    def _enter(self, grid: tuple[int, int, int], step: int | None) -> Call:
        # Neither the noise level nor the branch is known, and nothing that looks at them got past `_check`.
        facts = Facts(timestep=0.0, grid=grid, shape=grid, condition=None)
        before = self._call
        if before is None or (step is not None and step < before.step):
            if before is not None:  # a run's end is not told, only that another began
                logger.info(f"until now: {self.report().closing_line}")
            self._trajectory.begin()
            before = self._trajectory.enter(_ROLE, facts, Context(), n_layers=1).at(0)
            self._trajectory.leave(_ROLE)
        self._call = dataclasses.replace(before, step=step or 0, grid=grid, segments=segments_of(facts, 0))
        return self._call

    def _why_dense(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        grid: tuple[int, int, int] | None,
        step: int | None,
        steps: int | None,
        is_causal: bool,
    ) -> tuple[str, bool] | None:
        """Why a call is dense, and whether that was planned; or None."""
        query, key, _ = qkv
        if query.shape != key.shape:
            return "queries and keys of different shape", False
        least = self.options.least_tokens(query.device.type)
        if query.shape[1] < least:
            return f"fewer than {least} tokens, where dense is faster", True
        if is_causal:
            return "causal attention or dropout", False
        if self.options.dense_first and (step is None or steps is None):
            return _UNTOLD_STEP, False
        if self.options.dense_first and step < self.options.n_dense_first(steps):
            return f"one of the first {self.options.dense_first:.3g} of the steps", True
        if grid is None and getattr(self.method, "needs_grid", False):
            return _NO_GRID, False
        if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
            return _GRADIENTS, False
        return None


class _Torch:
    """Dense attention by torch, where a host has attention of its own (`forwards.Place`)."""

    layer = 0
    title = "torch"
    splits = False

    def dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        """As the dispatcher would; all `[B, S, H, D]`."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        known = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **known).transpose(1, 2)

    dense_whole = dense


_TORCH = _Torch()


def _check(options: SparseOptions) -> SparseOptions:
    """The options, none of which needs more than a bare call tells.

    Raises:
        UsageError: one that does.
    """
    plain = SparseOptions(method=options.method)
    for needed, names in _NEEDS.items():
        for name in names:
            given = options.roles.get(name) if name in ROLES else getattr(options, name)
            if given != (None if name in ROLES else getattr(plain, name)):
                raise UsageError(
                    f"{name}={given!r} is not possible here: the host hands over a call without {needed}. Leave it "
                    "out; dense_first=0.2 keeps the first fifth of the steps dense."
                )
    return options


def _load(options: SparseOptions) -> Method:
    """The method.

    Raises:
        UsageError: one that needs more than a bare call tells.
    """
    method = method_of(options)
    why = "learns from step to step" if hasattr(method, "learn") else None
    why = "has weights trained for one transformer" if hasattr(method, "weights_for") else why
    if why is not None:
        raise UsageError(
            f"Method {options.method!r} is not possible here: it {why}, and the host hands over calls without a layer. "
            "Take 'pooled', 'rectified' or 'sparge'."
        )
    return method
