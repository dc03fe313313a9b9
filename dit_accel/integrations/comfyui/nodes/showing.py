"""Texts on nodes. ComfyUI's pages draw what a node shows as text for few nodes of their own alone."""

from __future__ import annotations

from comfy_api.latest import io


def show_text(node: type[io.ComfyNode], text: str) -> None:
    """Show a text on the node that a prompt runs, by the way in which progress is told."""
    if node.hidden is None:
        return  # no prompt runs it
    from server import PromptServer  # ComfyUI's own

    PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
