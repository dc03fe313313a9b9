"""Node `DiT-Accel Region`: region-adaptive sampling."""

from __future__ import annotations

from comfy_api.latest import io

from dit_accel.integrations.comfyui.nodes import CATEGORY
from dit_accel.integrations.comfyui.patch import change_settings
from dit_accel.integrations.comfyui.settings import region_of, selector_choices, unit_choices


class RegionNode(io.ComfyNode):
    """Model in, model out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DitAccelRegion",
            display_name="DiT-Accel Region",
            category=CATEGORY,
            description=(
                "Computes a part of the tokens at most steps; the others keep the velocity they were given last. For "
                "sampler euler: with others every token is computed, and the report says why. Replaces the region "
                "sampling of DiT-Accel nodes before it and leaves their other parts."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A diffusion model. It is not changed: the result is a clone."
                ),
                io.Combo.Input(
                    "selector",
                    options=list(selector_choices()),
                    default="std",
                    tooltip=(
                        "By what tokens are chosen. std and l2 look at the size of their velocity, change at how fast "
                        "it changed, random is the control. off computes every token."
                    ),
                ),
                io.Float.Input(
                    "sample_ratio",
                    default=0.5,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of the tokens computed at a step: 0.5 computes half of them. 1.0 computes everything "
                        "and changes nothing."
                    ),
                ),
                io.Combo.Input(
                    "unit",
                    options=list(unit_choices()),
                    default="token",
                    tooltip=(
                        "What is chosen: single tokens, whose steps attend densely, or block, whole blocks of the "
                        "sparse attention of a Sparse or Preset node, whose steps attend sparsely."
                    ),
                ),
                io.String.Input(
                    "options",
                    default="",
                    multiline=True,
                    tooltip=(
                        "Any further option of a preset's [region] table, one to a line as in TOML. "
                        'Example: keys = "drop"'
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, selector: str, sample_ratio: float, unit: str, options: str) -> io.NodeOutput:
        return io.NodeOutput(change_settings(model, region=region_of(selector, sample_ratio, unit, options)))
