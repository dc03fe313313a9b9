"""Step caches of other packages and ours, each put on a Wan pipeline by one call, for side-by-side runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    pair: str | None = None  # what it has in common with another package's that decides by the same rule and options

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
        warmup: steps that the first-block caches and ours of MagCache compute first; diffusers' first-block cache has
            no such option.
        thresholds: of the first-block caches.
    """
    ours = [_ours("first_block", threshold=t, warmup=warmup) for t in thresholds]
    ours += [_ours("first_block", threshold=t, warmup=warmup, order=1, over="step") for t in thresholds]
    ours += [_ours("latent", threshold=t) for t in (0.05, 0.1, 0.15, 0.2)]
    ours += [_ours("easy", threshold=t) for t in (0.1, 0.2)]
    ours += [_ours("taylor", interval=3, order=0), _ours("taylor", interval=3, order=1)]
    ours += [_ours("taylor", interval=3, order=1, over="step"), _ours("mag", threshold=0.12, warmup=warmup)]
    theirs = [_diffusers("FirstBlockCache", threshold=t) for t in thresholds]
    theirs += [
        _diffusers("MagCache", threshold=0.12, max_skip_steps=2, retention_ratio=0.2),
        _diffusers("TaylorSeerCache"),
        _diffusers("TaylorSeerCache", cache_interval=3, cache_identifiers=_WAN_MODULES),
        _diffusers("SeaCache"),
        _diffusers("SeaCache", threshold=0.4),
        _diffusers("PyramidAttentionBroadcast", spatial_attention_block_skip_range=2),
        _diffusers("FasterCache", spatial_attention_block_skip_range=2, tensor_format="BCFHW"),
    ]
    theirs += [_cache_dit(warmup, t, order) for order in (None, 1) for t in thresholds]
    return ours + theirs


def make_case_rivals() -> list[Rival]:
    """One of each kind, with thresholds that reuse much in short runs of few tokens."""
    return [
        _ours("first_block", threshold=0.5, warmup=2),
        _ours("first_block", threshold=0.5, warmup=2, order=1, over="step"),
        _ours("latent", threshold=0.5),
        _ours("easy", threshold=0.5),
        _ours("taylor", interval=3, order=1),
        _ours("mag", threshold=0.5, warmup=2),
        _diffusers("FirstBlockCache", threshold=0.5),
        _diffusers("MagCache", threshold=0.5, max_skip_steps=2, retention_ratio=0.2),
        _diffusers("TaylorSeerCache", cache_interval=3, cache_identifiers=_WAN_MODULES),
        _diffusers("SeaCache", threshold=1.0),
        _diffusers("PyramidAttentionBroadcast", spatial_attention_block_skip_range=2),
        _diffusers("FasterCache", spatial_attention_block_skip_range=2, tensor_format="BCFHW"),
        _cache_dit(2, 0.5, None),
        _cache_dit(2, 0.5, 1),
    ]


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


def _pair(threshold: float, order: int) -> str:
    return f"First block at {threshold:g}, what the others add {'continued' if order else 'held'}"


def _ours(cache: str, **options: Any) -> Rival:
    def put(pipe: Any, setting: Setting) -> None:
        more: dict[str, Any] = {"name": cache, "min_steps": 0, **options}
        if cache == "mag":
            more["ratios"] = setting.ratios
        dit_accel.accelerate(pipe, cache=more)

    pair = _pair(options["threshold"], options.get("order", 0)) if cache == "first_block" else None
    return Rival(f"{cache}, {_told(options)}", "dit_accel", put, pair)


def _diffusers(cache: str, **options: Any) -> Rival:
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

    return Rival(f"{cache}, {_told(options)}" if options else f"{cache}, its defaults", "diffusers", put)


def _cache_dit(warmup: int, threshold: float, order: int | None) -> Rival:
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

    name = f"F1B0, threshold {threshold}, warmup {warmup}" + (f", TaylorSeer {order}" if order is not None else "")
    return Rival(name, "cache-dit", put, _pair(threshold, order or 0))
