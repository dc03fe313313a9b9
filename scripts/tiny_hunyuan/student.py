"""What is trained, called exactly as `HunyuanVideoPipeline` calls it, and how it becomes that pipeline.

HunyuanVideo runs without a negative branch: its guidance was distilled into it and is told to it as a number. So it is
here, in two runs. The first learns the velocity of the data, and is told a guidance of 1. The second goes on from it
and is told guidances from 1 to 6, drawn by lot; what it learns then is the velocity of the data and, on top of it, what
so much guidance adds according to the first one: (guidance - 1) x (its velocity with the caption - without).
"""

from __future__ import annotations

import torch
from diffusers import HunyuanVideoPipeline
from tiny_models.pool import Drawn
from tiny_models.students import ClipStudent
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from .attention import MORE, WideProcessor
from .models import make_clip, make_scheduler, make_transformer
from .text import Reader

STRONGEST = 6.0  # guidance that is drawn


class HunyuanStudent(ClipStudent):
    """A Llama, a CLIP and the transformer.

    Args:
        before: ids of the template before a caption, `[1, CROP]`.
        empty: ids and mask of the empty caption, `[1, CAPTION_TOKENS]`.
        teacher: a trained student whose guidance is built into this one; it is left as it is.
    """

    folders = {"transformer": "transformer", "text_encoder": "text_encoder", "clip.0": "text_encoder_2"}  # noqa: RUF012
    visual = 0
    tapped = 3

    def __init__(
        self,
        llama: nn.Module,
        before: Tensor,
        empty: tuple[Tensor, Tensor],
        teacher: HunyuanStudent | None = None,
    ):
        super().__init__()
        self.text_encoder = llama
        self.clip = nn.ModuleList([make_clip(llama.config.vocab_size)])
        self.transformer = make_transformer()
        self.read, self.empty = Reader(before), empty
        self.teachers = (
            () if teacher is None else (teacher,)
        )  # no module of this one: not trained, nor kept with it
        self.guidance: Tensor | None = None  # that was told last, `[B]`

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    @property
    def head_width(self) -> int:
        return super().head_width + MORE

    def hurry(self) -> None:
        """Attention for training; the pipeline runs the stock one."""
        for block in self.blocks:
            block.attn.set_processor(WideProcessor())

    def compile_parts(self) -> None:
        """Compile the blocks alone: the Llama's layers are small, and its states are collected by hooks.

        Blocks of a class share one limit of graphs: two of them for every kind of clip, and again for the teacher.
        """
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    def forward(self, latents: Tensor, sigma: Tensor, drawn: Drawn) -> Tensor:
        self.guidance = torch.ones_like(sigma)
        if self.teachers:
            self.guidance = 1 + (STRONGEST - 1) * torch.rand_like(sigma)
        return self.denoise(latents, sigma, drawn.ids, drawn.mask, self.guidance)

    def denoise(self, latents: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor, guidance: Tensor) -> Tensor:
        """The velocity, of the shape of `latents`; noise levels and guidance `[B]`, ids and mask `[B, L]`."""
        self.words = self.read(self.text_encoder, ids, mask)
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=self.words,
            encoder_attention_mask=mask,
            pooled_projections=self.clip[0](ids).pooler_output,
            guidance=guidance * 1000,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def aim(self, velocity: Tensor, noisy: Tensor, sigma: Tensor, drawn: Drawn) -> Tensor:
        for teacher in self.teachers:
            count = len(noisy)
            self.empty = tuple(x.to(noisy.device) for x in self.empty)  # once, as the template
            empty = (x.expand(count, -1) for x in self.empty)
            ids, mask = (torch.cat(pair) for pair in zip((drawn.ids, drawn.mask), empty, strict=True))
            both = torch.cat([noisy, noisy]), torch.cat([sigma, sigma])
            given, other = teacher.denoise(*both, ids, mask, torch.ones_like(both[1])).float().chunk(2)
            # a caption that was dropped adds nothing
            velocity = velocity + (self.guidance - 1).view(-1, *[1] * (noisy.ndim - 1)) * (given - other)
        return velocity

    def make_pipeline(
        self, vae: nn.Module, tokenizer: PreTrainedTokenizerFast, tokenizer_2: PreTrainedTokenizerFast
    ) -> HunyuanVideoPipeline:
        return HunyuanVideoPipeline(
            text_encoder=self.text_encoder.eval(),
            tokenizer=tokenizer,
            transformer=self.transformer.eval(),
            vae=vae.eval(),
            scheduler=make_scheduler(),
            text_encoder_2=self.clip[0].eval(),
            tokenizer_2=tokenizer_2,
        )
