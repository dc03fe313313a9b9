"""Wrappers around functions, by the places they may stand at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    PREDICT_NOISE = "predict_noise"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class CallbacksMP:
    ON_PREPARE_STATE = "on_prepare_state"


class WrapperExecutor:
    """What a wrapper is given first: calling it goes on inward."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.wrappers:
            return self.wrappers[0](self, *args, **kwargs)
        return self.original(*args, **kwargs)


def wrappers_in(options: dict[str, Any], kind: str) -> list[Callable[..., Any]]:
    return [wrapper for keyed in options.get("wrappers", {}).get(kind, {}).values() for wrapper in keyed]
