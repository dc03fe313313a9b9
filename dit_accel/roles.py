"""Roles: for which transformer of a pipeline an option is. Importing this module imports no torch.

Options of sparse attention, of a cache and of region sampling hold for every transformer of a pipeline. A table among
them that is named by a role has values of this transformer's own, and False in its place leaves the transformer out:

    [mine.cache]
    name = "latent"
    threshold = 0.1
    [mine.cache.transformer]  # Wan 2.2's expert for the noisy steps
    threshold = 0.05
    [mine.region]
    transformer = false

A role's own value wins over a common one, wherever either was said: a preset that changes a common option leaves alone
what the preset that it extends said of one role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from dit_accel.errors import UsageError, unknown_name

ROLES = ("transformer", "transformer_2")  # Wan 2.2 has an expert for the noisy half and one for the rest

Own = Mapping[str, Any] | Literal[False]  # what is said of one role


def split_roles(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values for all roles, and what is said of single ones, by role."""
    common = {key: value for key, value in options.items() if key not in ROLES}
    return common, {key: value for key, value in options.items() if key in ROLES}


def check_roles(roles: Mapping[str, Own], what: str, build: Callable[[str], Any]) -> dict[str, Own]:
    """What is said of single roles, each seen to be a table of options that can be, or False.

    Args:
        what: whose options they are, as a noun ("cache", "region").
        build: makes the options of a role, or raises.

    Raises:
        UsageError: another value; or as `build` does, with the role before it.
    """
    if not isinstance(roles, Mapping):
        raise UsageError(f"{what} option roles={roles!r}: give a mapping from roles ({', '.join(ROLES)}) to options.")
    for role, own in roles.items():
        if role not in ROLES:
            raise unknown_name(f"role of {what} options", role, ROLES)
        if own is not False and not isinstance(own, Mapping):
            raise UsageError(
                f"{what} option {role}={own!r} is not possible: it is a table of {what} options for this transformer "
                "alone, or false to leave it out."
            )
        inner = [] if own is False else [key for key in own if key in ROLES]
        if inner:
            raise UsageError(f"{what} option {role}.{inner[0]}: a role's own options hold no other role's.")
        try:
            build(role)
        except UsageError as error:
            raise type(error)(f"{what} options of {role}: {error}") from None
    return {role: own if own is False else dict(own) for role, own in roles.items()}


def check_pipeline_has(roles: Mapping[str, Own], what: str, pipe: Any, present: Mapping[str, Any]) -> None:
    """Raises UsageError where options are for a transformer that the pipeline has not."""
    absent = [role for role in roles if role not in present]
    if absent:
        raise UsageError(
            f"{what} options are given for {absent[0]}, and {type(pipe).__name__} has {' and '.join(present)} alone: "
            f"leave them out, or name {' or '.join(present)}."
        )


def merge(
    base: Mapping[str, Any],
    changes: Mapping[str, Any],
    flat: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]],
    kind: str | None = None,
) -> dict[str, Any]:
    """Options with others put over them, the common ones over the common ones and a role's own over its own.

    Args:
        flat: merges options without roles; a change of the kind may drop some of the base's.
        kind: the option that says what the others are of ("method", a cache's "name"), if there is one.
    """
    common, roles = split_roles(base)
    new, new_roles = split_roles(changes)
    merged = flat(common, new)
    for role, own in roles.items():
        if isinstance(own, Mapping) and kind not in own:  # it is of the common kind, and follows its change
            roles[role] = _within(common, own, {kind: merged[kind]} if kind in merged else {}, flat, kind)
    for role, own in new_roles.items():
        known = roles.get(role)
        over = isinstance(own, Mapping) and isinstance(known, Mapping)
        roles[role] = _within(merged, known, own, flat, kind) | _said(own, kind) if over else own
    return {**merged, **roles}


def _within(
    common: Mapping[str, Any], own: Mapping[str, Any], changes: Mapping[str, Any], flat: Callable, kind: str | None
) -> dict[str, Any]:
    """A role's own options with changes over them; its kind, where it says none, is the common one."""
    whole = flat({**_said(common, kind), **own}, changes)
    return whole if kind in own else {key: value for key, value in whole.items() if key != kind}


def _said(options: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    return {kind: options[kind]} if kind in options else {}


def spread(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name: `("threshold", 0.1)`, `("transformer_2.threshold", 0.2)`."""
    common, roles = split_roles(options)
    yield from common.items()
    for role, own in roles.items():
        if isinstance(own, Mapping):
            yield from ((f"{role}.{key}", value) for key, value in own.items())
        else:
            yield role, own


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name as tables within tables.

    Raises:
        UsageError: a name that is given a value and names within it.
    """
    tables: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        table = tables
        for depth, group in enumerate(groups):
            table = table.setdefault(group, {})
            if not isinstance(table, dict):
                at = ".".join(groups[: depth + 1])
                raise UsageError(f"{name} and {at} are both given, and {at} is no table then: leave one of them out.")
        if isinstance(table.get(last), dict):
            raise UsageError(f"{name} and {name}.{next(iter(table[last]))} are both given: leave one of them out.")
        table[last] = dict(value) if isinstance(value, Mapping) else value
    return tables
