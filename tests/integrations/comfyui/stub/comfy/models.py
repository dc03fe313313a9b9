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
        self.diffusion_model, self.model_sampling, self.manual_cast_dtype = diffusion_model, CONST(), None

    def get_dtype(self) -> torch.dtype:
        return torch.float32

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **given):
        wrappers = wrappers_in(transformer_options, WrappersMP.APPLY_MODEL)
        executor = WrapperExecutor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **given)

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options, **given):
        level, mask = t, given.pop("denoise_mask", None)
        if mask is not None:  # [B, 1, F, H, W]: frames that are given have no noise
            level = mask.mean((1, 3, 4)) * t[:, None]
        if control is not None:
            given["control"] = control
        velocity = self.diffusion_model(x, level, c_crossattn, transformer_options, **given)
        return x - t.view(-1, *(1,) * (x.ndim - 1)) * velocity


def _rotary(places: Tensor) -> Tensor:
    """`[..., S, D / 2, 2, 2]`, of places `[..., S]`."""
    angle = places[..., None] * torch.linspace(0.02, 1, WIDTH // HEADS // 2)
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))


def _turn(x: Tensor, pe: Tensor) -> Tensor:
    """Turn `[B, S, H D]` by a table `[B or 1, S, 1, D / 2, 2, 2]`, or `[B or 1, 1, S, ...]`."""
    pe = pe if pe.shape[1] == x.shape[1] else pe.transpose(1, 2)
    pairs = x.unflatten(2, (HEADS, -1, 2))
    return (pe * pairs[..., None, :]).sum(-1).flatten(2)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keys: Tensor, form: str, pe: Tensor | None = None, **more: Any) -> Tensor:
        q = self.qkv(x)[..., :WIDTH]
        k, v = self.qkv(keys)[..., WIDTH:].chunk(2, dim=-1)
        if pe is not None:
            q, k = _turn(q, pe), _turn(k, pe)
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
    hidden_size = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.into, self.text_in = nn.Linear(4 * self.channels, WIDTH), nn.Linear(8, WIDTH)
        self.out, self.time = nn.Linear(WIDTH, 4 * self.channels), nn.Linear(1, WIDTH)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any], **given: Any
    ) -> Tensor:
        wrappers = wrappers_in(transformer_options, WrappersMP.DIFFUSION_MODEL)
        executor = WrapperExecutor(self._forward, self, wrappers)
        return executor.execute(x, t, context, transformer_options, **given)

    def _forward(
        self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any], **given: Any
    ) -> Tensor:
        video = x if x.ndim == 5 else x[:, :, None]
        rows, columns = (math.ceil(size / 2) for size in video.shape[3:])
        padded = nn.functional.pad(video, (0, 2 * columns - video.shape[4], 0, 2 * rows - video.shape[3]))
        cut = padded.unflatten(4, (columns, 2)).unflatten(3, (rows, 2))  # [B, C, F, H, 2, W, 2]
        tokens = self.into(cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))
        vec = self.time(t.reshape(len(t), -1, 1))  # [B, 1 or F, W]
        tokens = self.blocks_of(tokens, self.text_in(context), vec, transformer_options, **given)
        assert tokens.shape[1] == video.shape[2] * rows * columns
        cut = self.out(tokens).unflatten(2, (self.channels, 2, 2)).unflatten(1, (video.shape[2], rows, columns))
        whole = cut.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
        whole = whole[..., : video.shape[3], : video.shape[4]]
        return whole if x.ndim == 5 else whole[:, :, 0]


def _run_block(options: dict[str, Any], kind: str, number: int, run: Any, args: dict[str, Any]) -> dict[str, Any]:
    """A block, or what stands in for it."""
    args = {**args, "transformer_options": options}
    stand_in = options.get("patches_replace", {}).get("dit", {}).get((kind, number))
    return run(args) if stand_in is None else stand_in(args, {"original_block": run})


class WanModel(_Model):
    dim, model_type = WIDTH, "t2v"

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(extra=True) for _ in range(2))

    def blocks_of(self, x: Tensor, text: Tensor, vec: Tensor, options: dict[str, Any]) -> Tensor:
        options["block_type"] = "double"
        pe = _rotary(torch.arange(x.shape[1], dtype=torch.float32))[None, :, None]
        vec = vec[:, :, None] * torch.linspace(0.5, 1, 6)[:, None]  # [B, 1 or F, 6, W]
        for i, block in enumerate(self.blocks):
            options["block_index"] = i

            def run(args: dict[str, Any], block: nn.Module = block) -> dict[str, Any]:
                x, options = args["img"], args["transformer_options"]
                runs = x.shape[1] // args["vec"].shape[1]
                shift, scale = (args["vec"][:, :, n].repeat_interleave(runs, dim=1) for n in (0, 5))
                x = x + block.attn(shift + x, shift + x, "flat", args["pe"], transformer_options=options)
                x = x + (1 + scale) * block.attn2(x, args["txt"], "flat", transformer_options=options)
                return {"img": x}

            x = _run_block(options, "double_block", i, run, {"img": x, "txt": text, "vec": vec, "pe": pe})["img"]
        return x


