"""Tiny real models with random weights, a file per family: diffusers' own classes, nothing is downloaded."""

from dit_accel.testing.flux import tiny_flux_inputs, tiny_flux_pipeline, tiny_flux_transformer
from dit_accel.testing.hunyuan_video import tiny_hunyuan_video_inputs, tiny_hunyuan_video_transformer
from dit_accel.testing.memory import peak_bytes
from dit_accel.testing.text import byte_tokenizer
from dit_accel.testing.wan import tiny_wan_inputs, tiny_wan_pipeline, tiny_wan_transformer
from dit_accel.testing.with_text import (
    tiny_flux_with_text,
    tiny_hunyuan_video_from_image,
    tiny_hunyuan_video_with_text,
    tiny_sd3_with_text,
)

__all__ = [
    "byte_tokenizer",
    "peak_bytes",
    "tiny_flux_inputs",
    "tiny_flux_pipeline",
    "tiny_flux_transformer",
    "tiny_flux_with_text",
    "tiny_hunyuan_video_from_image",
    "tiny_hunyuan_video_inputs",
    "tiny_hunyuan_video_transformer",
    "tiny_hunyuan_video_with_text",
    "tiny_sd3_with_text",
    "tiny_wan_inputs",
    "tiny_wan_pipeline",
    "tiny_wan_transformer",
]
