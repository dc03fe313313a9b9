"""Which options make a sparse method keep a wanted share: the table of methods for `bench_methods.py`, and the search.

Methods are compared at equal *achieved* keep. Some are told what to keep; of others (a threshold, a window, a decay)
one has to try values until what they keep comes out near enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.layout import TokenLayout
from dit_accel.methods import method_names

Options = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """How one method is made to keep more or less. What is not named here is the method's own default."""

    # Fixed options in order of preference: the first ones with which the wanted share can be had are taken.
    options: tuple[Options, ...] = ({},)
    knob: str = "keep"  # the option that is searched
    span: tuple[float, float] = (0.002, 1.0)  # of the knob; what is kept must rise or fall all along it
    log: bool = True  # search by factors, not by differences
    # instead of a span: every setting worth trying for a layout, in order of preference
    choices: Callable[[TokenLayout], Iterator[Options]] | None = None
    static: bool = (
        False  # plans follow from the layout alone: what they keep is found without running the model
    )
    adaptive: bool = True  # chooses blocks by what the tokens hold
    whole_run: bool = False  # keeps less and less: only a run of all steps tells how much
    # the method, where the entry's name is not its own; such entries run when they are named or with "all"
    of: str | None = None
    keeps: tuple[float, ...] | None = None  # only at these, where they are asked for; none: at all


@dataclass(frozen=True)
class Fit:
    """Options of a method, beside its defaults, and what they were found to keep."""

    options: Options
    keep: float
    reached: bool  # whether that stands for the wanted share


def windows(layout: TokenLayout) -> Iterator[Options]:
    """Windows of whole tiles, an odd number of them or all; first those that see alike shares of all axes."""
    axes = []
    for length, edge in zip(layout.grid, tile_edges(layout), strict=True):
        axes.append(sorted({*range(edge, length, 2 * edge), length}))
    shares = {
        window: [tokens / length for tokens, length in zip(window, layout.grid, strict=True)]
        for window in itertools.product(*axes)
        if window[1] <= window[2]
        or axes[1] != axes[2]  # where rows and columns are alike, one of each two will do
    }
    for window in sorted(shares, key=lambda w: max(shares[w]) / min(shares[w])):
        yield {"window": list(window)}


def discs(layout: TokenLayout) -> Iterator[Options]:
    """Discs in all frames, as the method has them; for shares below theirs, in near frames, first about as many."""
    radii = [round(1.25**n, 2) for n in range(18)]
    yield from ({"radius": r} for r in radii)
    depths = [n for n in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if n < layout.grid[0]]
    for r, depth in sorted(itertools.product(radii, depths), key=lambda p: abs(math.log((p[1] + 1) / p[0]))):
        yield {"radius": r, "frame_radius": depth}


# Its own top_p and forced blocks keep more than the smallest shares, most of all in small grids.
RECTIFIED: tuple[Options, ...] = (
    {},
    {"top_p": 1e-6},
    {"top_p": 1e-6, "neighbours": 0},
    {"top_p": 1e-6, "neighbours": 0, "anchor": False},
)


# Blocks under its veto are read whatever the budget; at -1 it never speaks, as in the published code's default.
SPARGE: tuple[Options, ...] = ({}, {"similarity": -1.0})
SVG2: tuple[Options, ...] = ({}, {"min_keep": 0.03}, {"min_keep": 0.0})  # floors, as nabla's
NABLA: tuple[Options, ...] = ({}, {"keep": 0.05}, {"keep": 0.001})
FEW = (0.25, 0.15, 0.10)  # of the keeps, for variations of a method
FORCED = 2.0  # times the budget may be kept, no more


def _and(fixed: tuple[Options, ...], **options: Any) -> tuple[Options, ...]:
    return tuple({**one, **options} for one in fixed)


METHODS: Mapping[str, Entry] = {
    "pooled": Entry(),
    "rectified": Entry(RECTIFIED),
    "sparge": Entry(SPARGE),
    "svg1": Entry(({"compensation": "none"},)),  # as published
    "svg2": Entry(SVG2, knob="top_p"),
    "nabla": Entry(NABLA, knob="top_p"),
    "sla": Entry(),  # without weights: its choice of blocks alone
    "lite": Entry(knob="threshold", span=(-24.0, 0.0), log=False, whole_run=True),
    # A band is never narrower than a block, which is a large part of a small frame.
    "radial": Entry(
        options=({}, {"block": 64}, {"block": 32}, {"block": 32, "first_frame": False}),
        knob="decay_factor",
        span=(0.01, 50.0),
        static=True,
        adaptive=False,
    ),
    "neighborhood": Entry(knob="window", choices=windows, static=True, adaptive=False),
    "clear": Entry(knob="radius", choices=discs, static=True, adaptive=False),
    # What a part of a method is worth, and what a plan that serves longer costs.
    "rectified, nothing back": Entry(_and(RECTIFIED, compensation="none"), of="rectified", keeps=FEW),
    "rectified, all back": Entry(_and(RECTIFIED, compensation="all"), of="rectified", keeps=FEW),
    "rectified, mass predicted": Entry(_and(RECTIFIED, mass="predicted"), of="rectified", keeps=FEW),
    "rectified, by share": Entry(({"keep": 0.02},), knob="top_p", of="rectified", keeps=FEW),
    "rectified, all back, one plan for both": Entry(
        _and(RECTIFIED, compensation="all", share_plans=True), of="rectified", keeps=FEW
    ),
    "rectified, first frame free": Entry(
        ({"anchor": False}, *_and(RECTIFIED[1:], anchor=False)), of="rectified", keeps=FEW
    ),
    "svg1, all back": Entry(({"compensation": "all"},), of="svg1", keeps=FEW),
    "svg2, blocks of 128": Entry(_and(SVG2, block=128), knob="top_p", of="svg2", keeps=FEW),
    "nabla, no floor": Entry(({"keep": 0.001},), knob="top_p", of="nabla", keeps=FEW),
    "pooled, packed": Entry(({"order": "packed"},), of="pooled", keeps=FEW),
    "pooled, every 3 steps": Entry(({"predict_every": 3},), of="pooled", keeps=FEW),
    "pooled, every 3 steps, one plan for both": Entry(
        ({"predict_every": 3, "share_plans": True},), of="pooled", keeps=FEW
    ),
    **{
        f"{name}, one plan for both": Entry(_and(options, share_plans=True), knob=knob, of=name, keeps=keeps)
        for name, options, knob, keeps in (
            ("pooled", ({},), "keep", FEW),
            ("rectified", RECTIFIED, "keep", FEW),
            ("sparge", SPARGE, "keep", FEW),
            ("svg2", SVG2, "top_p", (*FEW, 0.05)),
            ("nabla", NABLA, "top_p", FEW),
        )
    },
}


