"""make_trainable: a transformer whose self-attentions are SLA, or linear alone, with gradients to everything.

    trainable = make_trainable(pipe.transformer, SlaOptions(keep=0.1))
    optimizer = torch.optim.AdamW(trainable.parameters(), lr=1e-5)
    velocity = trainable(hidden_states=..., timestep=..., encoder_hidden_states=..., return_dict=False)[0]
    with trainable.dense(), torch.no_grad():
        teacher = trainable(...)  # the same weights, as diffusers runs them
    save_sla_weights("sla.safetensors", trainable.weights())
    trainable.remove()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import parallel
from dit_accel.arrangement import Arrangement
from dit_accel.engine import Engine
from dit_accel.errors import UsageError
from dit_accel.forwards import resolve_layers
from dit_accel.handle import set_processor
from dit_accel.methods import sla
from dit_accel.options import SparseOptions
from dit_accel.plan import BlockPlan
from dit_accel.processor import SparseProcessor
from dit_accel.report import Report, Tally
from dit_accel.sla.changed import ChangedTensors
from dit_accel.sla.layers import SlaLayers
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.weights import SlaWeights
from dit_accel.training.checkpointing import Checkpointing
from dit_accel.trajectory import Call, Trajectory


@dataclass(frozen=True)
class SlaOptions:
    """How SLA is to be trained. What is not said is what the method does by itself.

    Raises:
        UsageError: a value outside its range.
    """

    keep: float = 0.1  # share of key blocks to read
    variant: str = "complement"  # the linear part is over the keys that are not read; or "all"
    feature: str = "softmax"  # or "elu", "relu"
    negligible: float = 0.0  # share of key blocks in neither part
    mix: bool = False  # a learned ratio of the parts for each head (SLA2) instead of their sum
    order: str | None = None  # of the tokens
    block: int | None = None  # most tokens in one block
    tile: tuple[int, int, int] | None = None  # with order "tiles"
    dense_layers: tuple[int, ...] = ()  # layers that stay dense and learn nothing; negative ones count from the last
    linear_layers: tuple[int, ...] = ()  # layers that become linear attention alone; counted likewise
    impl: str = "auto"  # executor of the sparse part
    role: str = "transformer"  # which transformer of the pipeline this is; Wan 2.2's second expert is "transformer_2"

    def __post_init__(self) -> None:
        self.method()
        self.sparse()

    @classmethod
    def of(cls, spec: SlaSpec, **others: Any) -> SlaOptions:
        """As some weights were trained, to train on from there."""
        names = ("keep", "variant", "feature", "negligible", "order", "block", "tile", "linear_layers")
        same = {name: getattr(spec, name) for name in names} | {"role": spec.role or cls.role}
        return cls(**{**same, **others})

    def method(self) -> sla.Method:
        """The method, without weights of its own."""
        return sla.Method(self.keep, self.variant, self.feature, self.negligible)

    def sparse(self) -> SparseOptions:
        """Sparse attention wherever it is possible: a call that would be dense unplanned is an error."""
        names = ("keep", "order", "block", "tile", "dense_layers", "impl")
        same = {name: getattr(self, name) for name in names}
        return SparseOptions(method="sla", min_tokens=0, strict=True, **same)


class TrainableSla(nn.Module):
    """A transformer and the projections that its sparse layers learn; `make_trainable` makes it.

    It wraps the transformer, so that `parameters()`, DistributedDataParallel, accelerate and optimisers find
    everything, and calling it calls the transformer. The transformer itself has no parameter more, and its state dict
    is as before. Which of its own parameters learn is for the caller to say (`requires_grad_`, or an adapter of
    PEFT); the projections do. They are fp32 and are meant to stay so: cast the transformer, not the whole.

    A linear layer is linear attention alone, but for what runs within `blended`.

    Attention without gradients, as in validation, runs as it will at inference. For gradient checkpointing call the
    transformer's own `enable_gradient_checkpointing()`.
    """

    def __init__(self, transformer: nn.Module, options: SlaOptions) -> None:
        super().__init__()
        shape = attention_shape(transformer)
        if parallel.config_of(transformer) is not None:
            raise UsageError("SLA cannot be trained under context parallelism: split batches over processes instead.")
        self.options, self._shape = options, shape
        dense = resolve_layers("dense_layers", options.dense_layers, len(shape.layers))
        linear = resolve_layers("linear_layers", options.linear_layers, len(shape.layers))
        if dense & linear:
            raise UsageError(
                f"dense_layers and linear_layers both name layer {', '.join(map(str, sorted(dense & linear)))}: a "
                "layer stays dense or becomes linear; take it out of one of them."
            )
        learning = [layer for layer in shape.layers if layer not in dense]
        if not learning:
            raise UsageError("dense_layers names every layer, which leaves none to train: leave some out.")
        self.transformer = transformer
        device = next(transformer.parameters()).device
        heads = shape.heads if options.mix else None
        self.layers = SlaLayers(learning, shape.head_size, heads, device, linear)
        trajectory = Trajectory()
        self._learning = _Learning(self.layers, f"linear attention ({options.variant})", options.feature, linear)
        self._engine = Engine(
            transformer,
            options.sparse(),
            options.method(),
            trajectory,
            Tally.of(trajectory),
            options.role,
            weights=self._learning,
        )
        set_processor(transformer, SparseProcessor.of(self._engine))
        self._engine.settle()
        self._checkpointing = Checkpointing(self._engine, transformer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward."""
        return self.transformer(*args, **kwargs)

    def projections(self) -> Iterator[nn.Parameter]:
        """What the sparse layers learn, without the transformer's own parameters."""
        return self.layers.parameters()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Attend as diffusers does: the teacher's forwards, from the same weights."""
        before = self._engine.why_dense_now
        self._engine.why_dense_now = "the teacher's forward"
        try:
            yield
        finally:
            self._engine.why_dense_now = before

    @property
    def linear_layers(self) -> frozenset[int]:
        """The layers that are linear attention alone."""
        return self._learning.linear_layers

    @contextmanager
    def blended(self, share: float) -> Iterator[None]:
        """Within it linear layers give `share * dense + (1 - share) * linear`, to lead over from one to the other.

        The backward of what ran here belongs here too: gradient checkpointing computes it again.

        Args:
            share: 1 is dense attention as diffusers runs it, 0 the linear layer.

        Raises:
            UsageError: a share outside of 0 to 1.
        """
        if not 0 <= share <= 1:
            raise UsageError(f"share = {share}: a number from 0 (linear) to 1 (dense) is needed")
        before, self._learning.share = self._learning.share, share
        try:
            yield
        finally:
            self._learning.share = before

    def report(self) -> Report:
        """What ran; a part that gradient checkpointing computes again counts once."""
        return self._engine.report()

    def remove(self) -> None:
        """Give the transformer back its processors, by identity, and take every hook away. Nothing the second time.

        Its parameters stay as training left them.
        """
        self._checkpointing.remove()
        self._engine.remove()

    @property
    def spec(self) -> SlaSpec:
        """What `weights` says of itself."""
        arrangement: Arrangement = self._engine.layouts.arrangement
        options = self.options
        return SlaSpec(
            len(self._shape.layers),
            self._shape.head_size,
            type(self.transformer).__name__,
            options.role,
            options.variant,
            options.feature,
            options.keep,
            options.negligible,
            arrangement.order,
            arrangement.block,
            arrangement.tile,
            tuple(self.linear_layers),
        )

    def weights(self) -> SlaWeights:
        """Copies, on the CPU, of all that was learnt: the projections, and of the transformer what may learn.

        Low-rank adapters of PEFT go along as such, scaled as they act; other parameters of the transformer with
        `requires_grad` whole, in the type they have.
        """
        tensors, lora = _changed(self.transformer)
        return SlaWeights(self.spec, self.layers.values(), tensors, lora)

    def load(self, weights: SlaWeights) -> None:
        """Take over what was learnt before, into the projections and the transformer's parameters.

        Low-rank changes are added to the parameters they change: not for adapters that are still there.

        Raises:
            UsageError: weights of another variant or feature map, of other linear layers, with a mix where there is
                none or the other way round, or for another transformer. Nothing has been changed then.
        """
        for name in ("variant", "feature", "linear_layers"):
            self._check_same(name, weights.spec)
        layers = {int(number): layer for number, layer in self.layers.by_number.items()}
        weights.check_fits(self.transformer, layers)
        for number, layer in layers.items():
            if (layer.mix is None) != (weights.layers[number].mix is None):
                raise UsageError("SLA weights with a mix need SlaOptions(mix=True), and those without it mix=False.")
        changed = ChangedTensors(self.transformer, weights)
        self.layers.load({number: weights.layers[number] for number in layers})
        changed.put()

    def load_linear(self, weights: SlaWeights) -> None:
        """Take over the projections of the linear layers alone, say those that were fitted (`training.score`).

        Raises:
            UsageError: weights of another feature map, for another transformer, or without some of these layers as
                linear ones. Nothing has been changed then.
        """
        self._check_same("feature", weights.spec)
        weights.check_fits(self.transformer, self.linear_layers)
        others = sorted(self.linear_layers - set(weights.spec.linear_layers))
        if others:
            raise UsageError(
                f"These SLA weights have layer {', '.join(map(str, others))} sparse, and it is to be linear: its "
                "projection is of no use there. Give those of linear layers."
            )
        self.layers.load({number: weights.layers[number] for number in self.linear_layers})

    def _check_same(self, name: str, spec: SlaSpec) -> None:
        ours, theirs = getattr(self.spec, name), getattr(spec, name)
        if ours != theirs:
            raise UsageError(
                f"These SLA weights were trained with {name} {theirs!r}, and this is to be trained with {ours!r}: "
                f"give SlaOptions({name}={theirs!r}), or start anew."
            )

    def __repr__(self) -> str:
        return f"TrainableSla({self._engine!r})"


