"""Processors for Stable Diffusion 3, whose own call torch's attention directly instead of diffusers' dispatcher.

Each calls the modules that its stock counterpart calls, in the same order, and hands over query, key and value after
their norms. They hold no weights, but for an IP-Adapter's, which shares those of its stock counterpart.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from torch import Tensor, nn

from dit_accel.errors import UsageError

QKV = tuple[Tensor, Tensor, Tensor]  # query, key and value, [B, S, H, D]


class JointProcessor:
    """As `JointAttnProcessor2_0`: image tokens, then text tokens; or image tokens alone."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend among image tokens `[B, N, C]` and, if given, text tokens `[B, L, C]`.

        Returns:
            the image's tokens, and the text's if there were some. A mask is not read, nor does the stock one.
        """
        image = _normed(_project(attn, hidden_states), attn.norm_q, attn.norm_k)
        if encoder_hidden_states is None:
            return _finish(attn, self._attend(image))
        text = _project_text(attn, encoder_hidden_states)
        image_out, text_out = self._attend_jointly(attn, image, text)
        return _finish(attn, image_out), text_out

    def _attend_jointly(self, attn: nn.Module, image: QKV, text: QKV) -> tuple[Tensor, Tensor]:
        """The image's tokens before the output projection, the text's behind theirs."""
        tokens = image[0].shape[1]
        out = self._attend(tuple(torch.cat(pair, dim=1) for pair in zip(image, text, strict=True)))
        image_out, text_out = out[:, :tokens], out[:, tokens:]
        # The last block makes nothing of its text, and its attention has no projection for it.
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)

    def _attend(self, qkv: QKV) -> Tensor:
        """`[B, S, H D]`."""
        # Neither is there where nothing leads to us: torch's own attention then, as the stock processors have it.
        backend = getattr(self, "_attention_backend", AttentionBackendName.NATIVE)
        config = getattr(self, "_parallel_config", None)
        out = dispatch_attention_fn(*qkv, backend=backend, parallel_config=config)
        return out.flatten(2).to(qkv[0].dtype)


class FusedProcessor(JointProcessor):
    """As `FusedJointAttnProcessor2_0`: one projection for query, key and value. Like it, it applies no norms."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend among image tokens `[B, N, C]` and text tokens `[B, L, C]`.

        Raises:
            UsageError: no text, as in the second attention of SD3.5-medium; diffusers' own fails there as well.
        """
        if encoder_hidden_states is None:
            raise UsageError(
                "diffusers' fused projections of Stable Diffusion 3 serve attentions with text only, and this one has "
                "none. Call `transformer.unfuse_qkv_projections()`, then make the attention sparse."
            )
        image = _heads(attn, *attn.to_qkv(hidden_states).chunk(3, dim=-1))
        text = _heads(attn, *attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1))
        tokens = hidden_states.shape[1]
        out = self._attend(tuple(torch.cat(pair, dim=1) for pair in zip(image, text, strict=True)))
        image_out = _finish(attn, out[:, :tokens])
        text_out = out[:, tokens:]
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


class ImagePromptProcessor(JointProcessor, SD3IPAdapterJointAttnProcessor2_0):
    """As `SD3IPAdapterJointAttnProcessor2_0`: the image's tokens also attend to themselves and an image prompt's.

    That second attention has more keys than queries, and runs dense. It is one of the stock class, so that pipelines
    find it among the model's modules, scale it and unload it.

    Args:
        stock: whose weights it shares.
    """

    def __init__(self, stock: SD3IPAdapterJointAttnProcessor2_0) -> None:
        vars(self).update(vars(stock))  # as `copy.copy` does

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend among image tokens `[B, N, C]`, text tokens `[B, L, C]` and an image prompt's `[B, P, C]`.

        Args:
            temb: embedding of the timestep that modulates the image prompt, `[B, E]`.
        """
        raw = _project(attn, hidden_states)
        image = _normed(raw, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is None:
            out, text_out = self._attend(image), None
        else:
            out, text_out = self._attend_jointly(attn, image, _project_text(attn, encoder_hidden_states))
        if self.scale != 0 and ip_hidden_states is not None:
            out = out + self._attend_to_prompt(attn, raw, ip_hidden_states, temb) * self.scale
        out = _finish(attn, out)
        return out if text_out is None else (out, text_out)

    def _attend_to_prompt(self, attn: nn.Module, image: QKV, prompt: Tensor, temb: Tensor | None) -> Tensor:
        prompt = self.norm_ip(prompt, temb=temb)
        key, value = _heads(attn, self.to_k_ip(prompt), self.to_v_ip(prompt))
        query, image_key, image_value = _normed(image, self.norm_q, self.norm_k)
        key = torch.cat([image_key, self.norm_ip_k(key)], dim=1)
        return self._attend((query, key, torch.cat([image_value, value], dim=1)))


_MADE_FOR = {
    JointAttnProcessor2_0: JointProcessor,
    FusedJointAttnProcessor2_0: FusedProcessor,
}


def dispatching(stock: Any) -> JointProcessor | None:
    """A processor that does what a stock one does, through the dispatcher; None for one not known, subclasses
    included."""
    if type(stock) is SD3IPAdapterJointAttnProcessor2_0:
        return ImagePromptProcessor(stock)
    made = _MADE_FOR.get(type(stock))
    return None if made is None else made()


def takes_image_prompt(stock: Any) -> bool:
    """Whether a stock processor is an IP-Adapter's."""
    return isinstance(stock, SD3IPAdapterJointAttnProcessor2_0)


def _heads(attn: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, S, H D]` each, as `[B, S, H, D]`."""
    return tuple(x.unflatten(-1, (attn.heads, -1)) for x in tensors)


def _project(attn: nn.Module, image: Tensor) -> QKV:
    return _heads(attn, attn.to_q(image), attn.to_k(image), attn.to_v(image))


def _project_text(attn: nn.Module, text: Tensor) -> QKV:
    qkv = _heads(attn, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    return _normed(qkv, attn.norm_added_q, attn.norm_added_k)


def _normed(qkv: QKV, norm_q: nn.Module | None, norm_k: nn.Module | None) -> QKV:
    query, key, value = qkv
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _finish(attn: nn.Module, image: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(image))
