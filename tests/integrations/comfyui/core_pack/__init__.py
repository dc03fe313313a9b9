"""A node pack for tests: random models, prompts and latents for workflows, and an attention override of its own."""

from __future__ import annotations

from typing import Any

import core_models
import torch
from comfy_api.latest import ComfyExtension, io

_FAMILY = dict(options=list(core_models.FAMILIES))


class RandomModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestRandomModel",
            display_name="Random Model",
            category="test",
            inputs=[io.Combo.Input("family", **_FAMILY)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family: str) -> io.NodeOutput:
        return io.NodeOutput(core_models.build(family))


class RandomPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestRandomPrompt",
            display_name="Random Prompt",
            category="test",
            inputs=[io.Combo.Input("family", **_FAMILY), io.Int.Input("seed", default=1)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, family: str, seed: int) -> io.NodeOutput:
        return io.NodeOutput(core_models.conditioning(family, seed))


class SmallLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestSmallLatents",
            display_name="Small Latents",
            category="test",
            inputs=[
                io.Combo.Input("family", **_FAMILY),
                io.Int.Input("frames", default=3),
                io.Int.Input("rows", default=16),
                io.Int.Input("columns", default=20),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, family: str, frames: int, rows: int, columns: int) -> io.NodeOutput:
        return io.NodeOutput(core_models.latents(family, (frames, rows, columns)))


class OtherOverride(io.ComfyNode):
    """An attention override that doubles what it gives: where it acts, the result says so."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestOtherOverride",
            display_name="Other Override",
            category="test",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        model = model.clone()

        def other(function: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * function(*args, **kwargs)

        model.model_options["transformer_options"]["optimized_attention_override"] = other
        return io.NodeOutput(model)


class LatentsAsFrames(io.ComfyNode):
    """Three channels of latents, to look at."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestLatentsAsFrames",
            display_name="Latents as Frames",
            category="test",
            inputs=[io.Latent.Input("latent")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, latent: Any) -> io.NodeOutput:
        video = latent["samples"][0, :3]
        video = video[:, None] if video.ndim == 3 else video
        return io.NodeOutput(torch.sigmoid(video).permute(1, 2, 3, 0).contiguous())


class Digest(io.ComfyNode):
    """Every bit of some latents, as a text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestDigest",
            display_name="Digest",
            category="test",
            inputs=[io.Latent.Input("latent")],
            outputs=[io.String.Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent: Any) -> io.NodeOutput:
        import hashlib

        digest = hashlib.sha256(latent["samples"].contiguous().numpy().tobytes()).hexdigest()
        return io.NodeOutput(digest, ui={"text": (digest,)})


class Pack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RandomModel, RandomPrompt, SmallLatents, OtherOverride, LatentsAsFrames, Digest]


async def comfy_entrypoint() -> Pack:
    return Pack()
