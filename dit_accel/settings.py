"""Settings: one value of a preset as `--set` has it, KEY=VALUE. Importing this module imports no torch."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

from dit_accel.errors import UsageError, unknown_name
from dit_accel.methods import method_names, method_options
from dit_accel.options import SparseOptions
from dit_accel.preset import GenerateOptions


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
