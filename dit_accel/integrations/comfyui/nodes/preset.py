"""Node `DiT-Accel Preset`: everything that a preset says about a model."""

from __future__ import annotations

from comfy_api.latest import io

from dit_accel.integrations.comfyui.nodes import CATEGORY
from dit_accel.integrations.comfyui.patch import put_settings
from dit_accel.integrations.comfyui.settings import AUTO, OFF, preset_choices, settings_of_preset


class PresetNode(io.ComfyNode):
    """Model in, model out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DitAccelPreset",
            display_name="DiT-Accel Preset",
            category=CATEGORY,
            description=(
                "Makes a Wan, HunyuanVideo, FLUX or SD3 model faster by a preset's sparse attention, step cache and "
                "region sampling. Replaces what DiT-Accel nodes before it said; Sparse, Cache and Region nodes behind "
                "it change their part."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A diffusion model. It is not changed: the result is a clone."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(preset_choices()),
                    default=AUTO,
                    tooltip=(
                        "auto takes the balanced preset of the model's family. Fast presets read about a quarter to "
                        "two fifths of the keys, balanced ones two fifths to a half. off gives the model as it was."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, preset: str) -> io.NodeOutput:
        return io.NodeOutput(
            put_settings(model, None if preset == OFF else settings_of_preset(preset, model))
        )
