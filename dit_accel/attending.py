"""Attending: one self-attention, sparse by the plan that the planner has for it, or dense."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.errors import FallbackError
from dit_accel.guards import Attended, Guards
from dit_accel.layout import TokenLayout
from dit_accel.layouts import Layouts
from dit_accel.methods import Weights
from dit_accel.options import SparseOptions
from dit_accel.plan import BlockPlan
from dit_accel.planner import Planner
from dit_accel.report import Tally
from dit_accel.rows import RowGroup
from dit_accel.trajectory import Call

if TYPE_CHECKING:
    from dit_accel.forwards import Place

logger = logging.getLogger("dit_accel")
# Told of each sparse call, or group of rows in one, before it runs: where it is, its layout, query, key and value
# [B, S, H, D], and its plan.
Observer = Callable[[Call, TokenLayout, Tensor, Tensor, Tensor, BlockPlan], None]


@dataclass(frozen=True)
class Laid:
    """How a forward's tokens lie, and who is told of its plans."""

    layout: TokenLayout  # of the first group of rows
    groups: tuple[RowGroup, ...]  # its rows by their padding; none: calls have no mask
    observer: Observer | None


class Attending:
    """How a transformer's self-attentions are computed.

    Args:
        options: what was asked for.
        planner: has the plans.
        layouts: of the tokens.
        tally: counts what ran.
        guards: look after sparse and linear calls.
        weights: the method's trained ones, if it has any.
    """

    def __init__(
        self,
        options: SparseOptions,
        planner: Planner,
        layouts: Layouts,
        tally: Tally,
        guards: Guards,
        weights: Weights | None = None,
    ) -> None:
        self.options, self.planner, self.layouts, self.tally = options, planner, layouts, tally
        self.guards, self.weights = guards, weights
        self._full: tuple[tuple, BlockPlan] | None = None  # reads everything; for the tokens seen last
        self._configs: dict[tuple, Any] = {}  # of the Triton kernel, by kind of call
        self._said: set[str] = set()

    def clear(self) -> None:
        """Forget what belongs to the tokens seen last."""
        self._full = None

    # -- guarded

    def attend_guarded(
        self,
        compute: Callable[[], Attended],
        seat: Place,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        now: Call,
    ) -> Tensor:
        """What `compute` attends, counted; dense attention, counted with the reason, where the guards say so.

        Args:
            query: `[B, S, H, D]`, post-RoPE, of whole sequences; as are key and value.
            call: the dispatcher's other arguments.

        Raises:
            FallbackError: under `strict`, in place of dense attention.
        """

        def dense(query: Tensor) -> Tensor:
            return seat.dense_whole(query, key, value, **call)

        if self.weights is not None and self.weights.trains:
            done = compute()  # nothing is put right behind an optimiser's back: training looks at its loss
        else:
            done = self.guards.attempt(compute, dense, (query, key, value), now, self.tally)
        if isinstance(done, str):
            self.count_dense(done, False, 1)
            return self.attend_densely(seat, query, key, value, False, call, whole=True)
        if done.read is None:
            self.tally.note_linear(now, done.title)
        else:
            self.tally.note_sparse(now, done.title, done.read, done.present)
        return done.out

    def count_dense(self, reason: str, planned: bool, calls: int) -> None:
        """Count dense calls and why they are.

        Raises:
            FallbackError: under `strict`, if that was not planned.
        """
        if not planned and self.options.strict:
            raise FallbackError(
                f"strict=True, and {calls} self-attention call(s) would run dense: {reason}. "
                "Remove the cause, or set strict=False to let them."
            )
        self.tally.note_dense(reason, planned, calls)

    # -- sparse

    def attend_sparsely(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        now: Call,
        laid: Laid,
        seat: Place,
    ) -> Tensor:
        """Attend to all tokens of a forward, with all heads of this process.

        Args:
            query: `[B, S, H, D]`, post-RoPE; as are key and value.
            call: the dispatcher's other arguments.
            now: which call this is.
            laid: of the forward.
            seat: attends densely where that fails.

        Returns:
            `[B, S, H, D]`; zeros where there is padding.
        """
        layout, text = laid.layout, laid.layout.text
        if not laid.groups and text and query.shape[1] == layout.n_video_tokens:
            text = 0  # the text takes no part in this attention
            now = dataclasses.replace(now, segments=(("video", 0, layout.n_video_tokens),))

        def compute() -> Attended:
            if laid.groups:
                return self._attend_groups(query, key, value, call, now, laid)
            return Attended(*self._attend_rows(query, key, value, call, now, text, laid))

        return self.attend_guarded(compute, seat, query, key, value, call, now)

    def _attend_groups(
        self, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any], now: Call, laid: Laid
    ) -> Attended:
        """Attend in each group of rows by itself; zeros where there is padding."""
        whole, titles, read, present = None, {}, 0, 0
        for group in laid.groups:
            out, title, *counts = self._attend_group(group, query, key, value, call, now, laid)
            titles[title] = None
            read, present = read + counts[0], present + counts[1]
            if group.is_everything:
                whole = out
            else:
                # padding attends to nothing
                whole = out.new_zeros(*query.shape[:3], out.shape[3]) if whole is None else whole
                group.put(out, whole)
        return Attended(whole, " and ".join(titles), read, present)

    def _attend_group(
        self,
        group: RowGroup,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        now: Call,
        laid: Laid,
    ) -> tuple[Tensor, str, Tensor, int]:
        """`_attend_rows` of a group, without its padding."""
        rows = group.rows if len(laid.groups) > 1 else None
        now = dataclasses.replace(now, rows=rows, segments=group.segments)
        taken = [group.take(x) for x in (query, key, value)]
        held = sum(x.numel() * x.element_size() for x in taken) if group.copies else 0
        return self._attend_rows(*taken, call, now, group.text, laid, held)

    def _attend_rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        now: Call,
        text: int,
        laid: Laid,
        held: int = 0,
    ) -> tuple[Tensor, str, Tensor, int]:
        """Attend among batch rows with so many tokens of text and no padding.

        Args:
            laid: of the forward.
            held: bytes that were taken for this call already.

        Returns:
            `[B, S, H, D]`, the executor's name, and the pairs of tokens that were read and that are present.
        """
        layout = self.layouts.of_call(query, text, laid.layout, len(laid.groups))
        with torch.no_grad():  # which blocks are read has no gradient
            plan = self.planner.plan(query, key, layout, now)
        if laid.observer is not None:
            laid.observer(now, layout, query, key, value, plan)
        return self.attend_by(plan, query, key, value, call, now, layout, held)

    def attend_by(
        self,
        plan: BlockPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        now: Call,
        layout: TokenLayout,
        held: int = 0,
    ) -> tuple[Tensor, str, Tensor, int]:
        """Attend as a plan says, which may be of some query blocks alone; arguments and results as `_attend_rows`."""
        from dit_accel.kernels.coarse import add_block_means
        from dit_accel.kernels.counting import count_pairs

        by_head = [x.transpose(1, 2) for x in (query, key, value)]
        out, lse, title = self._execute(by_head, plan, layout, now, call)
        if plan.coarse is not None:
            add_block_means(out, lse, *by_head, plan, scale=call["scale"])
        copied = (plan.q_order is not None) + 2 * (plan.k_order is not None)
        working = held + copied * query.numel() * query.element_size()
        compensate = getattr(self.planner.method_at(now), "compensate", None)
        if compensate is not None:
            out = compensate(out, *by_head, plan, now, self.weights)
        if self.weights is not None:
            title = f"{title} + {self.weights.title}"
            working += self.weights.bytes_working(by_head[0], plan)
        self.tally.bytes_working = max(self.tally.bytes_working, working)
        times = len(query) // plan.lead[0]  # rows for which a plan for all of them counts
        return out.transpose(1, 2), title, count_pairs(plan) * times, plan.n_pairs * times

    def _execute(
        self, qkv: list[Tensor], plan: BlockPlan, layout: TokenLayout, now: Call, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor, str]:
        """Out `[B, H, S, D]`, lse, and the executor's name. A method that learns is told what mattered."""
        from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback, choose

        state = self.planner.state_for(qkv[0].transpose(1, 2), layout, now) if self.planner.learns else None
        method = self.planner.method_at(now)
        pv_threshold = getattr(method, "pv_threshold", None)
        precision = self.options.precision
        if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
            return self._execute_with_gradients(qkv, plan, call)
        executor = choose(*qkv, plan, self.options.impl, precision, state is not None, pv_threshold is not None)
        title = executor if precision == "full" else f"{executor} ({precision})"
        self._say_once(f"sparse attention runs on the {title} executor")
        known = dict(scale=call["scale"], layout="bhsd", impl=executor, precision=precision)
        if state is None:
            config = self.config_for(executor, qkv, plan, call)
            return *block_sparse(*qkv, plan, **known, config=config, pv_threshold=pv_threshold), title
        out, lse, needed = block_sparse_feedback(*qkv, plan, method.threshold_at(now), **known)
        method.learn(needed, plan, layout, now, state)
        return out, lse, title

    def _execute_with_gradients(
        self, qkv: list[Tensor], plan: BlockPlan, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor, str]:
        """As `_execute`, differentiable: for weights that are being trained."""
        from dit_accel.kernels.block_sparse import block_sparse_trainable, choose

        with torch.no_grad():
            executor = choose(*(x.detach() for x in qkv), plan, self.options.impl)
        self._say_once(f"sparse attention with gradients runs on the {executor} executor")
        known = dict(scale=call["scale"], layout="bhsd", impl=self.options.impl)
        return *block_sparse_trainable(*qkv, plan, **known), f"{executor} (with gradients)"

    def config_for(self, executor: str, qkv: list[Tensor], plan: BlockPlan, call: dict[str, Any]) -> Any:
        """The Triton kernel's configuration, tuned at the first call of its kind; None for the standing one."""
        query = qkv[0]
        if not self.options.tune:
            return None
        if executor != "triton":
            self._say_once(f"tune=True has nothing to choose from: the {executor} executor has one configuration")
            return None
        kind = (query.shape[3], query.dtype, query.device, plan.max_q_block, plan.max_k_block)
        if kind not in self._configs:
            if query.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            from dit_accel.kernels.block_sparse.tuning import tune

            found = tune(*qkv, plan, scale=call["scale"], layout="bhsd")
            self._say_once(f"of {len(found.trials)} configurations of the Triton kernel {found.config} is fastest")
            self._configs[kind] = found.config
        return self._configs[kind]

    # -- linear

    def attend_linearly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        now: Call,
        seat: Place,
        groups: tuple[RowGroup, ...] = (),
    ) -> Tensor:
        """Attend in a layer that trained weights have as linear attention alone.

        Args:
            query: `[B, S, H, D]`, post-RoPE; key and value the same with their own S.
            call: the dispatcher's other arguments.
            now: which call this is.
            seat: attends densely where that fails.
            groups: as `Laid`.

        Returns:
            `[B, S, H, D]`; zeros where there is padding.
        """
        from dit_accel.kernels.linear_attention import choose

        def compute() -> Attended:
            title = f"{choose(query.transpose(1, 2))}, linear attention alone"
            return Attended(self.blend_linearly(query, key, value, now, groups), title)

        return self.attend_guarded(compute, seat, query, key, value, call, now)

    def blend_linearly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        now: Call,
        groups: tuple[RowGroup, ...] = (),
        softmax: Tensor | None = None,
    ) -> Tensor:
        """As `attend_linearly`, neither counted nor guarded, and with dense attention blended in.

        Args:
            softmax: dense attention `[B, S, H, D]`, which then is what counts; None: there is none.
        """
        weights = self.weights
        assert weights is not None
        working = 0

        def attend(*rows: Tensor | None) -> Tensor:
            nonlocal working
            *by_head, beside = (None if x is None else x.transpose(1, 2) for x in rows)
            working = max(working, weights.bytes_working(by_head[0], None))
            return weights.attend_linearly(*by_head, now, beside).transpose(1, 2)

        given = (query, key, value, softmax)
        whole = None if groups else attend(*given)
        for group in groups:
            taken = [None if x is None else group.take(x) for x in given]
            out = attend(*taken)
            if group.copies:
                working += sum(x.numel() * x.element_size() for x in taken if x is not None)
            if group.is_everything:
                whole = out
            else:
                whole = out.new_zeros(query.shape) if whole is None else whole
                group.put(out, whole)
        self.tally.bytes_working = max(self.tally.bytes_working, working)
        return whole

    # -- dense

    def attend_densely(
        self,
        seat: Place,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        planned: bool,
        call: dict[str, Any],
        whole: bool = False,
    ) -> Tensor:
        """As the host would; or, where that was asked for and the call is a plain one, by the fastest kernel.

        Args:
            whole: whether these are whole sequences also where context parallelism splits them (see
                `parallel.attend_whole`).
        """
        special = call["is_causal"] or call["dropout_p"] or call["enable_gqa"]
        alone = whole or not seat.splits
        plain = call["attn_mask"] is None and not special and alone and query.shape == key.shape
        if self.options.dense == "fastest" and planned and plain:
            from dit_accel.kernels import dense

            tokens = query.shape[1], query.device
            if self._full is None or self._full[0] != tokens:
                self._full = tokens, dense.full_plan(query.shape[1], *tokens)
            plan = self._full[1]
            name = dense.choose(query, key, value, plan=plan)
            self._say_once(f"dense attention runs on the {name} kernel")
            self.tally.dense_kernels[name] += 1
            return dense.attend(query, key, value, scale=call["scale"], impl=name, plan=plan)
        self.tally.dense_kernels[seat.title] += 1
        return (seat.dense_whole if whole else seat.dense)(query, key, value, **call)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.info(what)

    def __deepcopy__(self, memo: dict) -> Attending:
        """For a copied transformer: with the configurations that were found, and nothing said yet."""
        parts = (copy.deepcopy(part, memo) for part in (self.planner, self.layouts, self.tally, self.guards))
        new = memo[id(self)] = Attending(self.options, *parts, copy.deepcopy(self.weights, memo))
        new._configs = dict(self._configs)
        return new
