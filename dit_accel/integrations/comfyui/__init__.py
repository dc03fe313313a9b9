"""ComfyUI's node pack. A folder in custom_nodes needs no more than an `__init__.py` that imports `comfy_entrypoint`.

It imports `comfy_api`, which only ComfyUI has, and no diffusers.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from dit_accel.integrations.comfyui.nodes.cache import CacheNode
from dit_accel.integrations.comfyui.nodes.compare import CompareNode
from dit_accel.integrations.comfyui.nodes.mask_view import MaskViewNode
from dit_accel.integrations.comfyui.nodes.preset import PresetNode
from dit_accel.integrations.comfyui.nodes.region import RegionNode
from dit_accel.integrations.comfyui.nodes.report import ReportNode
from dit_accel.integrations.comfyui.nodes.sparse import SparseNode

__all__ = ["NODES", "DitAccelExtension", "comfy_entrypoint"]

NODES: tuple[type[io.ComfyNode], ...] = (
    PresetNode,
    SparseNode,
    CacheNode,
    RegionNode,
    ReportNode,
    CompareNode,
    MaskViewNode,
)


class DitAccelExtension(ComfyExtension):
    """What ComfyUI's loader asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


async def comfy_entrypoint() -> DitAccelExtension:
    """Called by ComfyUI's loader."""
    return DitAccelExtension()
