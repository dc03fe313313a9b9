"""Self-attention as training wants it: rotary positions that fuse, and the faster of torch's two fused kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


class FusedRotaryProcessor:
    """`WanAttnProcessor` for self-attention, the same numbers.

    The stock one writes rotated pairs into strided slices, which Inductor compiles to a kernel that took 15 % of a
    step; stacking the pairs fuses with the norm.
    """

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ):
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]

        def rotate(x: Tensor) -> Tensor:
            even, odd = x.unflatten(2, (attn.heads, -1)).unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
            return turned.flatten(-2).to(x.dtype).transpose(1, 2)

        q, k = rotate(attn.norm_q(attn.to_q(hidden_states))), rotate(attn.norm_k(attn.to_k(hidden_states)))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype)).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def time_backends(attend: Callable[[], Tensor]) -> list[float]:
    """Seconds that `attend` takes, forward and backward, on a GPU under each of `BACKENDS`; best of five."""
    best = []
    for backend in BACKENDS:
        times = []
        with sdpa_kernel(backend):
            for _ in range(7):
                torch.cuda.synchronize()
                began = time.perf_counter()
                attend().sum().backward()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
        best.append(min(times[2:]))
    return best


def prefer(backend: SDPBackend):
    """A context in which scaled_dot_product_attention takes `backend` where it can."""
    others = [b for b in BACKENDS if b != backend]
    return sdpa_kernel([backend, *others, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
