"""A model as nodes hand it on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any


class ModelPatcher:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.callbacks: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.attachments: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        new = ModelPatcher(self.model)
        new.model_options = copy.deepcopy(self.model_options)
        for mine, its in ((self.wrappers, new.wrappers), (self.callbacks, new.callbacks)):
            its.update({kind: {key: list(f) for key, f in keyed.items()} for kind, keyed in mine.items()})
        new.attachments = dict(self.attachments)
        return new

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind: str, key: str, callback: Callable[..., Any]) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def remove_attachments(self, key: str) -> None:
        self.attachments.pop(key, None)

    def prepare_state(self, timestep: Any) -> None:
        for callbacks in self.callbacks.get("on_prepare_state", {}).values():
            for callback in callbacks:
                callback(self, timestep)
