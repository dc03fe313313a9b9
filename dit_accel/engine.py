"""Engine: one transformer wired for sparse attention. It installs and removes everything, and attends."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import dispatch, find_adapter, parallel
from dit_accel.adapters.dispatch import Seat
from dit_accel.arrangement import Arrangement
from dit_accel.errors import FallbackError, UsageError
from dit_accel.hooks import Enter, Leave, Listener, Reorder, keeps_tokens
from dit_accel.layout import TokenLayout, build_layout
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.plan import BlockPlan
from dit_accel.planner import Planner
from dit_accel.report import Report, Tally
from dit_accel.rows import RowGroup, group_rows
from dit_accel.trajectory import Call, Facts, Trajectory

logger = logging.getLogger("dit_accel")
# Told of each sparse call, or group of rows in one, before it runs: where it is, its layout, query, key and value
# [B, S, H, D], and its plan.
Observer = Callable[[Call, TokenLayout, Tensor, Tensor, Tensor, BlockPlan], None]

# Below so many tokens dense attention is taken to be faster. CPU: measured on two x86 cores in fp32 (4 heads of
# 64, prediction included), dense over sparse time at keep 0.5 was 0.87 at 1296 tokens, 1.15 at 2448 and 1.73 at
# 4352. CUDA: an estimate for models of ordinary width, from the launches of a prediction (about 0.2 ms) against dense
# times on an H100; tiny-wan with its 4 heads of 64 ran 0.89 times as fast at 4352 tokens and 1.10 times at 33792
# (keep 0.25, tiles, Triton kernel; scripts/results/tiny_wan_quality_*_h200.json).
BREAK_EVEN_TOKENS = {"cpu": 2048, "cuda": 8192}

_GRADIENTS = "gradients are needed, and the sparse kernels have no backward"


class Engine:
    """Everything of ours on one transformer.

    Args:
        transformer: of a known family.
        options: what was asked for.
        method: predicts the plans.
        trajectory: the clock; shared by the experts of one pipeline.
        tally: what ran; shared likewise.
        role: which transformer of the pipeline this is.

    Raises:
        UnknownModelError: a transformer of no known family.
        UsageError: a layer that does not exist, or processors that do not use diffusers' dispatcher. Nothing
            has been touched then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        options: SparseOptions,
        method: Method,
        trajectory: Trajectory,
        tally: Tally,
        role: str,
    ) -> None:
        self.adapter: ModuleType = find_adapter(transformer)
        self.options, self.method, self.role = options, method, role
        self.trajectory, self.tally = trajectory, tally
        layers = dict(self.adapter.self_attentions(transformer))
        self.n_layers = len(layers)
        self.dense_layers = _resolve_layers(options.dense_layers, self.n_layers)
        self.planner = Planner(options, method, trajectory, tally, self.n_layers)
        self.arrangement = _arrange(method, options)
        self.observer: Observer | None = None
        self.call: Call | None = None  # the forward under way
        self.layout: TokenLayout | None = None  # of its tokens
        self.order: TokenLayout | None = None  # what the order hooks apply in it
        self.text = 0  # text tokens of this forward, padding included
        self.groups: tuple[RowGroup, ...] = ()  # its batch rows by their padding; none: calls have no mask
        # why all of this forward is dense, and whether that was planned
        self._dense_reason: tuple[str, bool] | None = None
        self._counted = False  # whether these dense calls are counted as the forward begins
        self._foreseen: list[tuple[str, int]] = []  # dense calls that never reach `attend`: why, and how many
        # once the forward returns: calls of cross-attention, and the order of its tokens where it is sparse
        self._to_count: list[Any] = [0, ""]
        self._layouts: dict[tuple, TokenLayout] = {}
        self._full: tuple[tuple, BlockPlan] | None = None  # reads everything; for the tokens seen last
        self._configs: dict[tuple, Any] = {}  # of the Triton kernel, by kind of call
        self._said: set[str] = set()
        self._set_once = False  # whether our processors were seen in place
        self._acted = False  # whether they were the last time
        unwrapped = inspect.unwrap(type(transformer).forward)
        self._names = tuple(inspect.signature(unwrapped).parameters)[1:]
        self._module = weakref.ref(transformer)
        self._wire(transformer, layers)

    # -- installing and removing

    def _wire(self, transformer: nn.Module, layers: dict[str, int]) -> None:
        attentions = {path: m for path, m in transformer.named_modules() if hasattr(m, "get_processor")}
        stocks = {path: _stock_of(path, attn) for path, attn in attentions.items()}
        inner = {path: self._dispatching(stocks[path]) for path in layers}
        for path in layers:
            if inner[path] is None:
                raise UsageError(
                    f"{path} has a {type(stocks[path]).__name__}, which does not use diffusers' attention "
                    "dispatcher. Set the stock processors again before making the attention sparse."
                )
        earlier = {attn._dit_accel.owner for attn in attentions.values() if hasattr(attn, "_dit_accel")}
        for engine in earlier:
            engine._unhook()
        self._paths, self._attentions = list(attentions), None
        self.seats: list[Seat] = []
        for path, attn in attentions.items():
            attn._dit_accel = Seat(self, stocks[path], layers.get(path), inner.get(path))
            self.seats.append(attn._dit_accel)
        self._handles = [
            transformer.register_forward_pre_hook(Enter(self), with_kwargs=True),
            transformer.register_forward_hook(Leave(self)),
        ]
        for module, reorder in self.adapter.order_hooks(transformer):
            self._handles.append(module.register_forward_hook(Reorder(self, reorder)))
        self._listener = Listener(self.trajectory)
        self._listener.join(transformer)

    def _dispatching(self, stock: Any) -> Any | None:
        return getattr(self.adapter, "dispatching", dispatch.dispatching)(stock)

    def _unhook(self) -> None:
        """Take the hooks away, and with them every effect but that of processors still set."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        module = self._module()
        if module is not None:
            self._listener.part(module)
        self.planner.clear()
        self._layouts.clear()
        self._full = None
        self.call = self.layout = self.order = None

    def remove(self) -> None:
        """Restore every processor by identity and take every hook away. Does nothing the second time."""
        if not self._handles:
            return
        for attn, seat in self._pairs():
            if _acts(attn, seat):
                attn.set_processor(seat.unwrap())
            del attn._dit_accel
        self._unhook()

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def report(self) -> Report:
        return self.tally.report(self.keep_requested, self.bytes_held())

    @property
    def keep_requested(self) -> float | None:
        """The share of key blocks asked for; None where a method has no such option."""
        return getattr(self.method, "keep", None)

    def bytes_held(self) -> int:
        """Memory this engine keeps between forwards."""
        return self.planner.bytes_held() + sum(layout.bytes_held() for layout in self._layouts.values())

    def _pairs(self) -> list[tuple[nn.Module, Seat]]:
        """Each attention with its seat. Those of an IP-Adapter's image projection may be gone."""
        if self._attentions is None:
            module = self._module()
            assert module is not None
            found = dict(module.named_modules())
            self._attentions = [weakref.ref(found[path]) if path in found else lambda: None for path in self._paths]
        pairs = zip((ref() for ref in self._attentions), self.seats, strict=True)
        return [(attn, seat) for attn, seat in pairs if attn is not None]

    # -- around one forward

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Read what this forward is part of and decide what holds for all of it.

        Returns:
            The arguments it shall have instead, if some hold tokens and these are brought into another order.
        """
        self._foreseen = []
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if "hidden_states" not in given or "timestep" not in given:
            return None  # the host is about to say so better
        facts = self.adapter.read(self._module(), given)
        self.call = self.trajectory.enter(self.role, facts, self._listener.context(), self.n_layers)
        self.order = None
        self._to_count = [0, ""]
        if not self._in_use():
            return None
        hidden = given["hidden_states"]
        self._counted = False
        self._dense_reason = self._why_adapter_dense(given) or self._why_all_dense(hidden, facts)
        if self._dense_reason is None:
            self._to_count[1] = self._lay_out(given, facts)
        elif self._dense_reason[1] and keeps_tokens(self._module()):
            self._lay_out(given, facts)  # what a cache keeps of this forward may be used in a sparse one
        if self.order is None or not hasattr(self.adapter, "order_arguments"):
            return None
        return self._with(self.adapter.order_arguments(given, self.order), args, kwargs)

    def _lay_out(self, given: dict[str, Any], facts: Facts) -> str:
        """Choose the order of this forward's tokens, lay them out in it, and say which and why."""
        order, why_raster = self.arrangement.order, None
        if order != "raster":
            why_raster = facts.loose or self.adapter.why_raster(self._module(), given)
            order = "raster" if why_raster else order
        text = facts.text if facts.text_valid is None else facts.text_valid[0]
        # plans shared by branches must not depend on how rows are grouped in either
        batch = len(given["hidden_states"])
        self.text, self.groups = facts.text, group_rows(facts, batch, apart=self.options.share_plans)
        kind = facts.text_first, facts.first_frame_apart
        self.layout = self._layout_for(facts.grid, order, given["hidden_states"].device, text, *kind)
        self.order = None if order == "raster" else self.layout
        return f"raster: {why_raster}" if why_raster else order

    def _with(self, changed: dict[str, Any], args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward's arguments with some of them changed, each given as it was: by place or by name."""
        if not changed:
            return None
        by_place = tuple(changed.get(name, x) for name, x in zip(self._names, args, strict=False))
        return by_place, {name: changed.get(name, x) for name, x in kwargs.items()}

    def leave(self) -> None:
        """Note that the forward returned."""
        self.trajectory.leave(self.role)
        self._count_forward()
        self.call = self.order = None
        for seat in self.seats:
            if seat.has_weights:
                seat.close()

    def begin(self) -> None:
        """Note that this forward is computed: count the dense calls that are known of beforehand.

        Raises:
            FallbackError: under `strict`, if there are any.
        """
        foreseen, self._foreseen = self._foreseen, []
        for reason, calls in foreseen:
            self._count_dense(reason, False, calls)

    def skip(self) -> None:
        """Note that a step cache makes this forward up: what was to be counted of it does not happen."""
        self._to_count, self._foreseen = [0, ""], []

    def _count_forward(self) -> None:
        cross, order = self._to_count
        self.tally.cross += cross
        if order:
            self.tally.token_orders[order] += 1
        self._to_count = [0, ""]

    def settle(self) -> None:
        """Put processors with weights of their own back in place of ours, and follow an IP-Adapter that comes or goes.

        Loading or unloading one puts a processor in place of ours. It is no opting out where ours are set beside it.
        """
        pairs = self._pairs()
        if not any(_acts(attn, seat) for attn, seat in pairs) and not self._is_out_by_adapter(pairs):
            return
        self._set_once = self._acted = True
        for attn, seat in pairs:
            foreign = not _acts(attn, seat)
            if seat.layer is None or not (seat.has_weights or isinstance(attn.processor, nn.Module)):
                continue
            if foreign:
                inner = self._dispatching(attn.processor)
                if inner is None:
                    continue
                seat.serve(attn.processor, inner)
            attn.set_processor(seat.inner if seat.has_weights else _processor_of(self))

    def _is_out_by_adapter(self, pairs: list[tuple[nn.Module, Seat]]) -> bool:
        """Whether loading or unloading an IP-Adapter put others in place of all our processors since the last look."""
        if not self._acted or not hasattr(self.adapter, "has_image_prompt"):
            return False
        has = self.adapter.has_image_prompt(self._module())
        attending = [(attn, seat) for attn, seat in pairs if seat.layer is not None]
        return all(has == isinstance(attn.processor, nn.Module) != seat.has_weights for attn, seat in attending)

    def _in_use(self) -> bool:
        """Whether our processor is set on any self-attention. Adopts empty ones, notices replaced ones."""
        self.settle()
        replaced = in_use = 0
        strange = False  # one that was not here before us, though ours may have come and gone unseen
        attending = []
        for attn, seat in self._pairs():
            ours = _acts(attn, seat)
            if ours and seat.has_weights:
                seat.open()
            if _is_ours(attn.processor) and attn.processor.engine is None:
                attn.processor.adopt(self)
            if seat.layer is None:
                self._to_count[0] += ours
            else:
                in_use += ours
                replaced += not ours
                attending.append(seat.stock if ours else attn.processor)
                strange |= not ours and attn.processor is not seat.stock
        self._acted = in_use > 0
        if in_use:
            parallel.check_processors(self._module(), attending)
        if replaced and (self._set_once or strange):
            self._foreseen.append(("its processor was replaced after installation", replaced))
        return in_use > 0

    def _why_adapter_dense(self, given: dict[str, Any]) -> tuple[str, bool] | None:
        why = getattr(self.adapter, "why_dense", None)
        reason = None if why is None else why(self._module(), given)
        return None if reason is None else self._foresee(reason)  # not all such calls reach `attend`

    def _foresee(self, reason: str) -> tuple[str, bool]:
        self._counted = True
        self._foreseen.append((reason, self.n_layers))
        return reason, False

    def _why_all_dense(self, hidden: Tensor, facts: Facts) -> tuple[str, bool] | None:
        call, options = self.call, self.options
        assert call is not None
        if call.noise > options.dense_above:
            return f"noise level above {options.dense_above:g}", True
        if call.noise < options.dense_below:
            return f"noise level below {options.dense_below:g}", True
        tokens, least = call.segments[-1][2], options.min_tokens
        if least is None:
            least = BREAK_EVEN_TOKENS.get(hidden.device.type, max(BREAK_EVEN_TOKENS.values()))
        if tokens < least:
            return f"fewer than {least} tokens, where dense is faster", True
        module = self._module()
        wants_gradients = hidden.requires_grad or any(p.requires_grad for p in module.parameters())
        if torch.is_grad_enabled() and wants_gradients:
            return self._foresee(_GRADIENTS)  # such calls never reach `attend`
        why_local = parallel.why_dense(module, self.adapter, facts.text)
        if why_local is not None:
            return why_local, False
        if facts.loose and getattr(self.method, "needs_grid", False):
            return f"the method looks at places, and the tokens are no one grid ({facts.loose})", False
        return None

    def _layout_for(
        self,
        grid: tuple[int, int, int],
        order: str,
        device: torch.device,
        text: int,
        text_first: bool,
        first_frame_apart: bool,
    ) -> TokenLayout:
        key = (grid, order, device, text, text_first, first_frame_apart)
        if key not in self._layouts:
            # a pipeline that changes size at every call must not fill the memory
            if len(self._layouts) >= 8 * max(1, len(self.groups)):
                self._layouts.clear()
            tile = self.arrangement.tile if order == "tiles" else None
            options = dict(tile=tile, text=text, text_first=text_first, first_frame_apart=first_frame_apart)
            self._layouts[key] = build_layout(grid, order, self.arrangement.block, device, **options)
        return self._layouts[key]

    # -- one attention

    def attend(self, seat: Seat, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        """Attend for one self-attention: sparse where nothing speaks against it, else as diffusers would.

        Args:
            query: `[B, S, H, D]`, post-RoPE; as are key and value.
            call: the dispatcher's other arguments: attn_mask, dropout_p, is_causal, scale, enable_gqa.

        Raises:
            FallbackError: under `strict`, if the call would fall back unplanned.
            KernelUnavailable: if an executor was asked for by name and cannot run this.
        """
        if seat.has_weights and query.shape[1] != key.shape[1]:  # an IP-Adapter's tokens, read besides the others
            self.tally.cross += 1
            return seat.dense(query, key, value, **call)
        reason = self._why_dense(seat, query, key, value, call)
        if reason is not None:
            if not (self._counted and reason is self._dense_reason):
                self._count_dense(*reason, 1)
            return self._attend_densely(seat, query, key, value, reason[1], call)

        def attend(query: Tensor, key: Tensor, value: Tensor, first_head: int) -> Tensor:
            return self._attend_whole(self.call.at(seat.layer, first_head), query, key, value, call)

        return parallel.attend_whole(seat.stock, query, key, value, call["scale"], attend)

    def _attend_whole(
        self, now: Call, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]
    ) -> Tensor:
        """Attend sparsely, to all tokens of the forward and with all heads of this process."""
        if not self.groups:
            text = self.layout.text
            if text and query.shape[1] == self.layout.n_video_tokens:  # the text takes no part in this attention
                text = 0
                now = dataclasses.replace(now, segments=(("video", 0, self.layout.n_video_tokens),))
            whole, title, read, present = self._attend_rows(now, text, query, key, value, call)
            self.tally.note_sparse(now, title, read, present)
            return whole
        whole, titles, read, present = None, {}, 0, 0
        for group in self.groups:
            out, title, *counts = self._attend_group(group, now, query, key, value, call)
            titles[title] = None
            read, present = read + counts[0], present + counts[1]
            if group.is_everything:
                whole = out
            else:
                # padding attends to nothing
                whole = out.new_zeros(*query.shape[:3], out.shape[3]) if whole is None else whole
                group.put(out, whole)
        self.tally.note_sparse(now, " and ".join(titles), read, present)
        return whole

    def _attend_group(
        self, group: RowGroup, now: Call, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]
    ) -> tuple[Tensor, str, Tensor, int]:
        """`_attend_rows` of a group, without its padding."""
        rows = group.rows if len(self.groups) > 1 else None
        now = dataclasses.replace(now, rows=rows, segments=group.segments)
        taken = [group.take(x) for x in (query, key, value)]
        held = sum(x.numel() * x.element_size() for x in taken) if group.copies else 0
        return self._attend_rows(now, group.text, *taken, call, held)

    def _attend_rows(
        self, now: Call, text: int, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any], held: int = 0
    ) -> tuple[Tensor, str, Tensor, int]:
        """Attend sparsely among batch rows with so many tokens of text and no padding.

        Args:
            held: bytes that were taken for this call already.

        Returns:
            `[B, S, H, D]`, the executor's name, and the pairs of tokens that were read and that are present.
        """
        from dit_accel.kernels.coarse import add_block_means
        from dit_accel.kernels.counting import count_pairs

        layout = self._layout_of(query, text)
        plan = self.planner.plan(query, key, layout, now)
        if self.observer is not None:
            self.observer(now, layout, query, key, value, plan)
        by_head = [x.transpose(1, 2) for x in (query, key, value)]
        out, lse, title = self._attend_sparsely(by_head, plan, layout, now, call)
        if plan.coarse is not None:
            add_block_means(out, lse, *by_head, plan, scale=call["scale"])
        copied = (plan.q_order is not None) + 2 * (plan.k_order is not None)
        working = held + copied * query.numel() * query.element_size()
        self.tally.bytes_working = max(self.tally.bytes_working, working)
        times = len(query) // plan.lead[0]  # rows for which a plan for all of them counts
        return out.transpose(1, 2), title, count_pairs(plan) * times, plan.n_pairs * times

    def _layout_of(self, query: Tensor, text: int) -> TokenLayout:
        """The layout of one call's tokens, where they are: offloading moves them after the root hook saw them."""
        layout = self.layout
        if layout.starts.device == query.device and layout.text == text:
            return layout
        kind = layout.text_first, layout.first_frame_apart
        return self._layout_for(layout.grid, layout.order, query.device, text, *kind)

    def _attend_sparsely(
        self, qkv: list[Tensor], plan: BlockPlan, layout: TokenLayout, now: Call, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor, str]:
        """Out `[B, H, S, D]`, lse, and the executor's name. A method that learns is told what mattered."""
        from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback, choose

        state = self.planner.state_for(qkv[0].transpose(1, 2), layout, now) if self.planner.learns else None
        method = self.planner.method_at(now)
        pv_threshold = getattr(method, "pv_threshold", None)
        precision = self.options.precision
        executor = choose(
            *qkv, plan, self.options.impl, precision, state is not None, pv_threshold is not None
        )
        title = executor if precision == "full" else f"{executor} ({precision})"
        self._say_once(f"sparse attention runs on the {title} executor")
        known = dict(scale=call["scale"], layout="bhsd", impl=executor, precision=precision)
        if state is None:
            config = self._config_for(executor, qkv, plan, call)
            return *block_sparse(*qkv, plan, **known, config=config, pv_threshold=pv_threshold), title
        out, lse, needed = block_sparse_feedback(*qkv, plan, method.threshold_at(now), **known)
        method.learn(needed, plan, layout, now, state)
        return out, lse, title

    def _config_for(self, executor: str, qkv: list[Tensor], plan: BlockPlan, call: dict[str, Any]) -> Any:
        """The Triton kernel's configuration, tuned at the first call of its kind; None for the standing one."""
        query = qkv[0]
        if not self.options.tune:
            return None
        if executor != "triton":
            self._say_once(
                f"tune=True has nothing to choose from: the {executor} executor has one configuration"
            )
            return None
        kind = (query.shape[3], query.dtype, query.device, plan.max_q_block, plan.max_k_block)
        if kind not in self._configs:
            if query.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            from dit_accel.kernels.block_sparse.tuning import tune

            found = tune(*qkv, plan, scale=call["scale"], layout="bhsd")
            self._say_once(
                f"of {len(found.trials)} configurations of the Triton kernel {found.config} is fastest"
            )
            self._configs[kind] = found.config
        return self._configs[kind]

    def _attend_densely(
        self, seat: Seat, query: Tensor, key: Tensor, value: Tensor, planned: bool, call: dict[str, Any]
    ) -> Tensor:
        """As diffusers would; or, where that was asked for and the call is a plain one, by the fastest kernel."""
        special = call["is_causal"] or call["dropout_p"] or call["enable_gqa"]
        alone = getattr(seat.stock, "_parallel_config", None) is None
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
        self.tally.dense_kernels[f"diffusers ({seat.backend})"] += 1
        return seat.dense(query, key, value, **call)

    def _why_dense(
        self, seat: Seat, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]
    ) -> tuple[str, bool] | None:
        if self.call is None or not self.installed:
            return "attention outside a forward of its transformer", False
        if self._dense_reason is not None:
            return self._dense_reason
        if seat.layer in self.dense_layers:
            return "dense layer", True
        if self.planner.is_dense(self.call.at(seat.layer)):
            return "a rule", True
        if call["attn_mask"] is not None and not self._is_padding(call["attn_mask"], query):
            return "an attention mask", False
        if call["is_causal"] or call["dropout_p"]:
            return "causal attention or dropout", False
        if query.shape != key.shape:
            return "queries and keys of different shape", False
        video = self.layout.n_video_tokens
        whole = (video + self.text,) if self.groups else (video + self.text, video)
        expected = [parallel.tokens_here(tokens, seat.stock) for tokens in whole]
        if query.shape[1] not in expected:
            return f"{query.shape[1]} tokens where the grid has {expected[0]}", False
        return None

    def _is_padding(self, mask: Tensor, query: Tensor) -> bool:
        """Whether a call's mask is the one that keeps out the padding the adapter told of. Its numbers are not read."""
        shape = (query.shape[0], 1, 1, query.shape[1])
        return bool(self.groups) and mask.dtype == torch.bool and mask.shape == shape

    def _count_dense(self, reason: str, planned: bool, calls: int) -> None:
        if not planned and self.options.strict:
            raise FallbackError(
                f"strict=True, and {calls} self-attention call(s) would run dense: {reason}. "
                "Remove the cause, or set strict=False to let them."
            )
        self.tally.note_dense(reason, planned, calls)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.info(what)

    # -- copying

    def is_copied_in(self, memo: dict) -> bool:
        """Whether a deep copy under way also copies the transformer."""
        return id(self._module()) in memo

    def __deepcopy__(self, memo: dict) -> Engine:
        """An engine for the copied transformer, with a clock, counts and state of its own."""
        new = memo[id(self)] = object.__new__(type(self))
        for name in ("adapter", "options", "method", "role", "n_layers", "dense_layers", "_names", "_paths"):
            setattr(new, name, getattr(self, name))
        new.arrangement, new.observer = self.arrangement, None
        target = memo.get(id(self._module()))
        new._module = (lambda: None) if target is None else weakref.ref(target)
        new.call = new.layout = new.order = new._dense_reason = new._attentions = None
        new._layouts, new._said, new._set_once, new._counted = {}, set(), False, False
        new._to_count, new._foreseen = [0, ""], []
        new._acted = self._acted
        new.text, new.groups, new._configs, new._full = 0, (), dict(self._configs), None
        new.tally = copy.deepcopy(self.tally, memo)
        new.trajectory = copy.deepcopy(self.trajectory, memo)
        new.planner = copy.deepcopy(self.planner, memo)
        new._listener = copy.deepcopy(self._listener, memo)
        new.seats = [copy.deepcopy(seat, memo) for seat in self.seats]
        new._handles = copy.deepcopy(self._handles, memo)
        return new

    def __repr__(self) -> str:
        return f"Engine({self.role}, {self.method!r}, {len(self.seats)} attentions, {self.planner!r})"


