"""Joint attention as training wants it: kernels that take no mask, and rotary positions that fuse.

Attention is five sixths of a step's work at 4,096 tokens, and torch's fastest kernels take no mask. So padding is kept
out by width: every query gets one channel more, of 1, and every key one of 0, or of so much less than nothing where it
is padding that its weight vanishes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MORE = 8  # channels: kernels want heads in steps of eight
_NEVER = -1e4


class WideProcessor:
    """`HunyuanVideoAttnProcessor2_0` for a mask of keys, the same numbers where it is not padding."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        video = hidden_states.shape[1]
        cos, sin = (table[:, None, 0::2] for table in image_rotary_emb)  # [N, 1, D / 2]

        def turn(x: Tensor) -> Tensor:
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        if attn.add_q_proj is None:  # a single stream: one projection for both
            joint = torch.cat([hidden_states, encoder_hidden_states], 1)
            q, k = attn.norm_q(split(attn.to_q(joint))), attn.norm_k(split(attn.to_k(joint)))
            v = split(attn.to_v(joint))
            q, k = (torch.cat([turn(x[:, :video]), x[:, video:]], 1) for x in (q, k))
        else:
            words = encoder_hidden_states
            q = torch.cat(
                [
                    turn(attn.norm_q(split(attn.to_q(hidden_states)))),
                    attn.norm_added_q(split(attn.add_q_proj(words))),
                ],
                1,
            )
            k = torch.cat(
                [
                    turn(attn.norm_k(split(attn.to_k(hidden_states)))),
                    attn.norm_added_k(split(attn.add_k_proj(words))),
                ],
                1,
            )
            v = torch.cat([split(attn.to_v(hidden_states)), split(attn.add_v_proj(words))], 1)
        out = _attend(q, k, v, attention_mask)
        video_out, text_out = out[:, :video], out[:, video:]
        if attn.add_q_proj is not None:
            video_out, text_out = attn.to_out[1](attn.to_out[0](video_out)), attn.to_add_out(text_out)
        return video_out, text_out


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of `[B, N, H, D]` that reads the keys of `mask`, bool `[B, 1, 1, N]`; `[B, N, H * D]`."""
    width = v.shape[-1]
    kind = v.dtype
    never = torch.where(mask[:, 0, 0, :, None, None], 0.0, _NEVER).to(kind)  # [B, N, 1, 1]
    never = F.pad(never, (0, MORE - 1)).expand(-1, -1, k.shape[2], -1)
    once = F.pad(torch.ones_like(q[..., :1], dtype=kind), (0, MORE - 1))
    q, k, v = torch.cat([q.to(kind), once], -1), torch.cat([k.to(kind), never], -1), F.pad(v, (0, MORE))
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=width**-0.5)
    return out.transpose(1, 2)[..., :width].flatten(2)
