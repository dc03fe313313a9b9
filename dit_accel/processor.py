"""SparseProcessor: the only class diffusers' attention meets."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from dit_accel.engine import Engine
from dit_accel.errors import UsageError
from dit_accel.forwards import method_of
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.report import Report, Tally
from dit_accel.trajectory import Trajectory


class SparseProcessor:
    """One processor for every attention of a transformer.

    ```python
    pipe.transformer.set_attn_processor(SparseProcessor(pipe.transformer, keep=0.25))
    ```

    Self-attentions run their stock processor with sparse attention in its dispatcher slot; every other
    attention runs its stock processor as it was. Constructing wires the transformer (a hook at its root that
    reads step and branch, hooks that bring tokens into block order and back); it starts to act once set.
    Constructing a second one takes over from the first.

    Args:
        transformer: a diffusers transformer of a known family. Left out only where diffusers itself makes an
            empty copy (`load_ip_adapter`); such a copy is adopted at the next forward.
        method: a method's name, or an object with `predict` (see `dit_accel.methods`).
        keep, top_p, order, block, dense_above, dense_below, dense_layers, impl, min_tokens, strict: as of
            `SparseOptions`.
        method_options: the method's own options, and the other options of `SparseOptions`.

    Raises:
        UnknownModelError: a transformer of no known family.
        UnknownNameError: an unknown option, method, token order or executor.
        UsageError: a value outside its range, or a budget missing.
    """

    def __init__(
        self,
        transformer: nn.Module | None = None,
        method: str | Method = "pooled",
        *,
        keep: float | None = None,
        top_p: float | None = None,
        order: str | None = None,
        block: int | None = None,
        dense_above: float = 1.0,
        dense_below: float = 0.0,
        dense_layers: tuple[int, ...] = (),
        impl: str = "auto",
        min_tokens: int | None = None,
        strict: bool = False,
        **method_options: Any,
    ) -> None:
        self.engine: Engine | None = None
        # what diffusers set on an empty processor before it was adopted
        self._pending: dict[str, Any] = {}
        if transformer is None:
            return
        options = SparseOptions.from_mapping(
            dict(
                method=method if isinstance(method, str) else SparseOptions.method,
                keep=keep,
                top_p=top_p,
                order=order,
                block=block,
                dense_above=dense_above,
                dense_below=dense_below,
                dense_layers=dense_layers,
                impl=impl,
                min_tokens=min_tokens,
                strict=strict,
                **method_options,
            )
        )
        if options.roles:
            raise UsageError(
                f"A SparseProcessor is on one transformer, and {', '.join(options.roles)}= is for one of several: give "
                "these options by themselves, or use `dit_accel.accelerate` on the whole pipeline."
            )
        method = method_of(options) if isinstance(method, str) else method
        trajectory = Trajectory()
        self.engine = Engine(
            transformer, options, method, trajectory, Tally.of(trajectory), role="transformer"
        )

    @classmethod
    def of(cls, engine: Engine) -> SparseProcessor:
        """The processor of an engine that already exists."""
        processor = cls()
        processor.engine = engine
        return processor

    @property
    def report(self) -> Report:
        """What ran since this processor was constructed."""
        return self._adopted().report()

    def remove(self) -> None:
        """Restore the processors that were there before, take every hook away. Nothing the second time."""
        self._adopted().remove()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        *args: Any,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        image_rotary_emb: Any = None,
        rotary_emb: Any = None,
        temb: Tensor | None = None,
        hidden_states_mask: Tensor | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int | None = None,
        num_txt_tokens: int | None = None,
        scale: float | None = None,
    ) -> Any:
        """Run one attention.

        The keywords are those of every host: old `Attention` modules pass only what is named here.
        Positional arguments go on as they came, keywords as far as the stock processor takes them.
        """
        seat = getattr(attn, "_dit_accel", None)
        if seat is None:
            raise UsageError(
                "This SparseProcessor was set on a transformer it was not made for. Make one for each: "
                "`transformer.set_attn_processor(SparseProcessor(transformer, ...))`."
            )
        named = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "attention_mask": attention_mask,
            "freqs_cis": freqs_cis,
            "image_rotary_emb": image_rotary_emb,
            "rotary_emb": rotary_emb,
            "temb": temb,
            "hidden_states_mask": hidden_states_mask,
            "ip_hidden_states": ip_hidden_states,
            "ip_adapter_masks": ip_adapter_masks,
            "kv_cache": kv_cache,
            "kv_cache_mode": kv_cache_mode,
            "num_ref_tokens": num_ref_tokens,
            "num_txt_tokens": num_txt_tokens,
            "scale": scale,
        }
        taken = {name: value for name, value in named.items() if value is not None and name in seat.accepts}
        return seat.inner(attn, hidden_states, *args, **taken)

    # diffusers reads and writes these two on every processor: set_attention_backend, enable_parallelism.
    @property
    def _attention_backend(self) -> Any:
        return self._stock_value("_attention_backend")

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self._set_stock_value("_attention_backend", value)

    @property
    def _parallel_config(self) -> Any:
        return self._stock_value("_parallel_config")

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self._set_stock_value("_parallel_config", value)

    def _refuse_scale(self, value: Any) -> None:
        raise UsageError(
            "A SparseProcessor has no scale: this is an IP-Adapter's, whose own processors are back in place after the "
            "first forward. Set it then, or before making the attention sparse, or use `dit_accel.accelerate`."
        )

    # `set_ip_adapter_scale` writes it on whatever processor there is; on ours it would be lost in silence.
    scale = property(fset=_refuse_scale)

    def _stock_value(self, name: str) -> Any:
        if self.engine is None:
            return self._pending.get(name)
        return next(
            (getattr(seat.stock, name, None) for seat in self.engine.seating.seats if seat.layer is not None), None
        )

    def _set_stock_value(self, name: str, value: Any) -> None:
        if self.engine is None:
            self._pending[name] = value
            return
        for seat in self.engine.seating.seats:
            if hasattr(seat.stock, name):
                setattr(seat.stock, name, value)

    def adopt(self, engine: Engine) -> None:
        """Join an engine; what was set on this empty processor before goes to the stock processors."""
        self.engine = engine
        for name, value in self._pending.items():
            self._set_stock_value(name, value)
        self._pending.clear()

    def __deepcopy__(self, memo: dict) -> SparseProcessor:
        """A copied transformer gets an engine of its own; a processor copied alone belongs to none."""
        new = memo[id(self)] = type(self)()
        new._pending = dict(self._pending)
        if self.engine is not None and self.engine.is_copied_in(memo):
            new.engine = copy.deepcopy(self.engine, memo)
        return new

    def _adopted(self) -> Engine:
        if self.engine is None:
            raise UsageError("This SparseProcessor belongs to no transformer yet: construct it with one.")
        return self.engine

    def __repr__(self) -> str:
        return f"SparseProcessor({self.engine!r})"
