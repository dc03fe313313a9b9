"""A tiny SigLIP image encoder for tiny pipelines."""

from __future__ import annotations

from typing import Any


def tiny_siglip(width: int, *, patches: int = 3) -> dict[str, Any]:
    """An image encoder and its feature extractor, as the parts of a pipeline.

    Args:
        width: numbers of one token's embedding; even.
        patches: rows and columns of tokens.
    """
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    edge = 4 * patches
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=edge,
        patch_size=4,
    )
    extractor = SiglipImageProcessor(size={"height": edge, "width": edge})
    return {"image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": extractor}
