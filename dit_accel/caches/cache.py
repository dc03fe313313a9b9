"""Cache: what all step caches share, and what one sees of a step."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.caches.schedule import parse_schedule
from dit_accel.errors import UsageError
from dit_accel.roles import Own, check_roles, split_roles

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dit_accel.trajectory import Call

# the output, or what the blocks add to the tokens of image or video; what they add to the text's, if they return any
Parts = tuple["Tensor", "Tensor | None"]
NEVER = float("inf")  # the error of a reuse that cannot be
DEVICES = ("auto", "cpu")
OVER = ("noise", "step")  # what a polynomial may be one of


@dataclass(frozen=True)
class View:
    """What a cache sees of one step before it is computed.

    For boundary "call", `x` is the transformer's latent input, without the channels that condition it. For boundary
    "stack" it is the tokens `[B, S, C]` where the blocks begin that may be left out, and `lead` what the blocks before
    them added to these tokens, if there are any.
    """

    call: Call
    x: Tensor
    lead: Tensor | None = None
    block: nn.Module | None = None  # the first block that may be left out
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # that this block is given, by name


@dataclass(frozen=True)
class Cache(ABC):
    """Limits that hold for every cache.

    Raises:
        UsageError: a value outside its range; the message names the range.
    """

    boundary: ClassVar[str] = "call"
    shared: ClassVar[bool] = False  # whether one branch of guidance decides for all
    head: ClassVar[int] = 0  # blocks at either end that are always computed
    tail: ClassVar[int] = 0

    threshold: float = 0.05  # reuse where the cache expects an error below this; 0 computes everything
    warmup: int = 1  # steps that each transformer of a pipeline computes first
    compute_above: float = 1.0  # compute while the noise level is above this
    compute_below: float = 0.0  # compute while the noise level is below this
    max_consecutive: int | None = None  # most steps in a row that are made up
    max_reused: int | None = None  # most steps of a run that are made up
    # decisions made beforehand, a digit a step: 1 computes, 0 reuses; nothing is judged; or one for each
    # branch: "cond=10; uncond=11"
    schedule: str | None = None
    dry_run: bool = False  # compute every step, and note what reuse would have cost
    min_steps: int = 10  # off where the schedule has fewer steps: such models leave no step like the one before
    store_device: str = "auto"  # where memory is kept between steps: "auto", where it is made, or "cpu"
    # by role: a transformer's own options, or False to compute it always (see `dit_accel.roles`)
    roles: Mapping[str, Own] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        need(number(self.threshold) and self.threshold >= 0, "threshold", self.threshold, "a number from 0 on")
        need(whole(self.warmup) and self.warmup >= 1, "warmup", self.warmup, "a whole number from 1 on")
        for name in ("compute_above", "compute_below"):
            value = getattr(self, name)
            need(number(value) and 0 <= value <= 1, name, value, "a noise level from 0 to 1")
        for name in ("max_consecutive", "max_reused"):
            value = getattr(self, name)
            need(value is None or (whole(value) and value >= 0), name, value, "a whole number from 0 on")
        if whole(self.schedule):  # digits without quotes are a number in TOML
            object.__setattr__(self, "schedule", str(self.schedule))
        if self.schedule is not None:
            self._check_schedule()
        need(isinstance(self.dry_run, bool), "dry_run", self.dry_run, "true or false")
        need(whole(self.min_steps) and self.min_steps >= 0, "min_steps", self.min_steps, "a whole number from 0 on")
        need(self.store_device in DEVICES, "store_device", self.store_device, " or ".join(map(repr, DEVICES)))
        if self.schedule is not None and self.dry_run:
            raise UsageError("schedule and dry_run exclude each other: a dry run computes every step. Drop one.")
        object.__setattr__(self, "roles", check_roles(self.roles, "cache", self.for_role))

    def _check_schedule(self) -> None:
        try:
            parse_schedule(self.schedule)
        except (AttributeError, ValueError):
            need(
                False, "schedule", self.schedule,
                "a text of 1 (compute) and 0 (reuse), a digit a step, the first of them 1; or such a text for each "
                "branch, as in 'cond=1101; uncond=1111'",
            )  # fmt: skip

    @property
    def name(self) -> str:
        """The file's name."""
        return type(self).__module__.rpartition(".")[2]

    def to_mapping(self) -> dict[str, Any]:
        """The name and all options, as in a preset's `[cache]` table."""
        own = dataclasses.asdict(self)
        roles = own.pop("roles")
        return {"name": self.name, **own, **roles}

    def for_role(self, role: str) -> Cache | None:
        """The cache of one transformer of the pipeline; None where it is to have none."""
        from dit_accel.caches import load_cache, override_cache

        own = self.roles.get(role, {})
        if own is False:
            return None
        common, _ = split_roles(self.to_mapping())
        if own.get("name", self.name) != self.name:  # another cache has defaults of its own
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            common = {key: value for key, value in common.items() if key == "name" or value != defaults[key]}
        return load_cache(override_cache(common, own))

    @abstractmethod
    def judge(self, view: View, memory: dict[str, Any]) -> float:
        """The error that reuse would make at this step; `NEVER` where the memory does not suffice.

        Args:
            memory: the branch's; what is written into it is kept if the forward returns.
        """

    @abstractmethod
    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        """Take from a computed step what later ones need. The tensors are the cache's own."""

    @abstractmethod
    def kept(self) -> dict[str, int]:
        """The most tensors that one branch's memory holds, by kind, of which `CacheEngine.declare` makes bytes.

        "latents"; "hidden", tokens of image or video; "text", tokens of it; "time", a projected time embedding;
        "figures", a number for each sample; "modules", what each attention and MLP of the blocks gives; "ages", a
        small number for each token of each block.
        """


class StepCache(Cache):
    """One that makes up the output, or what the blocks add, as a whole: boundary "call" or "stack"."""

    @abstractmethod
    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        """What stands for a step that is not computed."""


def need(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UsageError(f"cache option {name}={value!r} is out of range: {allowed}.")


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_order(order: int, over: str) -> None:
    """Raises UsageError for options out of range."""
    need(whole(order) and order in (0, 1, 2), "order", order, "0, 1 or 2")
    need(over in OVER, "over", over, " or ".join(map(repr, OVER)))


def place_of(call: Call, over: str) -> float:
    """Where a forward stands: its noise level, or the number of its step with a minus, for places fall."""
    return call.noise if over == "noise" else -float(call.step)
