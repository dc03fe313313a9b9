"""Tiny MiniMax-H3 models: two blocks, two heads of 16, one refiner block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.seeded import build

CLEAN, NOISY = 0, 1  # indices of the two times in the inputs


def tiny_minimax_h3_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `MiniMaxH3Transformer3DModel` of two blocks and two heads of 16, with one refiner block.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import MiniMaxH3Transformer3DModel

    own: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 48,
        "in_channels": 4,
        "audio_in_channels": 6,
        "text_dim": 24,
        "freq_dim": 16,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }
    return build(MiniMaxH3Transformer3DModel, seed, **{**own, **config})


def tiny_minimax_h3_inputs(
    transformer: nn.Module,
    grid: tuple[int, int, int] = (3, 5, 7),
    *,
    text: int = 19,
    audio: int = 4,
    keyframes: tuple[str, ...] = (),
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer, packed by diffusers' own pipeline block.

    Args:
        grid: frames, rows and columns of video tokens.
        text: text tokens.
        audio: tokens of sound, in each of two channels.
        keyframes: "first" or "last" for each given frame, whose tokens stand between text and sound.
    """
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    patch = tuple(config.patch_size)
    frames, rows, columns = grid
    latent = (frames, rows * patch[1], columns * patch[2])
    packed = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(text, dtype=torch.long), *latent, audio, patch, 2, 2, 0, keyframes
    )
    names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
    layout = dict(zip(names, packed, strict=False))
    times = torch.full(layout["token_tags"].shape, NOISY)
    times[layout["video_indices"][: packed[5]]] = CLEAN
    width = config.in_channels * patch[0] * patch[1] * patch[2]
    return {
        "hidden_states": randn(batch, len(layout["video_indices"]), width),
        "audio_hidden_states": randn(batch, 2 * audio, config.audio_in_channels),
        "encoder_hidden_states": randn(batch, text, config.text_dim),
        "timestep": torch.tensor([0.95, 0.4]),
        "timestep_indices": times,
        **layout,
    }
