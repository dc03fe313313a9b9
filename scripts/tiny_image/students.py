"""What is trained of each family, called exactly as its pipeline calls it, and how it becomes that pipeline."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from tiny_models.pool import Drawn
from tiny_models.students import ClipStudent
from tiny_models.text import CAPTION_TOKENS
from torch import Tensor, nn
from torch.nn import functional as F

from .models import (
    FACTOR,
    make_clip,
    make_flux_transformer,
    make_scheduler,
    make_sd3_transformer,
)
from .text import encode, load_tokenizer


class ImageStudent(ClipStudent):
    """One of the image models: which block is tapped, and how many tokens of text its attentions read."""

    tapped: int
    text_tokens: int

    def make_pipeline(self, vae: nn.Module) -> DiffusionPipeline:
        raise NotImplementedError


class FluxStudent(ImageStudent):
    """FLUX reads the words of the text encoder, padding included, and the pooled output of one CLIP.

    Padding is longer than a caption: text fills a block of keys.
    """

    folders = {"transformer": "transformer", "text_encoder": "text_encoder_2", "clip.0": "text_encoder"}  # noqa: RUF012
    tapped = 5
    text_tokens = 64

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_encoder = encoder
        self.clip = nn.ModuleList([make_clip(encoder.config.vocab_size, projected=False)])
        self.transformer = make_flux_transformer()
        self._known_places: dict[tuple[int, int], Tensor] = {}

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def forward(self, latents: Tensor, sigma: Tensor, drawn: Drawn) -> Tensor:
        said = encode(self.text_encoder, F.pad(drawn.ids, (0, self.text_tokens - CAPTION_TOKENS)))
        self.words = said[:, :CAPTION_TOKENS]
        batch, channels, height, width = latents.shape
        velocity = self.transformer(
            hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
            timestep=sigma,
            pooled_projections=self.clip[0](drawn.ids).pooler_output,
            encoder_hidden_states=said,
            txt_ids=latents.new_zeros(self.text_tokens, 3),
            img_ids=self._places(batch, height // 2, width // 2, latents),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(velocity, FACTOR * height, FACTOR * width, FACTOR)

    def _places(self, batch: int, height: int, width: int, like: Tensor) -> Tensor:
        """The places of an image's tokens, made once: the pipeline makes them on the host, and a step would wait."""
        size = height, width
        if size not in self._known_places:
            self._known_places[size] = FluxPipeline._prepare_latent_image_ids(batch, *size, like.device, like.dtype)
        return self._known_places[size]

    def make_pipeline(self, vae: nn.Module) -> FluxPipeline:
        return FluxPipeline(
            scheduler=make_scheduler(),
            vae=vae.eval(),
            text_encoder=self.clip[0].eval(),
            tokenizer=load_tokenizer(),
            text_encoder_2=self.text_encoder.eval(),
            tokenizer_2=load_tokenizer(self.text_tokens),
            transformer=self.transformer.eval(),
        )


class Sd3Student(ImageStudent):
    """SD3 reads the last but one states of two CLIPs side by side, then the words of the text encoder."""

    folders = {  # noqa: RUF012
        "transformer": "transformer",
        "text_encoder": "text_encoder_3",
        "clip.0": "text_encoder",
        "clip.1": "text_encoder_2",
    }
    tapped = 2
    text_tokens = 96

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_encoder = encoder
        self.clip = nn.ModuleList(make_clip(encoder.config.vocab_size, projected=True) for _ in range(2))
        self.transformer = make_sd3_transformer()

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def forward(self, latents: Tensor, sigma: Tensor, drawn: Drawn) -> Tensor:
        self.words = encode(self.text_encoder, drawn.ids)
        read = [clip(drawn.ids, output_hidden_states=True) for clip in self.clip]
        states = torch.cat([each.hidden_states[-2] for each in read], -1)
        states = F.pad(states, (0, self.words.shape[-1] - states.shape[-1]))
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([states, self.words], 1),
            pooled_projections=torch.cat([each.text_embeds for each in read], -1),
            return_dict=False,
        )[0]

    def make_pipeline(self, vae: nn.Module) -> StableDiffusion3Pipeline:
        tokenizer = load_tokenizer()
        return StableDiffusion3Pipeline(
            transformer=self.transformer.eval(),
            scheduler=make_scheduler(),
            vae=vae.eval(),
            text_encoder=self.clip[0].eval(),
            tokenizer=tokenizer,
            text_encoder_2=self.clip[1].eval(),
            tokenizer_2=tokenizer,
            text_encoder_3=self.text_encoder.eval(),
            tokenizer_3=tokenizer,
        )


FAMILIES: dict[str, type[ImageStudent]] = {"flux": FluxStudent, "sd3": Sd3Student}
