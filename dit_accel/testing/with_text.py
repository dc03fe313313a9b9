"""Tiny whole pipelines of image and joint families, text encoders included: random weights, nothing is downloaded.

Their autoencoders compress 4x in space (HunyuanVideo's 8x, and 4x in time), so that a side is a multiple of 8 (16).
"""

from __future__ import annotations

from typing import Any

from dit_accel.testing.flux import tiny_flux_transformer
from dit_accel.testing.hunyuan_video import tiny_hunyuan_video_transformer
from dit_accel.testing.image_vae import tiny_image_vae
from dit_accel.testing.seeded import seeded
from dit_accel.testing.text import byte_tokenizer


def tiny_flux_with_text(*, seed: int = 0, **config: Any) -> Any:
    """A `FluxPipeline` with CLIP and T5.

    Args:
        seed: of all weights.
        config: arguments of `tiny_flux_transformer`; `guidance_embeds=True` makes it as dev's, else as schnell's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with seeded(seed):
        parts = {
            "vae": tiny_image_vae(halvings=2),
            "text_encoder": _clip(24),
            "tokenizer": _clip_tokenizer(),
            "text_encoder_2": _t5(),
            "tokenizer_2": byte_tokenizer(),
        }
    # dev's schedule is shifted by the size of the image, schnell's is not
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=bool(config.get("guidance_embeds")))
    pipe = FluxPipeline(scheduler, transformer=tiny_flux_transformer(seed=seed + 1, **config), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_with_text(*, seed: int = 0, t5: bool = True) -> Any:
    """A `StableDiffusion3Pipeline` as 3.5's, with two CLIPs and T5.

    Args:
        seed: of all weights.
        t5: without it the third text encoder is left out, as many do to save memory.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with seeded(seed):
        parts = {
            "vae": tiny_image_vae(halvings=2),
            "text_encoder": _clip(16, projection=True),
            "tokenizer": _clip_tokenizer(),
            "text_encoder_2": _clip(16, projection=True),
            "tokenizer_2": _clip_tokenizer(),
            "text_encoder_3": _t5() if t5 else None,
            "tokenizer_3": byte_tokenizer() if t5 else None,
            "transformer": SD3Transformer2DModel(
                sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
                pos_embed_max_size=16, qk_norm="rms_norm",
            ).eval(),
        }  # fmt: skip
    pipe = StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hunyuan_video_with_text(*, seed: int = 0) -> Any:
    """A `HunyuanVideoPipeline` with Llama and CLIP, which runs with its own prompt template."""
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
    from transformers import LlamaConfig, LlamaModel

    tokenizer = byte_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    with seeded(seed):
        parts = {
            "text_encoder": LlamaModel(llama).eval(),
            "tokenizer": tokenizer,
            "text_encoder_2": _clip(8),
            "tokenizer_2": _clip_tokenizer(),
            "vae": _video_vae(AutoencoderKLHunyuanVideo),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    transformer = tiny_hunyuan_video_transformer(seed=seed + 1)
    pipe = HunyuanVideoPipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hunyuan_video_from_image(*, seed: int = 0) -> Any:
    """A `HunyuanVideoImageToVideoPipeline` that gives the picture as the first frame's tokens, with LLaVA and CLIP.

    Its prompt template asks for 576 image tokens, so a picture is 24 x 24 patches to LLaVA.
    """
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoImageToVideoPipeline,
    )
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tokenizer = byte_tokenizer()
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    side = 24 * 2
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=2, projection_dim=16,
    )  # fmt: skip
    llava = LlavaConfig(
        vision_config=vision, text_config=llama, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id, vision_feature_layer=-1,
    )  # fmt: skip
    size = {"height": side, "width": side}
    with seeded(seed):
        parts = {
            "text_encoder": LlavaForConditionalGeneration(llava).eval(),
            "tokenizer": tokenizer,
            "text_encoder_2": _clip(8),
            "tokenizer_2": _clip_tokenizer(),
            "vae": _video_vae(AutoencoderKLHunyuanVideo),
            "image_processor": CLIPImageProcessor(size=size, crop_size=size),
        }
    transformer = tiny_hunyuan_video_transformer(seed=seed + 1, image_condition_type="token_replace")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoImageToVideoPipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _video_vae(cls: type) -> Any:
    """Its autoencoder: 8x in space, 4x in time, four latent channels."""
    return cls(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    ).eval()


def _clip(width: int, *, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=width, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _clip_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(byte_tokenizer()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return T5EncoderModel(config).eval()
