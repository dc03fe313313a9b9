"""Presets: named settings in TOML, read without importing torch.

A preset is one table. It may extend one other preset, in the same file or shipped with the package:

    [tiny-wan-fast]
    extends = "tiny-wan"
    description = "..."
    level = "fast"
    [tiny-wan-fast.sparse]
    keep = 0.25

A preset is asked for by name (`tiny-wan-fast`: shipped, or the user's own, see `dit_accel.preset_files`), by file
(`my.toml`, when it holds one table) or by one table of a file (`my.toml#fast`). Every value remembers where it came
from: `Preset.sources`. What a preset claims of itself (status, level, provenance) holds for it as it is written: it is
not inherited, and stands as it was beside values that are replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.caches import Cache, load_cache, override_cache
from dit_accel.errors import DitAccelError, UsageError, one_line, unknown_name
from dit_accel.methods import load_method
from dit_accel.options import SparseOptions, override
from dit_accel.pipelines import RECIPES
from dit_accel.preset_files import PresetFile, Shelf, Tables, read_preset_file, read_shelf, read_shipped
from dit_accel.provenance import Provenance, read_provenance
from dit_accel.region.options import Region, load_region, override_region
from dit_accel.roles import ROLES, nest, spread
from dit_accel.typed import check_finite, check_type

STATUSES = ("measured", "provisional")
LEVELS = ("exact", "balanced", "fast", "turbo")  # from what diffusers computes to what is farthest from it
_HEAD = {"description": str, "pipeline": str, "model": str}
_CLAIMS = {"status": STATUSES, "level": LEVELS}  # of a preset as it is written; not inherited
_GROUPS = ("generate", "sparse", "cache", "region")

Layers = tuple[tuple[str, Mapping[str, Any]], ...]  # (source, table)


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate, apart from the prompt and the seed."""

    width: int = 832  # pixels
    height: int = 480  # pixels
    frames: int = 81  # 1 for images
    steps: int = 50  # denoising steps
    # guidance scale; classifier-free guidance is off at 1 or less; models that were distilled take it as a number
    guidance: float = 5.0
    guidance_2: float | None = None  # for the low-noise expert of Wan 2.2; none: as `guidance`
    fps: float = 16.0  # frames per second of the file written
    negative_prompt: str = ""
    flow_shift: float | None = None  # shift of the noise schedule; none: as the model ships it

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        for name in ("fps", "flow_shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} = {value}: a positive number is needed")
        for name in ("guidance", "guidance_2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} = {value}: a number of at least 0 is needed")


@dataclass(frozen=True)
class Preset:
    """One resolved preset. `sparse` is None when it asks for stock dense attention."""

    name: str
    description: str
    pipeline: str  # the recipe that drives it: a file of dit_accel.pipelines
    model: str  # a shipped model's name, a folder or a hub id
    status: str  # "measured": the numbers rest on a record in scripts/results; "provisional": they do not yet
    level: str | None  # one of LEVELS; "exact" is what diffusers computes; none: not said
    generate: GenerateOptions
    sparse: SparseOptions | None
    cache: Cache | None  # None: every step is computed
    region: Region | None  # None: every token is computed
    provenance: Provenance | None  # what a measured one rests on
    origin: str  # "shipped", or the file it is in
    sources: Mapping[str, str]  # "generate.steps" -> "preset tiny-wan" | "default" | "cli"
    layers: Layers  # the weakest first

    @property
    def is_stock(self) -> bool:
        """Whether it asks for what diffusers does without us."""
        return self.sparse is None and self.cache is None and self.region is None

    def with_values(self, values: Mapping[str, Any], source: str) -> Preset:
        """The same preset with some values replaced.

        Args:
            values: dotted names (`sparse.keep`, `cache.transformer_2.threshold`, `model`) to values.
            source: what `sources` shall say of them.

        Raises:
            UsageError: an unknown name or a value that its option does not allow.
        """
        return _resolve(self.name, (*self.layers, (source, nest(values))), self.origin)

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """(dotted name, value, source) of everything that decides what is computed."""
        told = self.to_dict()
        yield from ((key, told[key], self.sources[key]) for key in ("pipeline", "model"))
        for group in _GROUPS:
            for key, value in spread(told[group] or {}):
                yield f"{group}.{key}", value, self.sources[f"{group}.{key}"]

    def to_dict(self) -> dict[str, Any]:
        """Every value as plain data, for run.json and `--json`."""
        return {
            "name": self.name,
            **{key: getattr(self, key) for key in ("origin", *_HEAD, *_CLAIMS)},
            "provenance": self.provenance.to_mapping() if self.provenance else None,
            "generate": dataclasses.asdict(self.generate),
            "sparse": self.sparse.to_mapping() if self.sparse else None,
            "cache": self.cache.to_mapping() if self.cache else None,
            "region": self.region.to_mapping() if self.region else None,
            "sources": dict(self.sources),
        }


