"""Nodes, their inputs and what they give."""

from __future__ import annotations

from typing import Any


class ComfyExtension:
    async def get_node_list(self) -> list[type]:
        raise NotImplementedError


class _Port:
    def __init__(self, id: str | None = None, **said: Any) -> None:
        self.id, self.tooltip, self.said = id, said.get("tooltip"), said


class _Kind:
    class Input(_Port):
        pass

    class Output(_Port):
        pass


class io:
    class ComfyNode:
        hidden = None

    class Hidden:
        unique_id = "UNIQUE_ID"

    class Schema:
        def __init__(self, node_id: str, display_name: str, category: str, **more: Any) -> None:
            self.node_id, self.display_name, self.category = node_id, display_name, category
            self.inputs, self.outputs = more["inputs"], more["outputs"]
            self.description, self.is_output_node = more["description"], more.get("is_output_node", False)

    class NodeOutput:
        def __init__(self, *args: Any, ui: Any = None) -> None:
            self.args, self.ui = args, ui


for _name in ("Model", "Combo", "Float", "Int", "String", "Boolean", "AnyType", "Image", "Latent", "Conditioning"):
    setattr(io, _name, type(_name, (_Kind,), {}))


class ui:
    class PreviewText:
        def __init__(self, value: str) -> None:
            self.value = value

    class PreviewImage:
        def __init__(self, image: Any, cls: type | None = None) -> None:
            self.image = image
