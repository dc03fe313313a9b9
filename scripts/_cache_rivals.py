"""Step caches of other packages and ours, each put on a Wan pipeline by one call, for side-by-side runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dit_accel

PACKAGES = {"dit_accel": "dit-accel", "diffusers": "diffusers", "cache-dit": "cache-dit"}  # as they are installed


@dataclass(frozen=True)
class Setting:
    """What some caches must be told of the runs to come."""

    steps: int
    ratios: tuple[float, ...]  # MagCache's, measured on this model
    branches: int = 2  # forwards of a step; only cache-dit must know


@dataclass(frozen=True)
class Rival:
    """One cache with its options."""

    name: str
    package: str  # a key of PACKAGES
    put: Callable[[Any, Setting], Any]  # on a pipeline
    cases: bool = True  # whether the cases where state goes wrong are tried with it
    first_block: float | None = None  # the threshold, where it is the first-block rule with the same warm-up
    options: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def on(self, pipe: Any, setting: Setting) -> Iterator[Any]:
        """The pipeline with the cache on it. What a cache changes on the pipeline's class is undone at the end, so
        that one rival never runs inside another's leavings. The pipeline itself is not to be used again."""
        cls = type(pipe)
        before = dict(vars(cls))
        try:
            self.put(pipe, setting)
            yield pipe
        finally:
            for name in set(vars(cls)) - set(before):
                delattr(cls, name)
            for name, value in before.items():
                if vars(cls)[name] is not value:
                    setattr(cls, name, value)


def make_rivals(warmup: int, thresholds: tuple[float, ...]) -> list[Rival]:
    """All that are compared, cache-dit last: importing it changes diffusers.

    Args:
        warmup: steps that the first-block caches compute first; diffusers' has no such option.
        thresholds: of the first-block caches; cases are tried with the middle one.
    """
    middle = thresholds[len(thresholds) // 2]
    rivals = [_ours("first_block", middle == t, threshold=t, warmup=warmup) for t in thresholds]
    rivals += [_ours("latent", t == 0.2, threshold=t) for t in (0.1, 0.2, 0.3)]
    rivals += [_ours("easy", t == 0.2, threshold=t) for t in (0.1, 0.2)]
    rivals += [_ours("taylor", True, interval=3, order=order) for order in (1,)]
    rivals += [_ours("taylor", False, interval=3, order=0), _ours("mag", True, threshold=0.12, warmup=warmup)]
    rivals += [
        _diffusers("FirstBlockCache", middle == t, threshold=t) for t in (*thresholds, 2 * max(thresholds))
    ]
    rivals += [
        _diffusers("MagCache", True, threshold=0.12, max_skip_steps=2, retention_ratio=0.2),
        _diffusers("TaylorSeerCache", False),
        _diffusers("TaylorSeerCache", True, cache_interval=3, cache_identifiers=_WAN_MODULES),
        _diffusers("SeaCache", True),
        _diffusers("SeaCache", False, threshold=0.5, max_consecutive_cached=0),
        _diffusers("PyramidAttentionBroadcast", True, spatial_attention_block_skip_range=2),
        _diffusers("FasterCache", True, spatial_attention_block_skip_range=2, tensor_format="BCFHW"),
    ]
    rivals += [_cache_dit(warmup, t, None, middle == t) for t in thresholds]
    rivals += [_cache_dit(warmup, t, 1, middle == t) for t in thresholds]
    return rivals


def package_versions() -> dict[str, str | None]:
    """Installed versions; None where a package is not installed as one."""
    found: dict[str, str | None] = {}
    for package, distribution in PACKAGES.items():
        try:
            found[package] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


# diffusers' default patterns match nothing on Wan, and it does not say so
_WAN_MODULES = [r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"]


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if name != "cache_identifiers")


def _ours(cache: str, cases: bool, **options: Any) -> Rival:
    def put(pipe: Any, setting: Setting) -> None:
        more: dict[str, Any] = {"name": cache, "min_steps": 0, **options}
        if cache == "mag":
            more["ratios"] = setting.ratios
        dit_accel.accelerate(pipe, cache=more)

    first_block = options["threshold"] if cache == "first_block" else None
    return Rival(f"{cache}, {_told(options)}", "dit_accel", put, cases, first_block, options)


def _diffusers(cache: str, cases: bool, **options: Any) -> Rival:
    def put(pipe: Any, setting: Setting) -> None:
        from diffusers import hooks

        more = dict(options)
        if cache == "MagCache":
            more.update(num_inference_steps=setting.steps, mag_ratios=list(setting.ratios))
        if cache in ("PyramidAttentionBroadcast", "FasterCache"):
            more["current_timestep_callback"] = lambda: pipe._current_timestep
        if cache == "PyramidAttentionBroadcast":
            more["spatial_attention_timestep_skip_range"] = (100, 800)
        pipe.transformer.enable_cache(getattr(hooks, f"{cache}Config")(**more))

    name = f"{cache}, {_told(options)}" if options else f"{cache}, its defaults"
    return Rival(name, "diffusers", put, cases, None, options)


def _cache_dit(warmup: int, threshold: float, order: int | None, cases: bool) -> Rival:
    def put(pipe: Any, setting: Setting) -> None:
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            num_inference_steps=setting.steps,
            **({"enable_separate_cfg": False} if setting.branches == 1 else {}),
        )
        more = {}
        if order is not None:
            more["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        cache_dit.enable_cache(pipe, cache_config=config, **more)

    options = {"threshold": threshold, "warmup": warmup}
    name = f"F1B0, {_told(options)}" + (f", TaylorSeer {order}" if order is not None else "")
    return Rival(name, "cache-dit", put, cases, threshold if order is None else None, options)
