"""Presets: named settings in TOML, read without importing torch.

A preset is one table. It may extend one other preset, in the same file or shipped with the package:

    [tiny-wan-fast]
    extends = "tiny-wan"
    description = "..."
    [tiny-wan-fast.sparse]
    keep = 0.25

A preset is asked for by shipped name (`tiny-wan-fast`), by file (`my.toml`, when it holds one table) or by
one table of a file (`my.toml#fast`). Every value remembers where it came from: `Preset.provenance`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dit_accel.presets as shipped
from dit_accel.caches import Cache, load_cache, override_cache
from dit_accel.errors import UsageError, unknown_name
from dit_accel.methods import load_method, method_names, method_options
from dit_accel.options import SparseOptions, override
from dit_accel.pipelines import RECIPES
from dit_accel.region.options import Region, load_region, override_region
from dit_accel.roles import ROLES, nest, spread

STATUSES = ("measured", "provisional")
_HEAD = {"description": str, "pipeline": str, "model": str, "status": str}


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
    generate: GenerateOptions
    sparse: SparseOptions | None
    cache: Cache | None  # None: every step is computed
    region: Region | None  # None: every token is computed
    provenance: Mapping[str, str]  # "generate.steps" -> "preset tiny-wan" | "default" | "cli"
    layers: tuple[tuple[str, Mapping[str, Any]], ...]  # (source, table), the weakest first

    @property
    def is_stock(self) -> bool:
        """Whether it asks for what diffusers does without us."""
        return self.sparse is None and self.cache is None and self.region is None

    def with_values(self, values: Mapping[str, Any], source: str) -> Preset:
        """The same preset with some values replaced.

        Args:
            values: dotted names (`sparse.keep`, `cache.transformer_2.threshold`, `model`) to values.
            source: what `provenance` shall say of them.

        Raises:
            UsageError: an unknown name or a value that its option does not allow.
        """
        return _resolve(self.name, (*self.layers, (source, nest(values))))

    def to_dict(self) -> dict[str, Any]:
        """Every value as plain data, for run.json and `--json`."""
        return {
            "name": self.name,
            **{key: getattr(self, key) for key in _HEAD},
            "generate": dataclasses.asdict(self.generate),
            "sparse": self.sparse.to_mapping() if self.sparse else None,
            "cache": self.cache.to_mapping() if self.cache else None,
            "region": self.region.to_mapping() if self.region else None,
            "sources": dict(self.provenance),
        }


def preset_names() -> tuple[str, ...]:
    """The names of the presets that ship with the package."""
    return tuple(sorted(_shipped_tables()))


def load_preset(name_or_path: str | os.PathLike[str]) -> Preset:
    """Load a preset by shipped name, by file, or by `file#table`.

    Raises:
        UnknownNameError: no such preset, option or method; the message offers the nearest name.
        UsageError: a file that is missing or not TOML, a value of the wrong type or range.
    """
    given = os.fspath(name_or_path)
    path, _, table_name = given.partition("#")
    if path.endswith(".toml") or os.sep in path or "/" in path:
        tables = _read(Path(path).expanduser())
        if not table_name:
            if len(tables) != 1:
                raise UsageError(
                    f"{path} holds {len(tables)} presets; name one: {path}#{next(iter(tables), 'NAME')}"
                )
            table_name = next(iter(tables))
        if table_name not in tables:
            raise unknown_name(f"preset in {path}", table_name, tables)
        tables = _shipped_tables() | tables
    else:
        table_name, tables = given, _shipped_tables()
    return _resolve(table_name, _lineage(table_name, tables))


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `key=value` of `--set`; the value is read as TOML where it can be, else as plain text.

    `key` is dotted (`sparse.keep`); a bare name is looked up in the option tables.
    """
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key:
        raise UsageError(f"--set {text!r}: write key=value, for example sparse.keep=0.3")
    try:
        value = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        value = {"value": _number_or_text(raw)}
    # More than one key means that the text broke out of its line; such a value is no single setting.
    return _full_key(key), value["value"] if len(value) == 1 else raw


def _number_or_text(raw: str) -> float | str:
    try:
        return float(raw)  # `.5`, which TOML does not take for a number
    except ValueError:
        return raw


