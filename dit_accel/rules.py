"""Rules: other values of a method's options at some noise levels or in some layers.

In a preset:

    [[fast.sparse.rules]]
    above = 0.9           # from this noise level on
    layers = [0, 1]
    keep = 0.5

Later rules win. A rule may also say `dense = true`. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_accel.errors import UsageError, unknown_name

_SHARES = ("keep", "top_p")
_OWN = ("above", "below", "layers", "dense")


@dataclass(frozen=True)
class Rule:
    """Where it holds, and what holds there.

    Raises:
        UsageError: a condition outside its range, or nothing that changes.
    """

    above: float = 0.0  # holds from this noise level on
    below: float | None = None  # and under this one; none: however noisy
    layers: tuple[int, ...] | None = None  # in these; negative ones count from the last; none: in all
    dense: bool = False  # attend densely there
    values: Mapping[str, Any] = field(default_factory=dict)  # the method's options there

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", dict(self.values))
        for name in ("above", "below"):
            value = getattr(self, name)
            if name == "below" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise UsageError(
                    f"A rule's {name}={value!r} is not possible: {name} is a noise level from 0 to 1."
                )
        if self.layers is not None:
            listed = isinstance(self.layers, Iterable) and not isinstance(self.layers, str | Mapping)
            object.__setattr__(self, "layers", tuple(self.layers) if listed else self.layers)
            if not listed or not all(isinstance(at, int) and not isinstance(at, bool) for at in self.layers):
                raise UsageError(
                    f"A rule's layers={self.layers!r} is not possible: layers is a list of whole numbers."
                )
        for name in _SHARES:
            check_share(name, self.values.get(name))
        if not isinstance(self.dense, bool) or (not self.dense and not self.values):
            raise UsageError(
                "A rule changes nothing: give it an option of the method, say keep = 0.5, or dense = true."
            )

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any], allowed: set[str], method: str) -> Rule:
        """Build from a preset's table.

        Args:
            allowed: the options of the method.
            method: its name, for the message.

        Raises:
            UnknownNameError: a key that is neither a condition nor one of them.
            UsageError: not a table, or a value outside its range.
        """
        if not isinstance(table, Mapping):
            raise UsageError(
                f"rules holds {table!r}: write each rule as a table, say {{above = 0.9, keep = 0.5}}."
            )
        for key in table:
            if key not in _OWN and key not in allowed:
                raise unknown_name(f"key of a rule (method {method!r})", key, {*_OWN, *allowed})
        conditions = {key: table[key] for key in _OWN if key in table}
        return cls(**conditions, values={key: value for key, value in table.items() if key not in _OWN})

    def to_mapping(self) -> dict[str, Any]:
        """The table that `from_mapping` turns into an equal rule."""
        table: dict[str, Any] = {"above": self.above} if self.above else {}
        if self.below is not None:
            table["below"] = self.below
        if self.layers is not None:
            table["layers"] = list(self.layers)
        return {**table, **({"dense": True} if self.dense else {}), **self.values}

    def holds(self, noise: float, layer: int, n_layers: int) -> bool:
        """Whether it holds at this noise level in this layer of so many."""
        if noise < self.above or (self.below is not None and noise >= self.below):
            return False
        return self.layers is None or any(at % n_layers == layer for at in self.layers)


def check_share(name: str, value: object) -> None:
    """Refuse what is neither nothing nor a share.

    Raises:
        UsageError: with the name and the range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= 1):
        raise UsageError(f"{name}={value!r} is not possible: {name} is a share above 0 and up to 1.")
