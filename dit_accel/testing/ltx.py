"""Tiny LTX-Video models: two blocks, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.seeded import build, seeded


def tiny_ltx_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `LTXVideoTransformer3DModel` of two blocks and two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import LTXVideoTransformer3DModel

    own: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 24,
    }
    return build(LTXVideoTransformer3DModel, seed, **{**own, **config})


def tiny_ltx_inputs(
    transformer: nn.Module,
    grid: tuple[int, int, int] = (3, 5, 7),
    *,
    ahead: int = 0,
    coords: bool = False,
    per_token: bool = False,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer on a grid of so many tokens.

    Args:
        ahead: frames of a condition before the video's; they need `coords`.
        coords: give `video_coords` rather than the grid's three numbers.
        per_token: give a timestep for each token.
    """
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frames, rows, columns = grid
    tokens = (ahead + frames) * rows * columns
    timestep = torch.full((batch,), 500.0)
    if per_token:
        timestep = torch.randint(0, 1000, (batch, tokens), generator=generator).float()
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, tokens, config.in_channels),
        "encoder_hidden_states": randn(batch, 12, config.caption_channels),
        "encoder_attention_mask": torch.ones(batch, 12).index_fill_(1, torch.arange(9, 12), 0.0),
        "timestep": timestep,
    }
    if coords:
        # a condition for the last frames, in seconds and pixels
        when = torch.cat([torch.arange(frames - ahead, frames), torch.arange(frames)])
        place = torch.cartesian_prod(when / 3.0, 32.0 * torch.arange(rows), 32.0 * torch.arange(columns))
        return {**inputs, "video_coords": place.T.expand(batch, 3, -1).contiguous()}
    sizes = {"num_frames": frames, "height": rows, "width": columns}
    return {**inputs, **sizes, "rope_interpolation_scale": (0.3, 32, 32)}


def tiny_ltx_pipeline(variant: str = "LTXPipeline", *, seed: int = 0) -> Any:
    """An LTX pipeline without a text encoder: call it with `prompt_embeds` and `prompt_attention_mask`.

    Its autoencoder compresses 32x in space and 8x in time, as LTX's does: 17 frames of 160 x 224 pixels are 3 x 5 x 7
    tokens.

    Args:
        variant: the pipeline's class: `LTXPipeline`, `LTXImageToVideoPipeline` or `LTXConditionPipeline`.
    """
    import diffusers

    with seeded(seed):
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        ).eval()  # fmt: skip
    parts = {"text_encoder": None, "tokenizer": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    transformer = tiny_ltx_transformer(seed=seed + 1)
    pipe = getattr(diffusers, variant)(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
