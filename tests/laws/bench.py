"""One family's pipeline, ready to be sampled again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from families import Family, Request

from dit_accel.adapters import find_adapter


@dataclass
class Bench:
    """One family's pipeline, ready to be sampled again and again."""

    family: Family
    pipe: Any
    kept: dict[Request, dict[str, Any]] = field(default_factory=dict)  # embeddings

    def sample(
        self,
        *,
        batch: int = 1,
        guidance: bool = True,
        other: bool = False,
        steps: int = 3,
        seed: int = 0,
        embedded: bool = False,
        **call: Any,
    ) -> torch.Tensor:
        """Latents `[batch, ...]` of a short run.

        embedded: the prompts are the very same tensors at every call; else new ones.
        """
        request = Request(batch, guidance, other)
        if self.family.prepare is not None:
            self.family.prepare(self.pipe, request)
        arguments = self.family.call(request)
        if embedded or "prompt" not in arguments:
            if not embedded or request not in self.kept:
                self.kept[request] = self.family.embed(self.pipe, request)
            arguments |= self.kept[request]
        arguments |= {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **call,
        }
        made = getattr(self.pipe(**arguments), self.family.output)
        return made if isinstance(made, torch.Tensor) else made[-1]  # of a video in sections: all of it

    def transformers(self) -> list[torch.nn.Module]:
        found = (getattr(self.pipe, name, None) for name in ("transformer", "transformer_2"))
        return [transformer for transformer in found if transformer is not None]

    def attentions(self) -> list[torch.nn.Module]:
        """Self-attentions of the first transformer, in order of use."""
        first = self.transformers()[0]
        return [first.get_submodule(path) for path, _ in find_adapter(first).self_attentions(first)]
