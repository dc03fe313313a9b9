"""Region: what may be said about region-adaptive sampling, checked when it is said. Importing this imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import UsageError, unknown_name
from dit_accel.roles import ROLES, Own, check_roles, merge, split_roles

SELECTORS = ("std", "l2", "change", "random", "mask")
KEYS = ("cached", "drop")
UNITS = ("token", "block")


@dataclass(frozen=True)
class Region:
    """Options of region-adaptive sampling. A preset's `[region]` table has these names, but for `mask`.

    Steps are given as whole numbers, or as shares of the run below 1.

    Raises:
        UsageError: a value outside its range; the message names the range.
    """

    sample_ratio: float = 0.5  # share of the tokens computed at a step, rounded up to whole buckets; 1: no sampling
    # by what tokens are chosen: "std" or "l2" of their velocity over channels, the "change" that is to be expected of
    # it, "random" (a control), or a "mask"
    selector: str = "std"
    high_ratio: float = 0.0  # of the tokens left out, the share taken where the measure is highest; the rest lowest
    # chosen on six prompts of tiny-wan, to be confirmed on others: at 1 "std" came out 1.6 dB nearer to dense than
    # "random" did, at the published .1 no nearer
    starvation: float = 1.0  # how fast a token gains in urgency with each step it is left out
    start: int | float = 0.15  # steps computed whole at first; at least one is
    error_reset: tuple[int | float, ...] = (0.4, 0.7)  # steps computed whole in between; the last one always is
    keys: str = "cached"  # tokens left out: "cached" keeps their keys and values, "drop" does without them
    layers: int | None = None  # with "cached": in how many of the last layers; none: in all
    bucket: int = 64  # the number of tokens computed is a multiple of this; of unit "token"
    # what is chosen: single tokens, or whole blocks of sparse attention's order, and then their steps attend sparsely
    unit: str = "token"
    memory: float | None = None  # GiB that may be kept; none: what is free on a CUDA device, elsewhere no limit
    seed: int = 0  # of selector "random"
    # with selector "mask": what is computed first, nonzero in [frames, rows, columns] tokens, or [B, ...] of these
    mask: Any = dataclasses.field(default=None, repr=False, compare=False)
    # by role: a transformer's own options, or False to compute all of its tokens (see `dit_accel.roles`)
    roles: Mapping[str, Own] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("sample_ratio",):
            value = getattr(self, name)
            _need(_number(value) and 0 < value <= 1, name, value, "above 0 and at most 1")
        if self.selector not in SELECTORS:
            raise unknown_name("selector of region sampling", self.selector, SELECTORS)
        if self.keys not in KEYS:
            raise unknown_name("keys of region sampling", self.keys, KEYS)
        if self.unit not in UNITS:
            raise unknown_name("unit of region sampling", self.unit, UNITS)
        _need(_number(self.high_ratio) and 0 <= self.high_ratio <= 1, "high_ratio", self.high_ratio, "from 0 to 1")
        _need(_number(self.starvation) and self.starvation >= 0, "starvation", self.starvation, "a number from 0 on")
        _need(_step(self.start), "start", self.start, "a number of steps from 0 on, or a share below 1")
        resets = self.error_reset if isinstance(self.error_reset, list | tuple) else (self.error_reset,)
        object.__setattr__(self, "error_reset", tuple(resets))
        _need(all(map(_step, resets)), "error_reset", self.error_reset, "step numbers from 0 on, or shares below 1")
        fits = self.layers is None or (_whole(self.layers) and self.layers >= 1)
        _need(fits, "layers", self.layers, "a whole number from 1 on")
        _need(_whole(self.bucket) and self.bucket >= 1, "bucket", self.bucket, "a whole number from 1 on")
        fits = self.memory is None or (_number(self.memory) and self.memory >= 0)
        _need(fits, "memory", self.memory, "GiB, a number from 0 on")
        _need(_whole(self.seed), "seed", self.seed, "a whole number")
        if (self.selector == "mask") != (self.mask is not None):
            raise UsageError(
                f"region option selector={self.selector!r} {'needs a' if self.mask is None else 'looks at no'} mask: "
                "give both selector='mask' and mask=, a tensor of [frames, rows, columns] tokens, or neither."
            )
        if self.unit == "block" and self.keys == "drop":
            raise UsageError(
                "region option unit='block' attends to the keys of all tokens, and keys='drop' keeps none. Drop one."
            )
        if self.layers is not None and self.keys == "drop":
            raise UsageError("region option layers says where keys are kept, and keys='drop' keeps none. Drop one.")
        object.__setattr__(self, "roles", check_roles(self.roles, "region", self.for_role))

    def to_mapping(self) -> dict[str, Any]:
        """All options by name, as in a preset's `[region]` table. JSON-able; a mask is left out."""
        own = self._said()
        own.pop("mask")
        return {**own, "error_reset": list(self.error_reset), **self.roles}

    def for_role(self, role: str) -> Region:
        """The options of one transformer of the pipeline. One that is left out computes every token."""
        own = self.roles.get(role, {})
        return Region(sample_ratio=1.0) if own is False else load_region({**self._said(), **own})

    def _said(self) -> dict[str, Any]:
        """What holds for all roles."""
        return {name: getattr(self, name) for name in _options()}


def load_region(given: Mapping[str, Any] | Region) -> Region:
    """Build the options.

    Args:
        given: a mapping of options, as a preset's `[region]` table, in which may be tables for single transformers
            (see `dit_accel.roles`); or options.

    Raises:
        UnknownNameError: an option that there is not.
        UsageError: a value outside its range.
    """
    if isinstance(given, Region):
        return given
    if not isinstance(given, Mapping):
        raise UsageError(f"region={given!r}: give a mapping of options, such as {{'sample_ratio': 0.5}}, or a Region")
    common, roles = split_roles(given)
    for key in common:
        if key not in _options():
            raise unknown_name("option of region sampling", key, {*_options(), *ROLES})
    return Region(**common, roles=roles)


def override_region(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of options with values of another put over it."""
    return merge(base, changes, lambda base, changes: {**base, **changes})


def _options() -> list[str]:
    return [field.name for field in dataclasses.fields(Region) if field.name != "roles"]


def _need(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UsageError(f"region option {name}={value!r} is out of range: {allowed}.")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _step(value: Any) -> bool:
    return (_whole(value) and value >= 0) or (isinstance(value, float) and 0 <= value < 1)
