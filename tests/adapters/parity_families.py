"""The families whose tokens may be brought into another order, as `test_parity.py` holds each against stock diffusers.

Every grid is odd. A new family adds a row to `FAMILIES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from joint_models import run, run_with_sound
from sd3_models import MEDIUM, calls_in, tiny
from sd3_models import REORDERED as SD3
from torch import Tensor, nn

from dit_accel import testing

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """What a forward is of."""

    config: Options = field(default_factory=dict)  # of the transformer
    inputs: Options = field(default_factory=dict)  # of its arguments


@dataclass(frozen=True)
class Family:
    """A tiny transformer and what must hold for it."""

    make: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]
    calls: Callable[[Options], int]  # of a config: self-attentions of a forward
    reordered: Mapping[str, Case]  # everything that may be reordered
    methods: Mapping[str, Case]  # what every method is tried on
    parts: tuple[str, ...]  # modules behind which a hook of ours stands
    parted: Options = field(default_factory=dict)  # arguments by which each of them matters
    cross: Callable[[Options], int] = lambda config: 0  # of a config: attentions that stay stock
    shared: tuple[str, ...] = ()  # tensors among the arguments that are not by batch row
    run: Callable[[nn.Module, dict[str, Any]], Tensor] = run

    def forward(self, case: Case, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
        """A transformer and its arguments."""
        transformer = self.make(**case.config)
        return transformer, self.inputs(transformer, **{**case.inputs, **more})

    def mixed(self, pair: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """The first row of a batch of two and the second of another."""
        by_row = {k for k, x in pair.items() if isinstance(x, Tensor) and k not in self.shared}
        return {k: torch.cat([x[:1], other[k][1:]]) if k in by_row else x for k, x in pair.items()}


def _wan_layers(config: Options) -> int:
    """Of Wan, each with a self-attention and a cross-attention."""
    return 2 + len(config.get("vace_layers", ()))


def _wan_inputs(transformer: nn.Module, *, per_token: bool = False, **options: Any) -> dict[str, Any]:
    inputs = testing.tiny_wan_inputs(transformer, **{"grid": (3, 5, 7), **options})
    if per_token:
        batch, tokens = len(inputs["hidden_states"]), 105
        inputs["timestep"] = torch.randint(0, 1000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return inputs


def _product(configs: Mapping[str, Case], texts: Mapping[str, Options]) -> dict[str, Case]:
    """Every configuration with every text."""
    return {
        f"{name}-{text}": Case(case.config, {**case.inputs, **options})
        for (name, case), (text, options) in itertools.product(configs.items(), texts.items())
    }


def _lengths(*texts: int) -> dict[str, Options]:
    return {str(text): {"text": text} for text in texts}


# what the text is: tokens of the language model that are valid of 13, of ByT5's 6, whether there is an image of 5
HUNYUAN15_TEXTS: dict[str, Options] = {
    "all": dict(valid=13, valid_glyphs=6, image=True),
    "i2v": dict(valid=8, valid_glyphs=3, image=True),
    "t2v": dict(valid=8, valid_glyphs=3),
    "no glyphs": dict(valid=8, valid_glyphs=0),
    "one token": dict(valid=1, valid_glyphs=0),
}
_REFERENCE = {"references": ((9, 7),)}
_WAN = {
    "t2v": Case(),
    "i2v": Case({"i2v": True}),
    "vace": Case({"vace_layers": [0, 1], "vace_in_channels": 4}),
    "patches of two frames": Case({"patch_size": (2, 2, 2)}),
}
_TOKEN_REPLACE = {"image_condition_type": "token_replace"}

FAMILIES: dict[str, Family] = {
    "wan": Family(
        testing.tiny_wan_transformer,
        _wan_inputs,
        _wan_layers,
        # diffusers' VACE transformer takes one timestep per row only
        _WAN | _product({k: v for k, v in _WAN.items() if k != "vace"}, {"timestep per token": {"per_token": True}}),
        {"t2v": Case({}, {"grid": (3, 5, 6)})},
        parts=("rope", "patch_embedding", "proj_out"),
        cross=_wan_layers,
    ),
    "flux": Family(
        testing.tiny_flux_transformer,
        testing.tiny_flux_inputs,
        lambda config: 3,
        {
            "1": Case({}, {"text": 1}),
            "19 guided": Case({"guidance_embeds": True}, {"text": 19}),
            "32": Case({}, {"text": 32}),
        },
        {"image": Case({}, {"grid": (13, 9)})},
        parts=("pos_embed",),
        shared=("img_ids", "txt_ids"),
    ),
    "flux2": Family(
        testing.tiny_flux2_transformer,
        testing.tiny_flux2_inputs,
        lambda config: 3,
        _product(
            {
                "dev": Case(),
                "klein": Case({"guidance_embeds": False}),
                "references": Case({}, {"references": ((9, 11), (9, 11))}),
            },
            _lengths(1, 19, 32),
        ),
        {"alone": Case({}, {"grid": (9, 7)}), "reference": Case({}, {"grid": (9, 7), **_REFERENCE})},
        parts=("pos_embed", "x_embedder", "proj_out"),
    ),
    "qwen-image": Family(
        testing.tiny_qwen_image_transformer,
        testing.tiny_qwen_image_inputs,
        lambda config: 2,
        _product(
            {
                "alone": Case(),
                "edit": Case({}, {"references": ((9, 11),)}),
                "layered": Case({"use_layer3d_rope": True}, {"references": ((9, 11), (9, 11))}),
                "2511 alone": Case({"zero_cond_t": True}),
            },
            # a mask that keeps nothing out is no hindrance
            {**_lengths(1, 32), "19 masked": {"text": 19, "valid": 19}},
        ),
        {"alone": Case({}, {"grid": (9, 7)}), "reference": Case({}, {"grid": (9, 7), **_REFERENCE})},
        parts=("pos_embed", "img_in", "proj_out"),
    ),
    "ltx": Family(
        testing.tiny_ltx_transformer,
        testing.tiny_ltx_inputs,
        lambda config: 2,
        # what pipelines send: text to video, image to video, and conditions
        {
            "grid": Case(),
            "timestep per token": Case({}, {"per_token": True}),
            "coordinates": Case({}, {"coords": True}),
            "condition ahead": Case({}, {"coords": True, "ahead": 1, "per_token": True}),
        },
        {"video": Case({}, {"grid": (3, 5, 6)})},
        parts=("rope", "proj_in", "time_embed", "proj_out"),
        parted={"per_token": True},
        cross=lambda config: 2,
    ),
    "sd3": Family(
        tiny,
        testing.tiny_sd3_inputs,
        calls_in,
        _product({name: Case(config) for name, config in SD3.items()}, _lengths(1, 19, 333)),
        {"medium": Case(MEDIUM, {"grid": (13, 9)})},
        parts=("pos_embed", "proj_out"),
    ),
    "hunyuan-video": Family(
        testing.tiny_hunyuan_video_transformer,
        testing.tiny_hunyuan_video_inputs,
        lambda config: 2,
        _product(
            {
                "t2v": Case(),
                "no guidance": Case({"guidance_embeds": False}),
                "latents beside": Case({"in_channels": 9}),
                "first frame by tokens": Case(_TOKEN_REPLACE),
            },
            {f"valid {valid}": {"valid": valid} for valid in (1, 11, 19)},
        ),
        {
            "t2v": Case({}, {"grid": (3, 5, 6), "valid": 13}),
            "first frame by tokens": Case(_TOKEN_REPLACE, {"grid": (3, 5, 6), "valid": 13}),
        },
        parts=("rope", "x_embedder"),
        cross=lambda config: 1,  # the refiner's
    ),
    "hunyuan-video15": Family(
        testing.tiny_hunyuan_video15_transformer,
        testing.tiny_hunyuan_video15_inputs,
        lambda config: 2,
        _product({"text": Case()}, HUNYUAN15_TEXTS),
        {"i2v": Case({}, {"grid": (3, 5, 6), **HUNYUAN15_TEXTS["i2v"]})},
        parts=("rope", "x_embedder"),
        cross=lambda config: 1,  # the refiner's
        parted=HUNYUAN15_TEXTS["i2v"],
    ),
    "minimax-h3": Family(
        testing.tiny_minimax_h3_transformer,
        testing.tiny_minimax_h3_inputs,
        lambda config: 2,
        {
            "text": Case(),
            "key frames": Case({}, {"keyframes": ("first", "last")}),
            "no sound": Case({}, {"audio": 0}),
        },
        {"key frame": Case({}, {"grid": (3, 5, 6), "keyframes": ("first",), "text": 1})},
        parts=("rope", "proj_in", "proj_out"),
        cross=lambda config: 1,  # the refiner's
        shared=(
            "timestep", "timestep_indices", "position_ids", "token_tags", "video_indices", "audio_indices",
            "text_indices",
        ),
        run=run_with_sound,
    ),
}  # fmt: skip
