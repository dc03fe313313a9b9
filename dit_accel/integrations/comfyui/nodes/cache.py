"""Node `DiT-Accel Cache`: a step cache."""

from __future__ import annotations

from comfy_api.latest import io

from dit_accel.integrations.comfyui.nodes import CATEGORY
from dit_accel.integrations.comfyui.patch import change_settings
from dit_accel.integrations.comfyui.settings import cache_choices, cache_of


class CacheNode(io.ComfyNode):
    """Model in, model out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DitAccelCache",
            display_name="DiT-Accel Cache",
            category=CATEGORY,
            description=(
                "Leaves out steps whose result can be made up from those before. Replaces the step cache of DiT-Accel "
                "nodes before it and leaves their other parts."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A diffusion model. It is not changed: the result is a clone."
                ),
                io.Combo.Input(
                    "cache",
                    options=list(cache_choices()),
                    default="latent",
                    tooltip=(
                        "What stands for a step that is left out. latent holds the velocity of the step computed last, "
                        "easy its distance from the latents. off computes every step."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=0.05,
                    min=0.0,
                    max=10.0,
                    step=0.005,
                    tooltip=(
                        "A step is left out while the expected error is below this: 0.05 is gentle, 0.1 to 0.2 faster. "
                        "0 computes every step."
                    ),
                ),
                io.String.Input(
                    "options",
                    default="",
                    multiline=True,
                    tooltip=(
                        "Any further option of a preset's [cache] table, one to a line as in TOML. "
                        "Example: max_consecutive = 2"
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, cache: str, threshold: float, options: str) -> io.NodeOutput:
        return io.NodeOutput(change_settings(model, cache=cache_of(cache, threshold, options)))
