"""Tiny Wan models: two layers, two heads of 12."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.seeded import build, seeded
from dit_accel.testing.text import byte_tokenizer


def tiny_wan_transformer(*, i2v: bool = False, seed: int = 0, **config: Any) -> nn.Module:
    """A `WanTransformer3DModel` of two layers and two heads of 12, or a variant of it.

    Args:
        i2v: as Wan 2.1's image-to-video: 36 input channels and image tokens in the cross-attention.
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments; `vace_layers=` makes a `WanVACETransformer3DModel`.
    """
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    own: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    if i2v:
        own.update(in_channels=36, image_dim=32, added_kv_proj_dim=24)
    own.update(config)
    cls = WanVACETransformer3DModel if "vace_layers" in own else WanTransformer3DModel
    return build(cls, seed, **own)


def tiny_wan_inputs(
    transformer: nn.Module, grid: tuple[int, int, int] = (3, 6, 10), *, batch: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer on a grid of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = [tokens * patch for tokens, patch in zip(grid, config.patch_size, strict=True)]
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, config.in_channels, *sizes),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 512 if config.image_dim else 12, config.text_dim),
    }
    if config.image_dim:
        inputs["encoder_hidden_states_image"] = randn(batch, 257, config.image_dim)
    if "vace_layers" in config:
        inputs["control_hidden_states"] = randn(batch, config.vace_in_channels, *sizes)
    return inputs


def tiny_wan_pipeline(
    *, two_experts: bool = False, i2v: bool = False, seed: int = 0, transformer: dict[str, Any] | None = None
) -> Any:
    """A whole `WanPipeline`, or `WanImageToVideoPipeline`, that runs in a fraction of a second.

    Its video autoencoder compresses 8x in space and 4x in time, as Wan's does.

    Args:
        two_experts: as Wan 2.2: a second transformer below the noise level .875.
        i2v: image to video, with a CLIP image encoder.
        seed: of all weights.
        transformer: further arguments of `tiny_wan_transformer`.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = byte_tokenizer()
    with seeded(seed):
        encoder = UMT5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
        )
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": UMT5EncoderModel(encoder).eval(),
            "vae": AutoencoderKLWan(
                base_dim=3,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            ).eval(),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        }
        if i2v:
            parts.update(_tiny_clip_vision())
    config = transformer or {}
    parts["transformer"] = tiny_wan_transformer(i2v=i2v, seed=seed + 1, **config)
    if two_experts:
        parts["transformer_2"] = tiny_wan_transformer(i2v=i2v, seed=seed + 2, **config)
        parts["boundary_ratio"] = 0.875
    pipe = (WanImageToVideoPipeline if i2v else WanPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tiny_clip_vision() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=2,
    )
    size = {"height": 32, "width": 32}
    return {
        "image_encoder": CLIPVisionModel(
            config
        ).eval(),  # 16 x 16 patches and one class token: 257, as Wan expects
        "image_processor": CLIPImageProcessor(size=size, crop_size=size),
    }
