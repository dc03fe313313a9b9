"""One file per step cache; the file's name is the cache's name.

Between two steps of denoising a transformer's output changes little. A step cache computes some steps and makes up the
others from what it kept. Each is a frozen dataclass `Cache`, made of five parts:

- *boundary*, a class attribute: "call", all of the transformer, between its latents and its output; "stack", its blocks
  but for the first `head` and the last `tail` of them, which are always computed; or "modules", the attentions and MLPs
  of its blocks, of which a reused step computes some rows (a folder of one file for each: `caches.boundaries`);
- *signal and policy*, `judge(view, memory) -> error`: the error that reuse here would make, by the cache's own rule.
  Reuse happens below `threshold`, within the limits that all caches share (`caches.cache.Cache`);
- *predictor*, `fill(view, memory) -> parts`: what stands for the output, or for what the blocks add; of boundary
  "modules" `choose(kept, age, step, layer) -> rows`: which rows are computed, where the others are held;
- *store*, `learn(view, parts, memory)`: what it keeps of a computed step. The engine keeps `memory` apart for each
  transformer and branch of guidance, and lets nothing into it of a forward that did not return.

Published methods are such compositions, named as the field names them. `shared` caches decide once a step, for all
branches. Cache files import torch only inside their functions, so that options can be checked without it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from dit_accel.caches.cache import Cache
from dit_accel.errors import UsageError, unknown_name
from dit_accel.roles import ROLES, merge, split_roles

_NO_CACHES = {"cache", "decider", "engine", "memory", "off", "schedule", "trials", "walk"}


def cache_names() -> list[str]:
    """Every step cache there is, by file name."""
    return list(_files())


@functools.cache  # reading presets asks often, and the package's files stay what they are
def _files() -> tuple[str, ...]:
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return tuple(sorted(name for name in modules if name not in _NO_CACHES))


def cache_class(name: str) -> type[Cache]:
    """The class of a cache.

    Raises:
        UnknownNameError: no such cache.
    """
    if name not in cache_names():
        raise unknown_name("cache", name, cache_names())
    return importlib.import_module(f"{__name__}.{name}").Cache


def load_cache(given: str | Mapping[str, Any] | Cache) -> Cache:
    """Build a cache.

    Args:
        given: a name; a mapping with `name` and the cache's options, as a preset's `[cache]` table, in which may be
            tables for single transformers (see `dit_accel.roles`); or a cache.

    Raises:
        UnknownNameError: no such cache, or an option it does not have.
        UsageError: a value it refuses, or the name missing.
    """
    if isinstance(given, Cache):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise UsageError(f"cache={given!r}: give a cache's name, a mapping with name and options, or a cache")
    if "name" not in given:
        raise UsageError(f"A cache needs its name: add name = one of {', '.join(cache_names())}.")
    cls = cache_class(given["name"])
    known = _options_of(cls)
    options, roles = split_roles({key: value for key, value in given.items() if key != "name"})
    for key in options:
        if key not in known:
            raise unknown_name(f"option of cache {given['name']!r}", key, known | set(ROLES))
    try:
        return cls(**options, roles=roles)
    except TypeError as error:
        raise UsageError(f"cache {given['name']!r}: an option has a value of the wrong type ({error})") from None


def override_cache(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A cache's mapping with values of another put over it; a change of name drops what the new cache does not know."""
    return merge(base, changes, _override, "name")


def _override(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    base, name = dict(base), changes.get("name", base.get("name"))
    if name != base.get("name") and name in cache_names():
        known = _options_of(cache_class(name))
        base = {key: value for key, value in base.items() if key in known}
    return {**base, **changes}


def _options_of(cls: type[Cache]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} - {"roles"}
