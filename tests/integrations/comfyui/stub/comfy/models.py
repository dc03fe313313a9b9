"""Small models whose attentions come as those of the core's families do: by block, layout, text and mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from comfy.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, wrappers_in

WIDTH, HEADS = 32, 2


class CONST:
    """Models of this kind predict a velocity."""


class BaseModel(nn.Module):
    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model, self.model_sampling = diffusion_model, CONST()

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **given):
        wrappers = wrappers_in(transformer_options, WrappersMP.APPLY_MODEL)
        executor = WrapperExecutor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **given)

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options, **given):
        velocity = self.diffusion_model(x, t, c_crossattn, transformer_options, **given)
        return x - t.view(-1, *(1,) * (x.ndim - 1)) * velocity


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keys: Tensor, form: str, **more: Any) -> Tensor:
        q = self.qkv(x)[..., :WIDTH]
        k, v = self.qkv(keys)[..., WIDTH:].chunk(2, dim=-1)
        if form == "heads first":
            q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
            return self.proj(optimized_attention(q, k, v, HEADS, skip_reshape=True, **more))
        if form == "values apart":
            v = v.unflatten(2, (HEADS, -1))
        return self.proj(optimized_attention(q, k, v, heads=HEADS, **more))


class _Block(nn.Module):
    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.attn, self.x_block_self_attn = _Attention(), extra
        self.attn2 = _Attention() if extra else None
        self.x_block = self  # as SD3's joint blocks have one within


class _Model(nn.Module):
    """Latents to tokens and back, 2 x 2 of them to one."""

    patch_size: Any = (1, 2, 2)
    channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.into, self.text_in = nn.Linear(4 * self.channels, WIDTH), nn.Linear(8, WIDTH)
        self.out, self.time = nn.Linear(WIDTH, 4 * self.channels), nn.Linear(1, WIDTH)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any], **given: Any
    ) -> Tensor:
        video = x if x.ndim == 5 else x[:, :, None]
        rows, columns = (math.ceil(size / 2) for size in video.shape[3:])
        padded = nn.functional.pad(video, (0, 2 * columns - video.shape[4], 0, 2 * rows - video.shape[3]))
        cut = padded.unflatten(4, (columns, 2)).unflatten(3, (rows, 2))  # [B, C, F, H, 2, W, 2]
        tokens = self.into(cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)) + self.time(t[:, None, None])
        place = torch.arange(tokens.shape[1], dtype=torch.float32)[:, None] * torch.linspace(0.1, 2, WIDTH)
        tokens = self.blocks_of(tokens + place.sin(), self.text_in(context), transformer_options, **given)
        cut = self.out(tokens).unflatten(2, (self.channels, 2, 2)).unflatten(1, (video.shape[2], rows, columns))
        whole = cut.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
        whole = whole[..., : video.shape[3], : video.shape[4]]
        return whole if x.ndim == 5 else whole[:, :, 0]


class WanModel(_Model):
    dim, model_type = WIDTH, "t2v"

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(extra=True) for _ in range(2))

    def blocks_of(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        options["block_type"] = "double"
        for i, block in enumerate(self.blocks):
            options["block_index"] = i
            x = x + block.attn(x, x, "flat", transformer_options=options)
            x = x + block.attn2(x, text, "flat", transformer_options=options)
        return x


class _TwoStream(_Model):
    text_first = True

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(_Block() for _ in range(2))
        self.single_blocks = nn.ModuleList(_Block() for _ in range(1))

    def blocks_of(self, x: Tensor, text: Tensor, options: dict[str, Any], mask: Tensor | None = None) -> Tensor:
        whole = torch.cat([text, x] if self.text_first else [x, text], dim=1)
        for kind, blocks in (("double", self.double_blocks), ("single", self.single_blocks)):
            options["block_type"] = kind
            for i, block in enumerate(blocks):
                options["block_index"] = i
                whole = whole + block.attn(whole, whole, "heads first", mask=mask, transformer_options=options)
        return whole[:, text.shape[1] :] if self.text_first else whole[:, : x.shape[1]]


class Flux(_TwoStream):
    patch_size = 2


class HunyuanVideo(_TwoStream):
    text_first = False

    def __init__(self) -> None:
        super().__init__()
        self.refiner = _Attention()

    def blocks_of(
        self, x: Tensor, text: Tensor, options: dict[str, Any], attention_mask: Tensor | None = None
    ) -> Tensor:
        text = text + self.refiner(text, text, "heads first", transformer_options=options)
        mask = None
        if attention_mask is not None:
            far = (attention_mask - 1).to(x.dtype) * torch.finfo(x.dtype).max
            mask = torch.cat([x.new_zeros(len(far), x.shape[1]), far], dim=1)[:, None]
        return super().blocks_of(x, text, options, mask)


class OpenAISignatureMMDITWrapper(_Model):
    """SD3: it never says which block attends."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList(_Block(extra=i == 0) for i in range(2))

    def blocks_of(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        whole = torch.cat([text, x], dim=1)
        for block in self.joint_blocks:
            whole = whole + block.attn(whole, whole, "values apart", transformer_options=options)
            if block.attn2 is not None:
                alone = whole[:, text.shape[1] :]
                alone = alone + block.attn2(alone, alone, "values apart", transformer_options=options)
                whole = torch.cat([whole[:, : text.shape[1]], alone], dim=1)
        return whole[:, text.shape[1] :]
