"""Node `DiT-Accel Mask View`: which keys the heads of a layer read."""

from __future__ import annotations

from comfy_api.latest import io, ui

from dit_accel.integrations.comfyui.masks import view_masks
from dit_accel.integrations.comfyui.nodes import CATEGORY


class MaskViewNode(io.ComfyNode):
    """Shows a picture, and gives it on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DitAccelMaskView",
            display_name="DiT-Accel Mask View",
            category=CATEGORY,
            description=(
                "Runs one step of a model with sparse attention, and draws which key blocks the heads of one layer "
                "read. Steps and levels that would be dense are sparse for this look."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A model behind a Preset or Sparse node."),
                io.Conditioning.Input("positive", tooltip="The prompt to look with."),
                io.Latent.Input(
                    "latent", tooltip="Latents of the size to look at; a finished sample shows the most."
                ),
                io.Int.Input(
                    "layer",
                    default=0,
                    min=-1000,
                    max=1000,
                    tooltip="Number of the self-attention, from 0; negative ones count from the last.",
                ),
                io.Float.Input(
                    "noise",
                    default=0.6,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise level of the step, which is what is mixed into the latents: 1 is noise alone.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of the noise that is mixed in.",
                ),
            ],
            outputs=[io.Image.Output(display_name="masks")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, latent, layer: int, noise: float, seed: int) -> io.NodeOutput:
        picture = view_masks(model, positive, latent, layer, noise, seed)
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture, cls=cls))