def chosen_methods(asked: list[str] | None) -> list[str]:
    """The entries to compare: those asked for, every method there is but the control, or with "all" the variations too.

    Raises:
        SystemExit: an entry that does not exist, or a method the table says nothing about.
    """
    there = [name for name in method_names() if name != "random"]
    if asked == ["all"]:
        asked = list(METHODS)
    for name in asked or there:
        if name not in METHODS and name in there:
            raise SystemExit(f"method {name}: say in scripts/_method_table.py how it is made to keep a share")
        if name not in METHODS or (METHODS[name].of or name) not in there:
            raise SystemExit(
                f"--methods {name!r}: there are {', '.join(map(repr, METHODS))}; random is always run"
            )
    return asked or there


def fit(
    entry: Entry, wanted: float, keeps: Callable[[Options], float], layout: TokenLayout, close: float
) -> Fit:
    """The options that keep a wanted share, or come nearest to it.

    Args:
        keeps: what some options keep.
        layout: the method's, for `choices`.
        close: a difference that is not worth another trial.
    """
    found: list[Fit] = []
    if entry.choices is not None:
        near = max(close, 0.05 * wanted)
        for options in entry.choices(layout):
            keep = keeps(options)
            found.append(Fit(options, keep, reaches(keep, wanted, near)))
            if abs(keep - wanted) <= near:
                return found[-1]
    else:
        for fixed in _budgets_first(entry, wanted, keeps):
            found.append(_search(entry, fixed, wanted, keeps, close))
            if found[-1].reached:
                return found[-1]
    return min(found, key=lambda one: abs(one.keep - wanted))


def _budgets_first(entry: Entry, wanted: float, keeps: Callable[[Options], float]) -> Iterator[Options]:
    """Fixed options; where the knob says what to keep, first those with which it does.

    A method that is told to keep less than its forced blocks does keep what was wanted for some value of the knob, but
    chooses nothing any more.
    """
    if entry.knob == "keep":
        for fixed in entry.options:
            if reaches(keeps({**fixed, "keep": wanted}), wanted, 0.0):
                yield fixed
    yield from entry.options


def reaches(keep: float, wanted: float, close: float) -> bool:
    """Whether a kept share stands for the wanted one. Few blocks make coarse shares: .059 stands for .05."""
    return abs(keep - wanted) <= max(0.02, 0.15 * wanted, close) + 1e-6


def _search(
    entry: Entry, fixed: Options, wanted: float, keeps: Callable[[Options], float], close: float
) -> Fit:
    """Bisect the knob. What is kept may rise or fall with it, and may do so in steps.

    Of budgets, one below what is forced anyway is no answer: the method would choose nothing. Nor is one of which
    forced blocks make more than double, as an anchored first frame does in small grids: they decide then.
    """
    known: dict[float, float] = {}
    lowest = float(f"{entry.span[0]:.4g}")

    def chooses(value: float) -> bool:
        if entry.knob != "keep":
            return True
        return known[value] != known.get(lowest) and known[value] <= FORCED * value

    def fits(value: float) -> bool:
        value = float(f"{value:.4g}")
        if value not in known:
            known[value] = keeps({**fixed, entry.knob: value})
        return abs(known[value] - wanted) <= close and chooses(value)

    first = (wanted,) if entry.knob == "keep" else ()  # most methods keep what they are told
    if not any(map(fits, (*first, *entry.span))):
        for _ in range(12):
            value = _between(known, wanted, entry.log)
            if value is None or float(f"{value:.4g}") in known or fits(value):
                break

    def answers(value: float) -> bool:
        return chooses(value) and reaches(known[value], wanted, close)

    near = [value for value in sorted(known) if answers(value)] or sorted(known)
    value = min(near, key=lambda value: abs(known[value] - wanted))
    return Fit({**fixed, entry.knob: value}, known[value], answers(value))


def _between(known: Mapping[float, float], wanted: float, log: bool) -> float | None:
    """A value between two neighbouring ones of which one keeps more than wanted, one less; None: there are none."""
    for low, high in itertools.pairwise(sorted(known)):
        if (known[low] - wanted) * (known[high] - wanted) <= 0:
            return math.sqrt(low * high) if log else (low + high) / 2
    return None


def tile_edges(layout: TokenLayout) -> tuple[int, int, int]:
    """Edges of a layout's first tile, in tokens; one token where the blocks are not tiles."""
    if layout.order != "tiles":
        return (1, 1, 1)
    tile = layout.coordinates()[: int(layout.sizes[0])]
    return tuple((tile.amax(0) - tile.amin(0) + 1).tolist())