def preset_names() -> tuple[str, ...]:
    """The names of the presets that ship with the package."""
    return tuple(sorted(read_shipped()))


def load_preset(name_or_path: str | os.PathLike[str]) -> Preset:
    """Load a preset by name, by file, or by `file#table`.

    Raises:
        UnknownNameError: no such preset, option or method; the message offers the nearest name.
        UsageError: a file that is missing or not TOML, a value of the wrong type or range, a name that two files have.
    """
    given = os.fspath(name_or_path)
    path, _, name = given.partition("#")
    if path.endswith(".toml") or os.sep in path or "/" in path:
        file = read_preset_file(Path(path).expanduser())
        if not name and len(file.tables) != 1:
            raise UsageError(
                f"{path} holds {len(file.tables)} presets; name one: {path}#{next(iter(file.tables), 'NAME')}"
            )
        name = name or next(iter(file.tables))
        if name not in file.tables:
            raise unknown_name(f"preset in {path}", name, file.tables)
        return resolve(name, file, read_shipped())
    return resolve_by_name(given, read_shelf())


def resolve_by_name(name: str, shelf: Shelf) -> Preset:
    """The preset of a name, shipped or the user's own.

    Raises:
        UsageError: as `load_preset`.
    """
    if name in shelf.clashes:
        raise shelf.clashes[name]
    file = shelf.holder(name)
    if file is None:
        error = unknown_name("preset", name, shelf.names())
        also = "".join(f" Not looked into: {problem}." for problem in shelf.unread)
        raise type(error)(one_line(f"{error}{also}"))
    return resolve(name, file, shelf.shipped)


def resolve(name: str, file: PresetFile, shipped: Tables) -> Preset:
    """A preset of a file, with all that it inherits from the file and the shipped presets.

    Raises:
        UsageError: a mistake in its table or in one that it extends, told in one line.
        EnvironmentProblem: trained weights that it names cannot be read.
    """
    preset, mistakes = examine(name, file, shipped)
    if preset is None:
        raise mistakes[0]
    return preset


def examine(name: str, file: PresetFile, shipped: Tables) -> tuple[Preset | None, list[DitAccelError]]:
    """A preset of a file, or else what is wrong with it: each unknown key, and the first mistake of each part."""
    try:
        preset, mistakes = _examine(name, _lineage(name, {**shipped, **file.tables}), file.origin)
    except DitAccelError as error:
        preset, mistakes = None, [error]
    return preset, [type(error)(one_line(str(error))) for error in mistakes]


def _lineage(name: str, tables: Tables) -> Layers:
    """The preset's table and those it extends, the oldest ancestor first."""
    layers: list[tuple[str, Mapping[str, Any]]] = []
    seen: list[str] = []
    while True:
        if name not in tables:
            raise unknown_name("preset", name, tables)
        if name in seen:
            raise UsageError(f"preset {seen[0]!r} extends itself: {' -> '.join([*seen, name])}")
        seen.append(name)
        table = dict(tables[name])
        parent = table.pop("extends", None)
        check_finite(table, f"preset {name!r}: value")
        layers.insert(0, (f"preset {name}", table))
        if parent is None:
            return tuple(layers)
        if not isinstance(parent, str):
            raise UsageError(f"preset {name!r}: extends takes one name, got {parent!r}")
        name = parent


def _resolve(name: str, layers: Layers, origin: str) -> Preset:
    preset, mistakes = _examine(name, layers, origin)
    if preset is None:
        raise mistakes[0]
    return preset


