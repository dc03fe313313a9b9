"""Tiny real models with random weights, for tests and trials: diffusers' own classes, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CORPUS = ("a red star moves left over a checkered background", "a small blue circle spins", "blurry, static")


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**own).eval().requires_grad_(False)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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


def tiny_flux_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `FluxTransformer2DModel` of one dual and two single blocks, two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import FluxTransformer2DModel

    own: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxTransformer2DModel(**{**own, **config}).eval().requires_grad_(False)


def tiny_flux_inputs(
    transformer: nn.Module, grid: tuple[int, int] = (9, 11), *, text: int = 19, batch: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer: rows and columns of image tokens, and so many of text."""
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in grid))
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, len(places), config.in_channels),
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": places,
        "txt_ids": torch.zeros(text, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def tiny_flux_pipeline(*, seed: int = 0) -> Any:
    """A `FluxPipeline` without text encoders: call it with `prompt_embeds` and `pooled_prompt_embeds`.

    Its autoencoder does not compress, so an image of 18 x 22 pixels is 9 x 11 tokens.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(4,), latent_channels=4, norm_num_groups=1, shift_factor=0.1, scaling_factor=1.5,
            use_quant_conv=False, use_post_quant_conv=False,
        ).eval()  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, vae, transformer=tiny_flux_transformer(seed=seed + 1), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_hunyuan_video_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `HunyuanVideoTransformer3DModel` of one dual and one single block, two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    own: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 24,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HunyuanVideoTransformer3DModel(**{**own, **config}).eval().requires_grad_(False)


def tiny_hunyuan_video_inputs(
    transformer: nn.Module,
    grid: tuple[int, int, int] = (3, 5, 7),
    *,
    text: int = 19,
    valid: int | tuple[int, ...] | None = None,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer on a grid of so many tokens.

    Args:
        text: text tokens.
        valid: how many of them are no padding, for all batch rows or each; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    sizes = [tokens * edge for tokens, edge in zip(grid, patch, strict=True)]
    lengths = torch.as_tensor(text if valid is None else valid).expand(batch)
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, config.in_channels, *sizes),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, text, config.text_embed_dim),
        "encoder_attention_mask": (torch.arange(text) < lengths[:, None]).long(),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 6000.0)
    return inputs


def byte_tokenizer() -> Any:
    """A tokenizer that knows every byte, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "</s>", "<unk>"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


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


def peak_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Memory that a call takes from torch's CPU allocator.

    Returns:
        the peak above what was held at the start, and the largest single piece; in bytes.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    pieces = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = largest = 0
    for piece in sorted(pieces, key=lambda e: e.start_ns()):
        held += piece.nbytes()
        peak, largest = max(peak, held), max(largest, piece.nbytes())
    return peak, largest
