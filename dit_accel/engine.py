"""Engine: one transformer wired for sparse attention. It installs and removes everything, and decides about forwards.

Beside what `Forwards` decides with it has `seating` (whose processors are set), and with it region sampling.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import arguments_of, find_adapter, parallel
from dit_accel.adapters.dispatch import Seat
from dit_accel.attending import Laid
from dit_accel.errors import UsageError
from dit_accel.forwards import Forwards, Reason
from dit_accel.hooks import Enter, Leave, Listener, Reorder, keeps_tokens
from dit_accel.methods import Method, Weights
from dit_accel.options import SparseOptions
from dit_accel.report import Report, Tally
from dit_accel.seating import Seating
from dit_accel.trajectory import Call, Facts, Trajectory

if TYPE_CHECKING:
    from dit_accel.region.engine import RegionEngine

# Takes a call that may be sparse and two functions that attend, densely and sparsely; gives what goes on, [B, S, H, D].
Probe = Callable[[Call, Callable[[], Tensor], Callable[[], Tensor]], Tensor]

_MOMENT = ("call", "layout", "order", "text", "groups", "_dense_reason", "_counted")
_BLENDED = "blended with a linear layer in training"
_GRADIENTS = "gradients are needed, and the sparse kernels have no backward"


class Engine(Forwards):
    """Everything of ours on one transformer of diffusers.

    Args:
        transformer: of a known family.
        options: what was asked for.
        method: predicts the plans; None: attention is dense, and the engine only wires the transformer.
        trajectory: the clock; shared by the experts of one pipeline.
        tally: what ran; shared likewise.
        role: which transformer of the pipeline this is.
        weights: trained weights in place of those that the method brings along.

    Raises:
        UnknownModelError: a transformer of no known family.
        EnvironmentProblem: weights that cannot be read. Nothing has been touched then.
        UsageError: a layer that does not exist, processors that do not use diffusers' dispatcher, or weights that
            are not for this transformer. Nothing has been touched then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        options: SparseOptions,
        method: Method | None,
        trajectory: Trajectory,
        tally: Tally,
        role: str,
        weights: Weights | None = None,
    ) -> None:
        self.adapter: ModuleType = find_adapter(transformer)
        layers = dict(self.adapter.self_attentions(transformer))
        super().__init__(options, method, trajectory, tally, role, len(layers))
        sparse = [layer for layer in layers.values() if layer not in self.dense_layers]
        if weights is None and sparse and hasattr(method, "weights_for"):
            weights = method.weights_for(transformer, sparse, self.layouts.arrangement, role)
        self._make_attending(weights)
        self.probe: Probe | None = None  # measures attention, while it is set
        self.region: RegionEngine | None = None  # region sampling, which sets itself here
        self._counted = False  # whether these dense calls are counted as the forward begins
        self._foreseen: list[tuple[str, int]] = []  # dense calls that never reach `attend`: why, and how many
        # once the forward returns: calls of cross-attention, and the order of its tokens where it is sparse
        self._to_count: list[Any] = [0, ""]
        unwrapped = inspect.unwrap(type(transformer).forward)
        self._names = tuple(inspect.signature(unwrapped).parameters)[1:]
        self._module = weakref.ref(transformer)
        self.seating = Seating(self, transformer, self.adapter, layers)
        if weights is not None:
            weights.install()
        self._hook(transformer)

    # -- installing and removing

    def _hook(self, transformer: nn.Module) -> None:
        self._handles = [
            transformer.register_forward_pre_hook(Enter(self), with_kwargs=True),
            transformer.register_forward_hook(Leave(self)),
        ]
        for module, reorder in self.adapter.order_hooks(transformer):
            self._handles.append(module.register_forward_hook(Reorder(self, reorder)))
        self._listener = Listener(self.trajectory)
        self._listener.join(transformer)

    def unhook(self) -> None:
        """Take the hooks away, and with them every effect but that of processors still set."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        module = self._module()
        if module is not None:
            self._listener.part(module)
        if self.region is not None:
            self.region.remove()
        if self.weights is not None:
            self.weights.remove()
        self.clear()

    def remove(self) -> None:
        """Restore every processor by identity and take every hook away. Does nothing the second time."""
        if self._handles:
            self.seating.restore()
            self.unhook()

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def report(self) -> Report:
        return self.tally.report(self.keep_requested, self.bytes_held())

    @property
    def trains(self) -> bool:
        """Whether sparse attention is differentiable here, for the sake of weights that are being trained."""
        return self.weights is not None and self.weights.trains

    def bytes_held(self) -> int:
        return super().bytes_held() + (0 if self.region is None else self.region.bytes_held())

    # -- around one forward

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Read what this forward is part of and decide what holds for all of it.

        Returns:
            The arguments it shall have instead, if some hold tokens and these are brought into another order.
        """
        self._foreseen = []
        given = arguments_of(self.adapter, self._names, args, kwargs)
        if given is None:
            return None  # the host is about to say so better
        facts = self.adapter.read(self._module(), given)
        self.call = self.trajectory.enter(self.role, facts, self._listener.context(), self.n_layers)
        self.order = None
        self._to_count = [0, ""]
        if not self._in_use():
            self._show_weights(False)
            return None
        self._counted = False
        if self.region is not None:
            self.order = self.region.enter(self.call, facts, given)
        if self.order is None:
            self._choose_attention(given, facts)
        elif self._by_blocks():
            self._dense_reason = self._why_all_dense(given["hidden_states"], facts)
        self._show_weights(self._dense_reason is None)
        if self.order is None or not hasattr(self.adapter, "order_arguments"):
            return None
        return self._with(self.adapter.order_arguments(given, self.order), args, kwargs)

    def _show_weights(self, trained: bool) -> None:
        """What training changed belongs to sparse forwards: a dense one is the model's own, to the bit."""
        if self.weights is not None:
            self.weights.show(trained, self._module())

    def _choose_attention(self, given: dict[str, Any], facts: Facts) -> None:
        """Sparse or dense, and the order of the tokens, for a forward of all of them."""
        self._dense_reason = self._why_adapter_dense(given) or self._why_all_dense(given["hidden_states"], facts)
        if self._dense_reason is None:
            self._to_count[1] = self._lay_out_as(given, facts)
        elif self._dense_reason[1] and (keeps_tokens(self._module()) or self._by_blocks()):
            self._lay_out_as(given, facts)  # what is kept of this forward may be used in a sparse one

    def _by_blocks(self) -> bool:
        """Whether region sampling computes whole blocks, and attends sparsely with them."""
        return self.region is not None and self.region.region.unit == "block"

    def _lay_out_as(self, given: dict[str, Any], facts: Facts) -> str:
        """`_lay_out` with what the adapter says of these arguments."""
        why_raster, hidden = None, given["hidden_states"]
        if self.layouts.arrangement.order != "raster":
            why_raster = facts.loose or self.adapter.why_raster(self._module(), given)
        return self._lay_out(facts, len(hidden), hidden.device, why_raster)

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
        if self.region is not None:
            self.region.leave()
        self.call = self.order = None
        self.seating.close()

    def begin(self) -> None:
        """Note that this forward is computed: count the dense calls that are known of beforehand.

        Raises:
            FallbackError: under `strict`, if there are any.
        """
        foreseen, self._foreseen = self._foreseen, []
        for reason, calls in foreseen:
            self.count_dense(reason, False, calls)

    def skip(self) -> None:
        """Note that a step cache makes this forward up: what was to be counted of it does not happen."""
        self._to_count, self._foreseen = [0, ""], []
        if self.region is not None:
            self.region.skip()

    def _count_forward(self) -> None:
        cross, order = self._to_count
        self.tally.cross += cross
        if order:
            self.tally.token_orders[order] += 1
        self._to_count = [0, ""]

    def settle(self) -> None:
        """See to processors that others put in place of ours (`Seating.settle`)."""
        self.seating.settle()

    def _in_use(self) -> bool:
        """Whether our processor is set on any self-attention."""
        seen = self.seating.look()
        self._to_count[0] = seen.cross
        if seen.in_use:
            parallel.check_processors(self._module(), seen.stock)
        if seen.replaced:
            self._foreseen.append(("its processor was replaced after installation", seen.replaced))
        return seen.in_use > 0

    def _why_adapter_dense(self, given: dict[str, Any]) -> tuple[str, bool] | None:
        why = getattr(self.adapter, "why_dense", None)
        reason = None if why is None else why(self._module(), given)
        return None if reason is None else self._foresee(reason)  # not all such calls reach `attend`

    def _foresee(self, reason: str) -> tuple[str, bool]:
        self._counted = True
        self._foreseen.append((reason, self.n_layers))
        return reason, False

    def _why_all_dense(self, hidden: Tensor, facts: Facts) -> Reason | None:
        reason = self._why_asked_dense(hidden.device)
        if reason is not None:
            return reason
        module = self._module()
        wants_gradients = hidden.requires_grad or any(p.requires_grad for p in module.parameters())
        if torch.is_grad_enabled() and wants_gradients and not self.trains:
            return self._foresee(_GRADIENTS)  # such calls never reach `attend`
        why_local = parallel.why_dense(module, self.adapter, facts.text)
        if why_local is not None:
            return why_local, False
        return self._why_no_grid(facts)

    # -- again, after the forward

    def moment(self) -> dict[str, Any]:
        """All that calls of the forward under way need to know of it."""
        return {name: getattr(self, name) for name in _MOMENT}

    @contextmanager
    def back_in(self, moment: dict[str, Any]) -> Iterator[None]:
        """Attend as in a forward whose `moment` this was: gradient checkpointing computes its blocks a second time.

        Nothing of it is counted.
        """
        now, counting = self.moment(), (self, self.planner, self.attending)
        vars(self).update(moment)
        tally = self.tally
        for part in counting:
            part.tally = Tally()
        try:
            yield
        finally:
            vars(self).update(now)
            for part in counting:
                part.tally = tally

    # -- one attention

    def attend(self, seat: Seat, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        """Attend for one self-attention: sparse, or linear in a linear layer, where nothing speaks against it; else as
        diffusers would.

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
        out = None if self.region is None else self.region.attend(seat, query, key, value, call)
        if out is not None:
            return out
        keeps = self.region is not None and self.region.keeps(seat.layer)
        reason = self._why_dense(seat, query, key, value, call)
        if reason is not None:
            if not (self._counted and reason is self._dense_reason):
                self.count_dense(*reason, 1)
            if not keeps:
                return self.attending.attend_densely(seat, query, key, value, reason[1], call)

        linear, softmax = self.is_linear(seat.layer), None
        if linear and self.weights.blends:
            self.count_dense(_BLENDED, True, 1)
            softmax = self.attending.attend_densely(seat, query, key, value, True, call)

        def attend(query: Tensor, key: Tensor, value: Tensor, first_head: int) -> Tensor:
            if keeps:
                self.region.store(seat.layer, key, value)
            if reason is not None:
                return self.attending.attend_densely(seat, query, key, value, reason[1], call, whole=True)
            now = self.call.at(seat.layer, first_head)
            if linear:
                if softmax is not None:
                    return self.attending.blend_linearly(query, key, value, now, self.groups, softmax)
                return self.attending.attend_linearly(query, key, value, call, now, seat, self.groups)
            laid = Laid(self.layout, self.groups, self.observer)

            def sparse() -> Tensor:
                return self.attending.attend_sparsely(query, key, value, call, now, laid, seat)

            if self.probe is None:
                return sparse()
            return self.probe(now, lambda: seat.dense_whole(query, key, value, **call), sparse)

        return parallel.attend_whole(seat.stock, query, key, value, call["scale"], attend)

    def _why_dense(
        self, seat: Seat, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]
    ) -> tuple[str, bool] | None:
        if self.call is None or not self.installed:
            hint = "; checkpoint by its enable_gradient_checkpointing" if self.trains else ""
            return f"attention outside a forward of its transformer{hint}", False
        return self._why_call_dense(seat, query, key, call)

    def _tokens_here(self, tokens: int, place: Seat) -> int:
        return parallel.tokens_here(tokens, place.stock)

    # -- copying

    def is_copied_in(self, memo: dict) -> bool:
        """Whether a deep copy under way also copies the transformer."""
        return id(self._module()) in memo

    def __deepcopy__(self, memo: dict) -> Engine:
        """An engine for the copied transformer, with a clock, counts and state of its own."""
        if self.region is not None:
            raise UsageError(
                "A transformer under region sampling cannot be copied: it follows one pipeline's scheduler. Call the "
                "handle's remove() first, and install again."
            )
        new = memo[id(self)] = object.__new__(type(self))
        for name in ("adapter", "options", "method", "role", "n_layers", "dense_layers", "_names"):
            setattr(new, name, getattr(self, name))
        new.observer = new.region = new.probe = None
        target = memo.get(id(self._module()))
        new._module = (lambda: None) if target is None else weakref.ref(target)
        new.call = new.layout = new.order = new._dense_reason = None
        new._counted, new._foreseen, new._to_count, new.text, new.groups = False, [], [0, ""], 0, ()
        new.why_dense_now = self.why_dense_now
        for name in ("tally", "trajectory", "planner", "layouts", "weights", "attending", "_listener"):
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        new.seating = self.seating.copy_to(new, target, memo)
        new._handles = copy.deepcopy(self._handles, memo)
        return new

    def __repr__(self) -> str:
        return f"Engine({self.role}, {self.method!r}, {len(self.seating.seats)} attentions, {self.planner!r})"