def make_trainable(transformer: nn.Module, options: SlaOptions | None = None) -> TrainableSla:
    """Install SLA with gradients on a transformer.

    Sparse and linear part, projection and the choice of blocks are those of method "sla": with the weights it gives,
    that computes the same. The choice has no gradient.

    Args:
        transformer: of any known family whose self-attentions can be sparse.
        options: none for the defaults.

    Raises:
        UnknownModelError: a transformer of no known family.
        UsageError: a layer that does not exist or is to be both dense and linear, all of them dense, or a transformer
            that is split over processes by context parallelism. The transformer is left as it was.
    """
    return TrainableSla(transformer, options or SlaOptions())


class _Learning:
    """The weights under training, as an engine holds them."""

    trains = True

    def __init__(self, layers: SlaLayers, title: str, feature: str, linear_layers: frozenset[int]) -> None:
        self.layers, self.title, self.feature, self.linear_layers = layers, title, feature, linear_layers
        self.share = 0.0  # of dense attention in linear layers

    @property
    def blends(self) -> bool:
        return self.share > 0

    def install(self) -> None:
        """The transformer's parameters are its own."""

    def show(self, trained: bool, transformer: nn.Module) -> None:
        """As `install`; who calls the teacher sees to its parameters."""

    def remove(self) -> None:
        """As `install`."""

    def bytes_held(self) -> int:
        return self.layers.bytes_held()

    def attend_linearly(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call, softmax: Tensor | None
    ) -> Tensor:
        """A linear layer's output, and dense attention by its share."""
        linear = self.layers.attend_linearly(query, key, value, call.layer, self.feature)
        return linear if softmax is None else torch.lerp(linear, softmax, self.share)

    def bytes_working(self, query: Tensor, plan: BlockPlan | None) -> int:
        return self.layers.bytes_working(query, plan)


def _changed(transformer: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Copies of what may learn in a transformer: whole parameters by their plain names, and low-rank pairs."""
    tensors: dict[str, Tensor] = {}
    lora: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in transformer.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            if f"{path}.weight" in lora:
                raise UsageError(f"{path} has several active adapters; keep the trained one active alone.")
            up = module.lora_B[name].weight.detach() * module.scaling[name]
            lora[f"{path}.weight"] = _copied(up), _copied(module.lora_A[name].weight.detach())
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            tensors[name.replace(".base_layer.", ".")] = _copied(parameter.detach())
    return tensors, lora


def _copied(x: Tensor) -> Tensor:
    return x.to("cpu", copy=True)
