"""Settings: what the nodes of a model say, from their widgets or from a preset."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.caches import cache_class, cache_names, load_cache
from dit_accel.caches.cache import Cache
from dit_accel.errors import UsageError
from dit_accel.integrations.comfyui.families import PIPELINES, find_family
from dit_accel.methods import method_class, method_names
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset, load_preset, preset_names
from dit_accel.region import Region, load_region
from dit_accel.region.options import SELECTORS, UNITS

OFF, AUTO = "off", "auto"


@dataclass(frozen=True)
class Settings:
    """What holds for one model."""

    sparse: SparseOptions | None = None  # None: every attention is ComfyUI's
    cache: Cache | None = None  # None: every step is computed
    region: Region | None = None  # None: every token is computed
    title: str = "set by hand"  # the preset's name, if nothing of it was changed

    @property
    def is_off(self) -> bool:
        return self.sparse is None and self.cache is None and self.region is None


def preset_choices() -> tuple[str, ...]:
    """What the Preset node offers: presets for models that ComfyUI loads, as far as all of their parts run there."""
    return (OFF, AUTO, *(name for name in preset_names() if _runs_here(load_preset(name))))


def method_choices() -> tuple[str, ...]:
    """What the Sparse node offers: every method but those with weights trained for diffusers' models."""
    return (OFF, *(name for name in method_names() if not _is_trained(name)))


def cache_choices() -> tuple[str, ...]:
    """What the Cache node offers: caches between latents and output, which need nothing of a model's inside."""
    return (OFF, *(name for name in cache_names() if cache_class(name).boundary == "call"))


def selector_choices() -> tuple[str, ...]:
    """What the Region node offers: every selector but that by a mask, which is a tensor."""
    return (OFF, *(name for name in SELECTORS if name != "mask"))


def unit_choices() -> tuple[str, ...]:
    """What the Region node chooses: single tokens, or blocks of sparse attention."""
    return UNITS


def settings_of_preset(name: str, model: Any) -> Settings:
    """A preset's settings; of "auto", those of the balanced preset for this model.

    Args:
        name: one of `preset_choices`.
        model: ComfyUI's ModelPatcher.

    Raises:
        UnknownModelError: "auto" for a model of no known family.
    """
    diffusion = model.model.diffusion_model
    preset = load_preset(find_family(diffusion).balanced(diffusion) if name == AUTO else name)
    return Settings(preset.sparse, preset.cache, preset.region, preset.name)


def sparse_options(
    method: str, keep: float, dense_first: float, dense_layers: str, strict: bool, more: str
) -> SparseOptions | None:
    """The Sparse node's options; None where they are off.

    Args:
        keep: 0 for none.
        dense_layers: whole numbers with commas between them.
        more: further options as lines of TOML, which win over the others.

    Raises:
        UsageError: a value that cannot be, or options of single transformers.
    """
    if method == OFF:
        return None
    takes_keep = "keep" in {field.name for field in dataclasses.fields(method_class(method))}
    if keep and not takes_keep:
        raise UsageError(
            f"Method {method!r} has no keep, and keep={keep:g} was given: set keep to 0. Its own options go into "
            "`options`, one to a line."
        )
    given = dict(method=method, dense_first=dense_first, dense_layers=_numbers(dense_layers), strict=strict)
    given |= {"keep": keep} if keep else {}
    options = SparseOptions.from_mapping(given | _lines(more))
    _refuse_roles("sparse", options.roles)
    return options


def cache_of(name: str, threshold: float, more: str) -> Cache | None:
    """The Cache node's cache; None where it is off.

    Args:
        more: further options as lines of TOML, which win over the threshold.

    Raises:
        UsageError: a value that cannot be, or options of single transformers.
    """
    if name == OFF:
        return None
    cache = load_cache({"name": name, "threshold": threshold} | _lines(more))
    _refuse_roles("cache", cache.roles)
    return cache


def region_of(selector: str, sample_ratio: float, unit: str, more: str) -> Region | None:
    """The Region node's options; None where they are off, or every token is asked for.

    Args:
        more: further options as lines of TOML, which win over the others.

    Raises:
        UsageError: a value that cannot be, or options of single transformers.
    """
    if selector == OFF:
        return None
    region = load_region(dict(selector=selector, sample_ratio=sample_ratio, unit=unit) | _lines(more))
    _refuse_roles("region", region.roles)
    return None if region.sample_ratio == 1 else region


def _runs_here(preset: Preset) -> bool:
    sparse = preset.sparse
    return (
        preset.pipeline in PIPELINES
        and "/" in preset.model  # those that come with us are diffusers' alone
        and not preset.is_stock
        and (sparse is None or (not _is_trained(sparse.method) and not sparse.roles))
        and (preset.cache is None or (preset.cache.boundary == "call" and not preset.cache.roles))
        and (preset.region is None or not preset.region.roles)
    )


def _is_trained(method: str) -> bool:
    return hasattr(method_class(method), "weights_for")


def _refuse_roles(what: str, roles: Mapping[str, Any]) -> None:
    if roles:
        raise UsageError(
            f"{what} options for {', '.join(roles)} were given, but a model of ComfyUI is one transformer: give its "
            "node these options by themselves."
        )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(
            f"dense_layers={text!r} is not possible: give whole numbers with commas between them, as in 0, 1, -1."
        ) from None


def _lines(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f'options cannot be read as TOML ({error}): give one to a line, texts in quotes, as in order = "gilbert".'
        ) from None
