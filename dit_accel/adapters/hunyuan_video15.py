"""HunyuanVideo-1.5: text to video and image to video.

Every attention of the blocks is joint: video tokens first, then text of three kinds, which the model puts in the order
image, ByT5, language model, those that are no padding first. What is left behind them is padding, kept out by a mask:
text to video has a zero image, all of which is padding. It is trimmed, which is exact: nothing reads it, and what it
would read reaches no output. The token refiner's attentions are among text alone and stay stock.

Video tokens are reordered at HunyuanVideo's places: where the patch embedding makes them, where the rotary table is
made and behind the output projection.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor, nn

from dit_accel.adapters import hunyuan_video
from dit_accel.adapters.joint import joint_attentions
from dit_accel.errors import LayoutError
from dit_accel.trajectory import Facts

# classes that pass the permutation test of tests/adapters
_REORDERED = ("HunyuanVideo15Transformer3DModel",)
_TEXT = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
    "image_embeds",
)

self_attentions = joint_attentions
order_hooks = hunyuan_video.order_hooks
QKV = tuple[Tensor, Tensor, Tensor]  # query, key and value, [B, S, H, D]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading the timestep and the lengths of the prompts waits for the device.

    Raises:
        LayoutError: latents without a single patch each way, or a kind of text that is missing.
    """
    missing = [name for name in _TEXT if arguments.get(name) is None]
    if missing:
        raise LayoutError(
            f"{type(transformer).__name__} got no {', '.join(missing)}; it attends to text of three kinds together. "
            "For text without glyphs or without an image give zeros and a mask of zeros, as its pipelines do."
        )
    text, mask, glyphs, glyph_mask, image = (arguments[name] for name in _TEXT)
    # As the model finds out: one number that is not zero makes the image of every batch row count.
    image_valid = (image != 0).any() * image.shape[1]
    valid = mask.bool().sum(1) + glyph_mask.bool().sum(1) + image_valid
    return Facts(
        timestep=float(arguments["timestep"].max()),
        grid=hunyuan_video.read_grid(transformer, arguments["hidden_states"]),
        shape=tuple(arguments["hidden_states"].shape),
        condition=text,
        text=text.shape[1] + glyphs.shape[1] + image.shape[1],
        text_valid=tuple(valid.tolist()),
    )


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    return None


class Processor:
    """As `HunyuanVideo15AttnProcessor2_0`, but for the form of its mask.

    The stock one makes a mask of all pairs of tokens (12.9 GB at 720p and 121 frames). This one makes one of keys:
    tokens that are no padding compute the same. Padding then reads what is valid where it would have read nothing;
    nothing reads it, so that it reaches no output.
    """

    def __init__(self) -> None:
        self._attention_backend: Any = None
        self._parallel_config: Any = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend among video tokens `[B, N, C]` and text tokens `[B, L, C]`.

        Args:
            attention_mask: which text tokens are no padding, `[B, L]`.
            image_rotary_emb: cosines and sines of the video's tokens, `[N, D]` each.

        Returns:
            the video's tokens and the text's.
        """
        tokens = hidden_states.shape[1]
        video = _project(attn.heads, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        video = _normed(video, attn.norm_q, attn.norm_k)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in video[:2])
            video = query, key, video[2]
        text = _project(attn.heads, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = _normed(text, attn.norm_added_q, attn.norm_added_k)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(video, text, strict=True))
        keys = nn.functional.pad(attention_mask.bool(), (tokens, 0), value=True)
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=keys[:, None, None],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2).to(query.dtype)
        projection, dropout = attn.to_out
        return dropout(projection(out[:, :tokens])), attn.to_add_out(out[:, tokens:])


def dispatching(stock: Any) -> Processor | None:
    """A processor that does what the stock one does, through the dispatcher and with a smaller mask; None for one not
    known, subclasses included."""
    return Processor() if type(stock) is HunyuanVideo15AttnProcessor2_0 else None


def _project(heads: int, x: Tensor, *projections: nn.Module) -> QKV:
    """`[B, S, C]` as query, key and value."""
    query, key, value = (project(x).unflatten(2, (heads, -1)) for project in projections)
    return query, key, value


def _normed(qkv: QKV, norm_q: nn.Module | None, norm_k: nn.Module | None) -> QKV:
    query, key, value = qkv
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value
