"""One step of flow matching on latents of rendered scenes, with the text encoders trained along.

Matrices inside the blocks are trained by Muon, everything else by AdamW. A head on a middle layer learns to say what
each token shows (see `labels.py`), another what each word speaks of (see `captions.py`); their weight falls with the
learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .captions import CaptionReader
from .labels import TokenReader
from .muon import BatchedMuon
from .pool import Drawn
from .ranks import Ranks
from .shards import load_shards

WEIGHT_DECAY = 0.01
READING_WEIGHT = 0.03  # of both heads; none where a run goes on from a model whose heads are not there
MUON_RATE = 2.0  # times the rate of AdamW
OBJECT_WEIGHT = 4.0  # extra weight of latents that show an object, fading out towards pure noise


class Student(nn.Module):
    """What is trained: text encoders and a transformer, called exactly as the model's pipeline calls them.

    A subclass fills `text_encoder` and `transformer`, has `forward(latents, sigma, drawn)` return the velocity (shape
    of `latents`) and leave in `words` what the encoder said `[B, CAPTION_TOKENS, width]`, and names its `blocks`.
    """

    visual = 1  # place of the visual stream in what a block of two streams returns
    joint = False  # whether text takes part in the blocks' self-attention

    text_encoder: nn.Module
    transformer: nn.Module
    words: Tensor | None = None
    hidden: Tensor | None = None  # what the tapped block returned last for visual tokens, `[B, T*H*W, width]`

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks, first to last; their matrices are Muon's."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        config = self.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def head_width(self) -> int:
        """Channels of a head as the attention kernel sees it."""
        return self.transformer.config.attention_head_dim

    def tap(self, block: int) -> None:
        """Keep in `hidden` what this block returns from now on; of a pair of streams the visual one."""

        def keep(_module, _inputs, output) -> None:
            self.hidden = output[self.visual] if isinstance(output, tuple) else output

        self.blocks[block].register_forward_hook(keep)

    def aim(self, velocity: Tensor, noisy: Tensor, sigma: Tensor, drawn: Drawn) -> Tensor:
        """What the last `forward(noisy, sigma, drawn)` should have returned, given the velocity of the data."""
        return velocity

    def compile_parts(self) -> None:
        """Compile the blocks and the text encoder: their bound methods, so that the hook of the tap stays outside."""
        for module in (self.text_encoder, *self.blocks):
            module.forward = torch.compile(module.forward, dynamic=False)


@dataclass(frozen=True)
class Heads:
    """The training-only heads: `reader` of the transformer's tokens, `words` of the encoder's."""

    modules: nn.ModuleDict
    weight: float

    @classmethod
    def make(cls, student: Student, resume: Path | None, text_from: Path | None) -> Heads:
        """New heads, or those of a run that is gone on from; a pipeline folder has none.

        Heads that know nothing would first of all bend a trained transformer to themselves: they get no weight then.
        """
        modules = nn.ModuleDict(
            {
                "reader": TokenReader(student.width),
                "words": CaptionReader(student.text_encoder.get_input_embeddings().embedding_dim),
            }
        )
        known = []
        for (name, head), folder in zip(modules.items(), (resume, text_from), strict=True):
            known.append(folder is not None and (folder / f"{name}-1.safetensors").is_file())
            if known[-1]:
                head.load_state_dict(load_shards(folder, name))
        return cls(modules, READING_WEIGHT if resume is None or all(known) else 0.0)


class Learner:
    """Losses, gradients averaged over ranks and clipped, two optimisers.

    Args:
        rate: peak learning rate of AdamW.
        final: learning rate at the end, as a share of the peak.
        shift: of the noise schedule that the model's pipeline samples with.
        graphed: whether steps are to be captured: what `set_pace` sets is on the device then.
    """

    def __init__(
        self,
        student: Student,
        heads: Heads,
        rate: float,
        final: float,
        shift: float,
        ranks: Ranks,
        graphed: bool = False,
    ):
        self.student, self.heads, self.ranks = student, heads, ranks
        self.rate, self.final, self.shift = rate, final, shift
        self.parameters = [*student.parameters(), *heads.modules.parameters()]
        inner = [p for block in student.blocks for p in block.parameters() if p.ndim == 2]
        known = {id(p) for p in inner}
        outer = [p for p in self.parameters if id(p) not in known]
        groups = [
            {"params": [p for p in outer if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in outer if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.share = torch.ones((), device=outer[0].device)  # of the weight of the heads
        rates = [torch.zeros_like(self.share) if graphed else rate for _ in range(2)]
        self.optimisers = [
            torch.optim.AdamW(
                groups, lr=rates[0], betas=(0.9, 0.98), fused=outer[0].is_cuda, capturable=graphed
            ),
            BatchedMuon(inner, lr=rates[1], weight_decay=WEIGHT_DECAY),
        ]

    def set_pace(self, progress: float, step: int) -> None:
        """Set what the next step's rates and the heads' weight are."""
        share = cosine(progress, self.final)
        self.share.fill_(share)
        for optimiser in self.optimisers:
            rate = self.rate * (MUON_RATE if isinstance(optimiser, BatchedMuon) else 1.0)
            rate *= share * min(1.0, (step + 1) / 200)
            for group in optimiser.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def take_step(self, drawn: Drawn) -> Tensor:
        """Losses `[3]`: of the velocity (unweighted mean square), of reading tokens, and of reading words."""
        latents = drawn.latents
        noise = torch.randn_like(latents)
        sigma = draw_sigma(len(latents), latents.device, self.shift)
        blend = sigma.view(-1, *[1] * (latents.ndim - 1))
        noisy = blend * noise + (1 - blend) * latents
        with torch.autocast(latents.device.type, torch.bfloat16):
            velocity = self.student(noisy, sigma, drawn)
            tokens = self.heads.modules["reader"](self.student.hidden, drawn.labels)
            words = self.heads.modules["words"](self.student.words, drawn.words)
            aim = self.student.aim(noise - latents, noisy, sigma, drawn)
        error = (velocity.float() - aim.float()).square()
        # Which latents show an object is known only once the noise is low: weighting them earlier would bias the mean.
        weight = 1 + OBJECT_WEIGHT * (1 - blend) * drawn.objects
        loss = (error * weight).sum() / (weight.sum() * error.shape[1])
        loss = loss + self.heads.weight * self.share * (tokens + words)
        loss.backward()
        self._average_and_clip()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return torch.stack([error.detach().mean(), tokens.detach(), words.detach()])

    @torch.no_grad()
    def _average_and_clip(self) -> None:
        for p in self.parameters:  # a parameter that this batch did not reach still takes part
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = self.ranks.average(torch.cat([p.grad.flatten() for p in self.parameters]))
        norm = flat.norm()  # equal on every rank; a step that is not finite becomes one without gradient
        scale = torch.where(norm.isfinite(), (1 / (norm + 1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        flat = flat.nan_to_num(0.0, 0.0, 0.0) * scale
        parts = flat.split([p.numel() for p in self.parameters])
        torch._foreach_copy_(
            [p.grad for p in self.parameters],
            [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)],
        )


def draw_sigma(count: int, device: torch.device, shift: float) -> Tensor:
    """Half of the draws follow the sampler's shifted schedule, a quarter dwell on the middle, where looks are learned,
    and a quarter on the noisiest tenth, where it is settled which object goes where: below it the noisy clip itself
    tells (tiny-wan's reading head is right on 99 % of the tokens at 0.9, on 70 to 85 % at 1).
    """
    uniform = torch.rand(count, device=device)
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    middle = torch.sigmoid(torch.randn(count, device=device))
    kind = torch.rand(count, device=device)
    return torch.where(kind < 0.5, shifted, torch.where(kind < 0.75, middle, 0.9 + 0.1 * uniform))


def cosine(progress: float, final: float) -> float:
    """Falls from 1 at the start to `final` at the end."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
