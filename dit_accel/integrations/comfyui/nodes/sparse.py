"""Node `DiT-Accel Sparse`: sparse attention by one method."""

from __future__ import annotations

from comfy_api.latest import io

from dit_accel.integrations.comfyui.nodes import CATEGORY
from dit_accel.integrations.comfyui.patch import change_settings
from dit_accel.integrations.comfyui.settings import method_choices, sparse_options


class SparseNode(io.ComfyNode):
    """Model in, model out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DitAccelSparse",
            display_name="DiT-Accel Sparse",
            category=CATEGORY,
            description=(
                "Makes self-attention read a part of its keys. Replaces the sparse attention of DiT-Accel nodes before "
                "it and leaves their other parts."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="A diffusion model. It is not changed: the result is a clone."
                ),
                io.Combo.Input(
                    "method",
                    options=list(method_choices()),
                    default="rectified",
                    tooltip=(
                        "How the keys are chosen. rectified also gives back a mean of what is dropped, and keeps most "
                        "at the same share. off makes every attention dense."
                    ),
                ),
                io.Float.Input(
                    "keep",
                    default=0.35,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Share of key blocks to read: 0.35 reads about a third, 1.0 everything. 0 gives none, for "
                        "methods that have no share or one of their own."
                    ),
                ),
                io.Float.Input(
                    "dense_first",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "This share of the steps stays dense, the first ones, which settle the composition. 0.1 of 30 "
                        "steps is 3."
                    ),
                ),
                io.String.Input(
                    "dense_layers",
                    default="",
                    tooltip=(
                        "Numbers of layers that stay dense, from 0; negative ones count from the last. "
                        "Example: 0, 1, -1."
                    ),
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip=(
                        "Stop with an error where a call would run dense against these settings. Off: it runs dense, "
                        "and the report says why."
                    ),
                ),
                io.String.Input(
                    "options",
                    default="",
                    multiline=True,
                    tooltip=(
                        "Any further option of a preset's [sparse] table, one to a line as in TOML. "
                        'Example: order = "gilbert"'
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model,
        method: str,
        keep: float,
        dense_first: float,
        dense_layers: str,
        strict: bool,
        options: str,
    ) -> io.NodeOutput:
        sparse = sparse_options(method, keep, dense_first, dense_layers, strict, options)
        return io.NodeOutput(change_settings(model, sparse=sparse))
