"""Node `DiT-Accel Compare`: how far apart two pictures or videos are."""

from __future__ import annotations

from comfy_api.latest import io, ui

from dit_accel.integrations.comfyui.comparing import compare_images
from dit_accel.integrations.comfyui.nodes import CATEGORY
from dit_accel.integrations.comfyui.nodes.showing import show_text


class CompareNode(io.ComfyNode):
    """Shows a text, and gives it on with a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DitAccelCompare",
            display_name="DiT-Accel Compare",
            category=CATEGORY,
            description=(
                "PSNR, SSIM and flicker of frames against those of a dense run with the same seed, and the worst frame "
                "side by side."
            ),
            inputs=[
                io.Image.Input("images", tooltip="Frames of the faster run."),
                io.Image.Input(
                    "reference",
                    tooltip="Frames of the dense run: as many, of the same size and with the same seed.",
                ),
                io.Float.Input(
                    "gain",
                    default=4.0,
                    min=1.0,
                    max=64.0,
                    step=0.5,
                    tooltip="By how much differences are multiplied in the picture: 4 shows 0.1 as 0.4.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text"),
                io.Image.Output(
                    display_name="worst frame",
                    tooltip="Reference, faster run and their difference, side by side.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, reference, gain: float) -> io.NodeOutput:
        text, picture = compare_images(images, reference, gain)
        show_text(cls, text)
        return io.NodeOutput(text, picture, ui=ui.PreviewText(text))
