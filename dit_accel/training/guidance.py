"""Classifier-free guidance as the sampler uses it: `v_u + g (v_c - v_u)`, of both branches at one x_t.

An error that both branches share passes through it once; independent ones come out with a square g^2 + (g-1)^2 times
theirs, 41 times at g = 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.training.samples import Condition, LatentFolder

# The unconditional branch is told the same for every caption, but for rounding (samples made on other machines).
_SAME = 0.1


@dataclass(frozen=True)
class Guidance:
    """How the two branches of a sample make the velocity that the sampler goes by."""

    scale: float  # g
    conditional: int  # which of a sample's two conditions is the conditional branch's: 0 or 1

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise UsageError(f"guidance = {self.scale}: a positive number is needed")

    @property
    def parts(self) -> tuple[float, float]:
        """What the velocities of the conditional and the unconditional branch are multiplied by."""
        return self.scale, 1 - self.scale

    @property
    def growth(self) -> float:
        """How many times the branches' mean square error the guided one has where their errors are independent."""
        return self.scale**2 + (1 - self.scale) ** 2

    def pair(self, conditions: tuple[Condition, ...]) -> tuple[Condition, Condition]:
        """A sample's conditions, the conditional branch's first."""
        if len(conditions) != 2:
            raise UsageError(
                f"a sample has {len(conditions)} branches where the folder's first has two: it was made with another "
                "guidance scale; make the latents again, in another folder"
            )
        first, second = conditions
        return (first, second) if self.conditional == 0 else (second, first)

    def combine(self, rows: Tensor) -> Tensor:
        """The guided velocity of each pair of rows.

        Args:
            rows: `[2 B, ...]`, of each sample the conditional row and the unconditional one behind it.

        Returns:
            `[B, ...]`, of the same type.
        """
        conditional, unconditional = rows.unflatten(0, (-1, 2)).unbind(1)
        ours, theirs = self.parts
        return ours * conditional + theirs * unconditional


def why_no_guidance(folder: LatentFolder, role: str = "transformer", scale: float | None = None) -> str | None:
    """Why there is no guidance to be had from a folder's samples; None where there is. As of `read_guidance`."""
    branches = count_branches(folder)
    if branches != 2:
        return (
            f"the samples of {folder.folder} have {branches} branch{'es' * (branches > 1)}, and guidance is of two: "
            f"{folder.index.transformer} has it built in, or ran with a scale of 1 or less"
        )
    if scale is None and folder.index.guidance_of(role) is None:
        return (
            f"{folder.folder} is older than the entry that says with which guidance scale its samples were made: give "
            "the pipeline's with --guidance G, or make the latents again"
        )
    if _find_conditional(folder) is None:
        return (
            f"the samples of {folder.folder} do not tell which branch of guidance is the conditional one: two of "
            "different captions are needed, and one negative prompt for all"
        )
    return None


def read_guidance(folder: LatentFolder, role: str = "transformer", scale: float | None = None) -> Guidance:
    """The guidance of a folder's samples.

    Which branch is the conditional one is read from the samples: what it is told changes with the caption, and the
    other one's negative prompt does not. Pipelines differ in what they run first.

    Args:
        folder: of the latents.
        role: which of the pipeline's transformers.
        scale: instead of the one that the latents were made with.

    Raises:
        UsageError: models of one branch, a folder that does not tell its scale, or samples that do not tell the
            branches apart.
    """
    why = why_no_guidance(folder, role, scale)
    if why is not None:
        raise UsageError(f"The guided velocity is not known: {why}. Or do without it: --guided 0, and no --guidance.")
    held, conditional = folder.index.guidance_of(role) if scale is None else scale, _find_conditional(folder)
    assert held is not None and conditional is not None
    return Guidance(held, conditional)


def count_branches(folder: LatentFolder) -> int:
    """Branches of guidance of a folder's samples."""
    return len(folder.read(0).conditions)


def _find_conditional(folder: LatentFolder) -> int | None:
    first = folder.read(0)
    others = (folder.read(place) for place in range(1, len(folder)))
    other = next((sample for sample in others if sample.caption != first.caption), None)
    if other is None:
        return None
    changes = [_change(a, b) for a, b in zip(first.conditions, other.conditions, strict=True)]
    largest = max(changes)
    return changes.index(largest) if min(changes) < _SAME * largest else None


def _change(a: Condition, b: Condition) -> float:
    """How far two samples' conditions of one branch are apart: the largest relative distance of a tensor."""
    changes = [0.0]
    for name, value in a.items():
        other = b.get(name)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            continue
        if value.shape != other.shape:
            return float("inf")
        distance, size = (value.double() - other.double()).norm(), value.double().norm()
        changes.append(float(distance / size.clamp_min(1e-12)))
    return max(changes)
