"""Tiny real models with random weights, a file per family: diffusers' own classes, nothing is downloaded."""

from dit_accel.testing.flux import tiny_flux_inputs, tiny_flux_pipeline, tiny_flux_transformer
from dit_accel.testing.flux2 import tiny_flux2_inputs, tiny_flux2_pipeline, tiny_flux2_transformer
from dit_accel.testing.framepack import (
    tiny_framepack_inputs,
    tiny_framepack_pipeline,
    tiny_framepack_transformer,
)
from dit_accel.testing.hunyuan_video import (
    tiny_hunyuan_video_inputs,
    tiny_hunyuan_video_pipeline,
    tiny_hunyuan_video_transformer,
)
from dit_accel.testing.hunyuan_video15 import (
    tiny_hunyuan_video15_inputs,
    tiny_hunyuan_video15_pipeline,
    tiny_hunyuan_video15_transformer,
)
from dit_accel.testing.ltx import tiny_ltx_inputs, tiny_ltx_pipeline, tiny_ltx_transformer
from dit_accel.testing.memory import peak_bytes
from dit_accel.testing.minimax_h3 import tiny_minimax_h3_inputs, tiny_minimax_h3_transformer
from dit_accel.testing.qwen_image import (
    tiny_qwen_image_inputs,
    tiny_qwen_image_pipeline,
    tiny_qwen_image_transformer,
)
from dit_accel.testing.sd3 import tiny_sd3_inputs, tiny_sd3_pipeline, tiny_sd3_transformer
from dit_accel.testing.text import byte_tokenizer
from dit_accel.testing.wan import tiny_wan_inputs, tiny_wan_pipeline, tiny_wan_transformer
from dit_accel.testing.with_text import (
    tiny_flux_with_text,
    tiny_hunyuan_video_from_image,
    tiny_hunyuan_video_with_text,
    tiny_sd3_with_text,
)
from dit_accel.testing.z_image import tiny_z_image_inputs, tiny_z_image_pipeline, tiny_z_image_transformer

__all__ = [
    "byte_tokenizer",
    "peak_bytes",
    "tiny_flux2_inputs",
    "tiny_flux2_pipeline",
    "tiny_flux2_transformer",
    "tiny_flux_inputs",
    "tiny_flux_pipeline",
    "tiny_flux_transformer",
    "tiny_flux_with_text",
    "tiny_framepack_inputs",
    "tiny_framepack_pipeline",
    "tiny_framepack_transformer",
    "tiny_hunyuan_video15_inputs",
    "tiny_hunyuan_video15_pipeline",
    "tiny_hunyuan_video15_transformer",
    "tiny_hunyuan_video_from_image",
    "tiny_hunyuan_video_inputs",
    "tiny_hunyuan_video_pipeline",
    "tiny_hunyuan_video_transformer",
    "tiny_hunyuan_video_with_text",
    "tiny_ltx_inputs",
    "tiny_ltx_pipeline",
    "tiny_ltx_transformer",
    "tiny_minimax_h3_inputs",
    "tiny_minimax_h3_transformer",
    "tiny_qwen_image_inputs",
    "tiny_qwen_image_pipeline",
    "tiny_qwen_image_transformer",
    "tiny_sd3_inputs",
    "tiny_sd3_pipeline",
    "tiny_sd3_transformer",
    "tiny_sd3_with_text",
    "tiny_wan_inputs",
    "tiny_wan_pipeline",
    "tiny_wan_transformer",
    "tiny_z_image_inputs",
    "tiny_z_image_pipeline",
    "tiny_z_image_transformer",
]