class _TwoStream(_Model):
    text_first = True
    mask_name = "attn_mask"

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(_Block() for _ in range(2))
        self.single_blocks = nn.ModuleList(_Block() for _ in range(1))

    def blocks_of(
        self, x: Tensor, text: Tensor, vec: Tensor, options: dict[str, Any], mask: Tensor | None = None,
        control: dict[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        places = torch.arange(x.shape[1], dtype=torch.float32) + 1
        parts = [torch.zeros(text.shape[1]), places] if self.text_first else [places, torch.zeros(text.shape[1])]
        pe = _rotary(torch.cat(parts).expand(len(x), -1))[:, None]
        tokens, words = x.shape[1], text.shape[1]

        def join(image: Tensor, text: Tensor) -> Tensor:
            return torch.cat([text, image] if self.text_first else [image, text], dim=1)

        def attend(block: nn.Module, whole: Tensor, args: dict[str, Any]) -> Tensor:
            mixed = whole + args["vec"]
            out = block.attn(
                mixed, mixed, "heads first", args["pe"], mask=args[self.mask_name],
                transformer_options=args["transformer_options"],
            )  # fmt: skip
            return whole + out

        said = {"vec": vec, "pe": pe, self.mask_name: mask}
        options["block_type"] = "double"
        for i, block in enumerate(self.double_blocks):
            options["block_index"] = i

            def run_double(args: dict[str, Any], block: nn.Module = block) -> dict[str, Any]:
                whole = attend(block, join(args["img"], args["txt"]), args)
                if self.text_first:
                    return {"txt": whole[:, :words], "img": whole[:, words:]}
                return {"img": whole[:, :-words], "txt": whole[:, -words:]}

            out = _run_block(options, "double_block", i, run_double, {"img": x, "txt": text, **said})
            x, text = out["img"], out["txt"]
            if control is not None and i < len(control["input"]):
                x = x + control["input"][i]
        whole = join(x, text)
        options["block_type"] = "single"
        for i, block in enumerate(self.single_blocks):
            options["block_index"] = i

            def run_single(args: dict[str, Any], block: nn.Module = block) -> dict[str, Any]:
                return {"img": attend(block, args["img"], args)}

            whole = _run_block(options, "single_block", i, run_single, {"img": whole, **said})["img"]
        return whole[:, words:] if self.text_first else whole[:, :tokens]


class Flux(_TwoStream):
    patch_size = 2


class HunyuanVideo(_TwoStream):
    text_first = False
    mask_name = "attention_mask"

    def __init__(self) -> None:
        super().__init__()
        self.refiner = _Attention()

    def blocks_of(
        self, x: Tensor, text: Tensor, vec: Tensor, options: dict[str, Any], attention_mask: Tensor | None = None
    ) -> Tensor:
        text = text + self.refiner(text, text, "heads first", transformer_options=options)
        mask = None
        if attention_mask is not None:
            far = (attention_mask - 1).to(x.dtype) * torch.finfo(x.dtype).max
            mask = torch.cat([x.new_zeros(len(far), x.shape[1]), far], dim=1)[:, None]
        return super().blocks_of(x, text, vec, options, mask)


class OpenAISignatureMMDITWrapper(_Model):
    """SD3: it never says which block attends."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList(_Block(extra=i == 0) for i in range(2))

    def blocks_of(self, x: Tensor, text: Tensor, vec: Tensor, options: dict[str, Any]) -> Tensor:
        place = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.linspace(0.1, 2, WIDTH)
        x = x + place.sin()
        for i, block in enumerate(self.joint_blocks):

            def run(args: dict[str, Any], block: nn.Module = block) -> dict[str, Any]:
                text, options = args["txt"], args["transformer_options"]
                whole = torch.cat([text, args["img"]], dim=1) + args["vec"]
                whole = whole + block.attn(whole, whole, "values apart", transformer_options=options)
                text, alone = whole[:, : text.shape[1]], whole[:, text.shape[1] :]
                if block.attn2 is not None:
                    alone = alone + block.attn2(alone, alone, "values apart", transformer_options=options)
                return {"txt": text, "img": alone}

            out = _run_block(options, "double_block", i, run, {"img": x, "txt": text, "vec": vec})
            x, text = out["img"], out["txt"]
        return x
