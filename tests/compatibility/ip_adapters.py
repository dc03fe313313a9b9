"""The IP-Adapters that diffusers loads into a transformer we know: tiny pipelines, random adapters, short runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from PIL import Image
from torch import Tensor

import dit_accel
from dit_accel.testing import tiny_flux_pipeline, tiny_sd3_pipeline
from dit_accel.testing.seeded import seeded
from dit_accel.testing.siglip import tiny_siglip

OPTIONS = {"block": 16, "min_tokens": 0, "strict": True}
REPLACED = "its processor was replaced after installation"
STEPS = 2
_SIZE = {"height": 18, "width": 22, "num_inference_steps": STEPS, "output_type": "latent"}  # 9 x 11 tokens


@dataclass(frozen=True)
class Host:
    """A tiny pipeline that takes an IP-Adapter. Its runs are of two steps."""

    name: str
    make: Callable[[], Any]
    load: Callable[..., None]  # of a pipeline and a seed: loads a random adapter, as diffusers loads one
    call: Callable[[bool], dict[str, Any]]  # of whether there is an image prompt: arguments of a run
    layers: int  # self-attentions of a forward
    reads: int  # of an image prompt's tokens in a forward, besides self-attention
    projects: int  # attentions of a forward by which the adapter makes these tokens of the image
    adapted: type  # what processors the adapter sets in the first block
    plain: type  # what processors are there without one
    scale: float  # another than the one it is loaded with, that shows
    rtol: float

    def run(self, pipe: Any, image: bool = True, **changes: Any) -> Tensor:
        """Latents of a run, with an image prompt or without one."""
        generator = torch.Generator().manual_seed(0)
        return pipe(**{**_SIZE, "generator": generator, **self.call(image), **changes}).images

    def loaded(self, seed: int = 0) -> Any:
        """A pipeline with the adapter of a seed."""
        pipe = self.make()
        self.load(pipe, seed)
        return pipe

    def close(self, ours: Tensor, true: Tensor) -> None:
        torch.testing.assert_close(ours, true, rtol=self.rtol, atol=1e-4)


def accelerate(pipe: Any, keep: float = 1.0, **options: Any) -> dit_accel.Handle:
    return dit_accel.accelerate(pipe, None, keep=keep, **{**OPTIONS, **options})


def differs(ours: Tensor, true: Tensor) -> bool:
    return float((ours - true).norm() / true.norm()) > 1e-3


def first(pipe: Any) -> Any:
    """The processor of the first block's self-attention."""
    return pipe.transformer.transformer_blocks[0].attn.processor


def kinds(pipe: Any) -> set[type]:
    return {type(processor) for processor in pipe.transformer.attn_processors.values()}


_CLIP, _TEXT, _INNER = (
    12,
    32,
    32,
)  # FLUX: widths of an image's embedding, of text and of a block; it has one dual block


def _load_into_flux(pipe: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    projection = {"proj.weight": randn(4 * _TEXT, _CLIP), "proj.bias": randn(4 * _TEXT)}
    projection |= {"norm.weight": 1 + randn(_TEXT), "norm.bias": randn(_TEXT)}
    layer = {}
    for name in ("to_k_ip", "to_v_ip"):
        layer |= {f"0.{name}.weight": randn(_INNER, _TEXT), f"0.{name}.bias": randn(_INNER)}
    weights = {"image_proj": projection, "ip_adapter": layer}
    pipe.load_ip_adapter(weights, weight_name=None, image_encoder_pretrained_model_name_or_path=None)


def _flux_call(image: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    images = {
        name: [torch.randn(1, 1, _CLIP, generator=generator)]
        for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    }
    prompts = {
        "prompt_embeds": torch.randn(1, 19, _TEXT, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 24, generator=generator),
    }
    return prompts | (images if image else {})


_IMAGE, _SD3_LAYERS = 20, 3  # SD3: width of an image's tokens; its first block has two self-attentions


def _make_sd3() -> Any:
    return tiny_sd3_pipeline(transformer={"qk_norm": "rms_norm", "dual_attention_layers": (0,)})


def _load_into_sd3(pipe: Any, seed: int = 0) -> None:
    if pipe.is_ip_adapter_active:
        pipe.unload_ip_adapter()  # diffusers loads none over another
    with seeded(11):
        pipe.register_modules(**tiny_siglip(_IMAGE))  # unloading takes it away
    with seeded(seed + 3):
        made = [SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, 64) for _ in range(_SD3_LAYERS)]
        projection = IPAdapterTimeImageProjection(
            embed_dim=_IMAGE, output_dim=32, hidden_dim=64, heads=1, num_queries=5, timestep_in_dim=32
        )
    weights = {f"{i}.{name}": w for i, module in enumerate(made) for name, w in module.state_dict().items()}
    parts = {"ip_adapter": weights, "image_proj": projection.state_dict()}
    pipe.load_ip_adapter(parts, weight_name=None, image_encoder_folder=None, low_cpu_mem_usage=False)
    pipe.transformer.requires_grad_(False)


def _sd3_call(image: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    names = {"prompt_embeds": (1, 19, 24), "pooled_prompt_embeds": (1, 20)}
    prompts = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    prompts |= {f"negative_{name}": -x for name, x in prompts.items()}
    gradient = torch.arange(12 * 12 * 3).remainder(251).to(torch.uint8).view(12, 12, 3)
    images = {"ip_adapter_image": Image.fromarray(gradient.numpy())}
    return {**prompts, "guidance_scale": 4.0, **(images if image else {})}


FLUX = Host(
    "flux",
    tiny_flux_pipeline,
    _load_into_flux,
    _flux_call,
    layers=3,
    reads=1,
    projects=0,
    adapted=FluxIPAdapterAttnProcessor,
    plain=FluxAttnProcessor,
    scale=0.5,
    rtol=1e-4,
)
SD3 = Host(
    "sd3",
    _make_sd3,
    _load_into_sd3,
    _sd3_call,
    layers=_SD3_LAYERS,
    reads=_SD3_LAYERS,
    projects=4,
    adapted=SD3IPAdapterJointAttnProcessor2_0,
    plain=JointAttnProcessor2_0,
    scale=0.9,
    rtol=1e-3,
)
HOSTS = (FLUX, SD3)