def _arrange(method: Method, options: SparseOptions) -> Arrangement:
    """What the method was made for, as far as nothing else was asked for."""
    made_for = getattr(method, "arrangement", Arrangement())
    order, block = options.order or made_for.order, options.block or made_for.block
    tile = options.tile
    if tile is None and order == made_for.order and block == made_for.block:
        tile = made_for.tile
    if tile is not None and (order != "tiles" or math.prod(tile) > block):
        raise UsageError(
            f"tile={tile} with order {order!r} and block={block} is not possible: a tile is for order 'tiles', and its "
            "edges multiply to at most the block."
        )
    return Arrangement(order, block, tile)


def _is_ours(processor: Any) -> bool:
    from dit_accel.processor import SparseProcessor

    return isinstance(processor, SparseProcessor)


def _acts(attn: nn.Module, seat: Seat) -> bool:
    """Whether an attention runs through us: by our processor, or by one with weights of its own that leads to us."""
    return _is_ours(attn.processor) or (seat.has_weights and attn.processor is seat.inner)


def _processor_of(engine: Engine) -> Any:
    from dit_accel.processor import SparseProcessor

    return SparseProcessor.of(engine)


def _stock_of(path: str, attn: nn.Module) -> Any:
    """The processor that was there before us, however often we came."""
    if hasattr(attn, "_dit_accel"):
        return attn._dit_accel.unwrap() if _acts(attn, attn._dit_accel) else attn.processor
    if _is_ours(attn.processor):
        raise UsageError(f"{path} has a SparseProcessor made for another transformer; set its own first.")
    return attn.processor


def _resolve_layers(layers: tuple[int, ...], n_layers: int) -> frozenset[int]:
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise UsageError(
                f"dense_layers names layer {layer}, but this transformer has {n_layers}: give 0 to "
                f"{n_layers - 1}, or -1 to {-n_layers} to count from the last."
            )
    return frozenset(layer % n_layers for layer in layers)
