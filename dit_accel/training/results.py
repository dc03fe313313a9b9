"""What a fine-tuning gives out: one side file with the projections and all that changed in the transformer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dit_accel.sla.weights import SlaWeights, save_sla_weights
from dit_accel.training.student import Student


def result_of(student: Student, precision: str = "no") -> SlaWeights:
    """The student's weights as a side file holds them.

    Args:
        precision: "bf16" keeps a transformer that trained as a whole in bf16, as it ran; "no" in fp32.
    """
    weights = student.sla.weights()
    if student.trains == "full":
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        own = student.projections()
        changed = {name: p.detach().to(kind) for name, p in student.transformer.named_parameters() if id(p) not in own}
        return replace(weights, tensors=changed)
    if student.trains == "lora":
        return replace(weights, lora=_read_lora(student))
    return weights


def save_result(path: Path, student: Student, precision: str = "no") -> None:
    """Write the side file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sla_weights(path, result_of(student, precision))


def _read_lora(student: Student) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (up, down) by the name of the parameter that they change."""
    pairs = {}
    for path, module in student.transformer.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            (adapter,) = module.lora_A.keys()
            up, down = module.lora_B[adapter].weight, module.lora_A[adapter].weight
            pairs[f"{path}.weight"] = (up.detach(), down.detach())
    return pairs
