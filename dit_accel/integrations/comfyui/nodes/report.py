"""Node `DiT-Accel Report`: what really ran in the latest sampling."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from dit_accel.integrations.comfyui.nodes import CATEGORY
from dit_accel.integrations.comfyui.nodes.showing import show_text
from dit_accel.integrations.comfyui.patch import report_on


class ReportNode(io.ComfyNode):
    """Shows a text, and gives it on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DitAccelReport",
            display_name="DiT-Accel Report",
            category=CATEGORY,
            description=(
                "What ran in the latest sampling of a model: sparse and dense calls with reasons, share of the keys "
                "that were read, steps that were left out, seconds."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler was given."),
                io.AnyType.Input(
                    "after",
                    tooltip="What the sampler gives, so that the report is made behind it. It is not looked at.",
                ),
            ],
            outputs=[io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, after: Any) -> io.NodeOutput:
        text = report_on(model)
        show_text(cls, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