def _examine(name: str, layers: Layers, origin: str) -> tuple[Preset | None, list[DitAccelError]]:
    mistakes: list[DitAccelError] = []
    head: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    sources: dict[str, str] = {}
    for source, table in layers:
        where = source if source.startswith("preset") else f"{source} setting"
        for key, value in table.items():
            with _noting(mistakes):
                if key in groups:
                    if not isinstance(value, Mapping):
                        raise UsageError(f"{where}: {key} must be a table of options, got {value!r}")
                    groups[key] = _OVERRIDES[key](groups[key], value)
                    sources |= {f"{key}.{option}": source for option, _ in spread(value)}
                elif key in _HEAD:
                    head[key] = check_type(value, _HEAD[key], key, where)
                    sources[key] = source
                elif key not in (*_CLAIMS, "provenance") or not source.startswith("preset "):
                    raise unknown_name(f"key of {where}", key, [*_HEAD, *_CLAIMS, *groups, "provenance", "extends"])
    where = f"preset {name!r}"
    with _noting(mistakes):
        _check_head(head, where)
    head.setdefault("description", "")
    kept = {f"{group}.{option}" for group, table in groups.items() for option, _ in spread(table)}
    sources = {name: source for name, source in sources.items() if "." not in name or name in kept}
    parts: dict[str, Any] = dict.fromkeys(_GROUPS)
    for group, build in _BUILDERS.items():
        if groups[group] or group == "generate":
            with _noting(mistakes):
                parts[group] = build(groups[group], where)
    own = dict(layers)[f"preset {name}"]
    written = all(source.startswith("preset ") for source, _ in layers)
    with _noting(mistakes):
        is_stock = not any(groups[group] for group in _GROUPS[1:])
        claims = _claims(name, own, is_stock=is_stock, written=written)
    if mistakes:
        return None, mistakes
    values = {group: part.to_mapping() for group, part in parts.items() if part and group != "generate"}
    for group, options in (("generate", dataclasses.asdict(parts["generate"])), *values.items()):
        for option, _ in spread(options):
            sources.setdefault(f"{group}.{option}", "default")
    sources |= {key: f"preset {name}" if key in own else "default" for key in _CLAIMS}
    return Preset(name, **head, **claims, **parts, origin=origin, sources=sources, layers=layers), []


@contextlib.contextmanager
def _noting(mistakes: list[DitAccelError]) -> Iterator[None]:
    """Keep an error for later, so that others are found too."""
    try:
        yield
    except DitAccelError as error:
        mistakes.append(error)


def _check_head(head: Mapping[str, Any], where: str) -> None:
    for key in ("pipeline", "model"):
        if key not in head:
            raise UsageError(f"{where}: {key} is missing; add {key} = ... or extend a preset that has it")
    if head["pipeline"] not in pipeline_names():
        raise unknown_name(f"pipeline of {where}", head["pipeline"], pipeline_names())


def _claims(name: str, own: Mapping[str, Any], *, is_stock: bool, written: bool) -> dict[str, Any]:
    """What a preset says of itself in its own table, held against what it is.

    Args:
        is_stock: whether it asks for what diffusers does without us.
        written: whether all is as files have it, nothing replaced.
    """
    where = f"preset {name!r}"
    for key, allowed in _CLAIMS.items():
        if key in own and own[key] not in allowed:
            raise unknown_name(f"{key} of {where}", own[key], allowed)
    status, level = own.get("status", "provisional"), own.get("level")
    provenance = read_provenance(own["provenance"], where) if "provenance" in own else None
    if status == "measured" and provenance is None:
        raise UsageError(f"{where}: status measured needs a [provenance] table; add it, or leave status out")
    if status == "provisional" and provenance is not None:
        raise UsageError(f"{where} is provisional and has a provenance: leave it out, or say status = 'measured'")
    if level == "exact" and not is_stock:
        if written:
            raise UsageError(
                f"{where}: level exact is what diffusers computes, and this one has sparse, cache or region options; "
                f"say one of {', '.join(LEVELS[1:])}"
            )
        level = None  # replaced values have made it something else
    return {"status": status, "level": level or ("exact" if is_stock else None), "provenance": provenance}


def pipeline_names() -> tuple[str, ...]:
    """The recipes a preset may name."""
    return RECIPES


def _generate_options(values: Mapping[str, Any], where: str) -> GenerateOptions:
    hints = typing.get_type_hints(GenerateOptions)
    for key in values:
        if key not in hints:
            raise unknown_name(f"generate option of {where}", key, hints)
    checked = {key: check_type(value, hints[key], key, where) for key, value in values.items()}
    try:
        return GenerateOptions(**checked)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _sparse_options(values: Mapping[str, Any], where: str) -> SparseOptions:
    try:
        options = SparseOptions.from_mapping(values)
        # Built and thrown away: an unknown method or a value it refuses is found here, not after loading a model.
        for own in (map(options.for_role, ROLES) if options.roles else [options]):
            if own is not None:
                load_method(own.method, keep=own.keep, top_p=own.top_p, **own.method_options)
        return options
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from None
    except TypeError as error:
        raise UsageError(f"{where}: a sparse option has a value of the wrong type ({error})") from None


def _cache(values: Mapping[str, Any], where: str) -> Cache:
    try:
        return load_cache(values)
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from None


def _region(values: Mapping[str, Any], where: str) -> Region:
    try:
        return load_region(values)
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from None


_BUILDERS = {"generate": _generate_options, "sparse": _sparse_options, "cache": _cache, "region": _region}
_OVERRIDES = {
    "generate": lambda base, changes: {**base, **changes},
    "sparse": override,
    "cache": override_cache,
    "region": override_region,
}
