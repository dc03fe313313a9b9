"""SparseOptions: what a user may say about sparse attention, checked when it is said.

Importing this module imports no torch, so that presets can be listed and dry runs shown without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dit_accel.arrangement import ORDERS
from dit_accel.errors import UsageError, unknown_name
from dit_accel.roles import ROLES, Own, check_roles, merge, split_roles
from dit_accel.rules import Rule, check_share

DENSE = ("host", "fastest")
IMPLS = ("auto", "cpu", "flash4", "flex", "hopper", "reference", "triton")
PRECISIONS = ("full", "int8_fp8", "fp8", "int8")

# Below so many tokens dense attention is taken to be faster. CPU: measured on two x86 cores in fp32 (4 heads of
# 64, prediction included), dense over sparse time at keep 0.5 was 0.87 at 1296 tokens, 1.15 at 2448 and 1.73 at
# 4352. CUDA: an estimate for models of ordinary width, from the launches of a prediction (about 0.2 ms) against dense
# times on an H100; tiny-wan with its 4 heads of 64 ran 0.89 times as fast at 4352 tokens and 1.10 times at 33792
# (keep 0.25, tiles, Triton kernel; scripts/results/tiny_wan_quality_*_h200.json).
BREAK_EVEN_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class SparseOptions:
    """Everything `SparseProcessor` can be told. A preset's `[sparse]` table has exactly these names.

    The options of the method itself (`neighbours`, ...) stand beside them in a flat mapping and are kept in
    `method_options`; `from_mapping` sorts them out and refuses a name that neither side knows. So do tables of options
    for one transformer of the pipeline alone (see `dit_accel.roles`), which are kept in `roles`.

    Raises:
        UsageError: a value outside its range; the message names the range.
    """

    method: str = "pooled"  # file name in dit_accel/methods
    keep: float | None = None  # requested share of visual key blocks, forced ones included; (0, 1]
    top_p: float | None = None  # keep the fewest blocks that hold this much predicted attention; (0, 1]
    # token order: "tiles" (space-time boxes), "packed" (near-boxes, all full), "gilbert" (runs of a Hilbert curve) or
    # "raster"; none: what the method was made for
    order: str | None = None
    block: int | None = None  # most tokens in one block; 8 to 128; none: what the method was made for
    tile: tuple[int, int, int] | None = None  # with order "tiles": frames, rows, columns of a tile, in tokens
    dense_above: float = 1.0  # dense while the noise level (timestep / training timesteps) is above this
    dense_below: float = 0.0  # dense while the noise level is below this
    dense_first: float = 0.0  # and in this share of a run's steps, the first ones, whatever their noise level
    dense_layers: tuple[int, ...] = ()  # layers that stay dense; negative ones count from the last
    rules: tuple[Rule, ...] = ()  # other values at some noise levels or in some layers; later ones win
    predict_every: int = 1  # predict in one step of so many, carry the plan over in between
    predict_drift: float = 1.0  # predict again once the noise level has fallen by more than this
    share_plans: bool = False  # a plan serves every branch of a step (cond and uncond)
    impl: str = "auto"  # executor; "auto" chooses and says so, a name runs or raises
    precision: str = (
        "full"  # "full" or a quantised mode: "int8_fp8" (q k^T in int8, p v in fp8), "fp8", "int8"
    )
    tune: bool = False  # try configurations of the Triton kernel at the first call of each kind
    dense: str = "host"  # planned dense calls: "host", what diffusers runs, or the "fastest" kernel present
    min_tokens: int | None = None  # dense below so many tokens; None: the measured break-even of the device
    drift_every: int | None = None  # compare some rows with dense attention in one step of so many; none: never
    drift_limit: float | None = None  # and raise keep where they are further apart than this, relatively
    strict: bool = False  # raise where a call would fall back to dense unplanned
    method_options: Mapping[str, Any] = field(default_factory=dict)  # what the method itself takes
    roles: Mapping[str, Own] = field(default_factory=dict)  # by role: a transformer's own options, or False for dense

    def __post_init__(self) -> None:
        for name in ("dense_layers", "tile"):
            value = getattr(self, name)
            listed = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
            _need(listed or (name == "tile" and value is None), name, value, "a list of whole numbers")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        object.__setattr__(self, "method_options", dict(self.method_options))
        _need(isinstance(self.method, str), "method", self.method, "a method's name")
        check_share("keep", self.keep)
        check_share("top_p", self.top_p)
        self._check_arrangement()
        self._check_rules()
        if self.order is not None and self.order not in ORDERS:
            raise unknown_name("token order", self.order, ORDERS)
        if self.impl not in IMPLS:
            raise unknown_name("executor", self.impl, IMPLS)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.dense not in DENSE:
            raise unknown_name("dense attention", self.dense, DENSE)
        for name in ("dense_above", "dense_below", "predict_drift"):
            value = getattr(self, name)
            _need(_is_number(value) and 0 <= value <= 1, name, value, "a noise level from 0 to 1")
        fits = _is_number(self.dense_first) and 0 <= self.dense_first <= 1
        _need(fits, "dense_first", self.dense_first, "a share of the steps from 0 to 1")
        _need(
            all(map(_is_int, self.dense_layers)), "dense_layers", self.dense_layers, "a list of whole numbers"
        )
        fits = self.min_tokens is None or (_is_int(self.min_tokens) and self.min_tokens >= 0)
        _need(
            fits, "min_tokens", self.min_tokens, "a whole number from 0, or nothing for the measured default"
        )
        fits = _is_int(self.predict_every) and self.predict_every >= 1
        _need(fits, "predict_every", self.predict_every, "a whole number from 1")
        fits = self.drift_every is None or (_is_int(self.drift_every) and self.drift_every >= 1)
        _need(fits, "drift_every", self.drift_every, "a whole number from 1, or nothing for no drift guard")
        fits = self.drift_limit is None or (_is_number(self.drift_limit) and self.drift_limit > 0)
        _need(fits, "drift_limit", self.drift_limit, "a relative error above 0, say 0.2")
        if (self.drift_every is None) != (self.drift_limit is None):
            raise UsageError(
                f"drift_every={self.drift_every!r} and drift_limit={self.drift_limit!r} go together: one says in which "
                "steps to look, the other how far apart is too far. Give both (say 4 and 0.2), or neither."
            )
        for name in ("strict", "tune", "share_plans"):
            _need(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        if self.tune and (self.impl not in ("auto", "triton") or self.precision != "full"):
            raise UsageError(
                f"tune=True with impl={self.impl!r} and precision={self.precision!r} has nothing to choose from: it "
                "is for impl 'triton' (or 'auto', where that runs) and precision 'full'."
            )
        object.__setattr__(self, "roles", check_roles(self.roles, "sparse", self.for_role))

    def n_dense_first(self, steps: int) -> int:
        """How many of a run's steps `dense_first` makes dense: its share of them, rounded up."""
        return math.ceil(self.dense_first * steps - 1e-9)  # 0.1 of 30 is 3, though floats say a little more

    def least_tokens(self, device: str) -> int:
        """From how many tokens on attention is sparse on a type of device: `min_tokens`, or where it breaks even."""
        measured = BREAK_EVEN_TOKENS.get(device, max(BREAK_EVEN_TOKENS.values()))
        return measured if self.min_tokens is None else self.min_tokens

    def _check_arrangement(self) -> None:
        fits = self.block is None or (_is_int(self.block) and 8 <= self.block <= 128)
        _need(
            fits,
            "block",
            self.block,
            "a whole number from 8 to 128, or nothing for what the method was made for",
        )
        if self.tile is not None:
            object.__setattr__(self, "tile", tuple(self.tile))
            fits = len(self.tile) == 3 and all(_is_int(edge) and edge >= 1 for edge in self.tile)
            _need(fits, "tile", self.tile, "three whole numbers from 1: frames, rows and columns")

    def _check_rules(self) -> None:
        from dit_accel.methods import method_options  # it imports no torch

        rules = self.rules if isinstance(self.rules, list | tuple) else [self.rules]
        if any(not isinstance(rule, Rule) for rule in rules):
            allowed = method_options(self.method) | {"keep", "top_p"}
            rules = [r if isinstance(r, Rule) else Rule.from_mapping(r, allowed, self.method) for r in rules]
        object.__setattr__(self, "rules", tuple(rules))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> SparseOptions:
        """Build from a flat mapping (a preset's `[sparse]` table, or keyword arguments).

        Raises:
            UnknownNameError: a key that is neither an option nor one of the method's own.
            UsageError: a value outside its range.
        """
        own = {f.name for f in fields(cls)} - {"method_options", "roles"}
        options, roles = split_roles(options)
        known = {key: value for key, value in options.items() if key in own}
        method = known.get("method", cls.method)
        rest = {key: value for key, value in options.items() if key not in own}
        if rest:
            from dit_accel.methods import method_options

            allowed = method_options(method)
            for key in rest:
                if key not in allowed:
                    raise unknown_name(f"sparse option (method {method!r})", key, own | allowed | set(ROLES))
        return cls(**known, method_options=rest, roles=roles)

    def to_mapping(self) -> dict[str, Any]:
        """The flat mapping that `from_mapping` turns into an equal object; JSON-able."""
        apart = ("method_options", "roles")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        own |= {"dense_layers": list(self.dense_layers), "rules": [rule.to_mapping() for rule in self.rules]}
        own["tile"] = None if self.tile is None else list(self.tile)
        return {**own, **self.method_options, **self.roles}

    def for_role(self, role: str) -> SparseOptions | None:
        """The options of one transformer of the pipeline; None where it is to be dense."""
        own = self.roles.get(role, {})
        if own is False:
            return None
        common, _ = split_roles(self.to_mapping())
        return type(self).from_mapping(_override(common, own))

    def merged(self, overrides: Mapping[str, Any]) -> SparseOptions:
        """These options with some replaced, as `override` has it."""
        return type(self).from_mapping(override(self.to_mapping(), overrides))


def override(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """One flat mapping of options with values of another put over it.

    A change of method drops what was said to the former one: its own options, rules, and the arrangement of tokens,
    which the new method has one of its own for.
    """
    return merge(base, changes, _override, "method")


def _override(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """As `override`, of options without roles."""
    base, method = dict(base), base.get("method", SparseOptions.method)
    if changes.get("method", method) != method:
        from dit_accel.methods import method_names, method_options

        own = method_options(method) if method in method_names() else set()
        base = {
            key: value for key, value in base.items() if key not in own | {"order", "block", "tile", "rules"}
        }
    return {**base, **changes}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _need(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise UsageError(f"{name}={value!r} is not possible: {name} is {rule}.")