def _full_key(key: str) -> str:
    group, _, name = key.rpartition(".")
    generate = [field.name for field in dataclasses.fields(GenerateOptions)]
    of_methods = set().union(*(method_options(name) for name in method_names()))
    sparse = [*SparseOptions().to_mapping(), *sorted(of_methods)]
    if not group and name in generate:
        return f"generate.{name}"
    if not group and name in sparse:
        return f"sparse.{name}"
    if key == "model":
        return key
    if group == "generate" and name in generate:
        return key
    if group.partition(".")[0] in ("sparse", "cache", "region"):  # these judge the name themselves, and a role's
        return key
    if not group:
        raise unknown_name("setting", key, ["model", *generate, *sparse])
    raise unknown_name("setting", key, [f"generate.{name}" for name in generate])


def _shipped_tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for path in sorted(shipped.FOLDER.glob("*.toml")):
        tables |= _read(path)
    return tables


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read preset file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"preset file {path} is not text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"preset file {path} is not valid TOML: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(
                f"preset file {path}: {name!r} stands outside a table; write it under [a-preset-name]"
            )
    return tables


def _lineage(name: str, tables: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
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
        layers.insert(0, (f"preset {name}", table))
        if parent is None:
            return tuple(layers)
        if not isinstance(parent, str):
            raise UsageError(f"preset {name!r}: extends takes one name, got {parent!r}")
        name = parent


def _resolve(name: str, layers: tuple[tuple[str, Mapping[str, Any]], ...]) -> Preset:
    head: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {"generate": {}, "sparse": {}, "cache": {}, "region": {}}
    sources: dict[str, str] = {}
    for source, table in layers:
        where = source if source.startswith("preset") else f"{source} setting"
        for key, value in table.items():
            if key in groups:
                if not isinstance(value, Mapping):
                    raise UsageError(f"{where}: {key} must be a table of options, got {value!r}")
                groups[key] = _OVERRIDES[key](groups[key], value)
                sources |= {f"{key}.{option}": source for option, _ in spread(value)}
            elif key in _HEAD:
                head[key] = _checked(value, _HEAD[key], key, where)
                sources[key] = source
            else:
                raise unknown_name(f"key of {where}", key, [*_HEAD, *groups, "extends"])
    where = f"preset {name!r}"
    for key in ("pipeline", "model"):
        if key not in head:
            raise UsageError(f"{where}: {key} is missing; add {key} = ... or extend a preset that has it")
    if head["pipeline"] not in pipeline_names():
        raise unknown_name(f"pipeline of {where}", head["pipeline"], pipeline_names())
    if head.setdefault("status", "provisional") not in STATUSES:
        raise unknown_name(f"status of {where}", head["status"], STATUSES)
    head.setdefault("description", "")
    kept = {f"{group}.{option}" for group, table in groups.items() for option, _ in spread(table)}
    sources = {name: source for name, source in sources.items() if "." not in name or name in kept}
    generate = _generate_options(groups["generate"], where)
    sparse = _sparse_options(groups["sparse"], where) if groups["sparse"] else None
    cache = _cache(groups["cache"], where) if groups["cache"] else None
    region = _region(groups["region"], where) if groups["region"] else None
    values = {
        "generate": dataclasses.asdict(generate),
        "sparse": sparse.to_mapping() if sparse else {},
        "cache": cache.to_mapping() if cache else {},
        "region": region.to_mapping() if region else {},
    }
    for group, options in values.items():
        for option, _ in spread(options):
            sources.setdefault(f"{group}.{option}", "default")
    parts = dict(generate=generate, sparse=sparse, cache=cache, region=region)
    return Preset(name, **parts, provenance=sources, layers=layers, **head)


def pipeline_names() -> tuple[str, ...]:
    """The recipes a preset may name."""
    return RECIPES


def _generate_options(values: Mapping[str, Any], where: str) -> GenerateOptions:
    hints = typing.get_type_hints(GenerateOptions)
    for key in values:
        if key not in hints:
            raise unknown_name(f"generate option of {where}", key, hints)
    checked = {key: _checked(value, hints[key], key, where) for key, value in values.items()}
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


_OVERRIDES = {
    "generate": lambda base, changes: {**base, **changes},
    "sparse": override,
    "cache": override_cache,
    "region": override_region,
}


def _checked(value: Any, kind: Any, key: str, where: str) -> Any:
    """The value if it is of the option's type (whole numbers pass for fractions), else a UsageError."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, bool) and bool not in kinds:
        pass
    elif isinstance(value, int) and int not in kinds and float in kinds:
        return float(value)
    elif isinstance(value, kinds):
        return value
    wanted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    asked = " or ".join(wanted[k] for k in kinds if k in wanted)
    raise UsageError(f"{where}: {key} = {value!r}: {asked} is needed")
