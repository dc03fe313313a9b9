"""What families of joint attention (MMDiT) have in common: dual blocks, then single ones, and tokens as `[B, N, C]`.

Editing families put the tokens of reference images behind those of the image that is made. Where all are of one size
they are frames of one grid, of which the first is what is made; else all their tokens are one line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dit_accel.layout import Grid, TokenLayout


def joint_attentions(transformer: nn.Module) -> list[tuple[str, int]]:
    """Module path and layer of the attention of every block, dual blocks first."""
    blocks = ("transformer_blocks", "single_transformer_blocks")
    paths = [f"{name}.{i}.attn" for name in blocks for i in range(len(getattr(transformer, name, ())))]
    return [(path, layer) for layer, path in enumerate(paths)]


def order_tokens(output: Tensor, layout: TokenLayout) -> Tensor:
    """Bring `[B, N, C]` into the layout's order."""
    return layout.apply(output, 1)


def restore_tokens(output: Tensor, layout: TokenLayout) -> Tensor:
    """Bring `[B, N, C]` back into the model's order."""
    assert output.shape[1] == layout.n_video_tokens
    return layout.undo(output, 1)


def read_images(ids: Tensor) -> tuple[Grid, str | None]:
    """The grid of image tokens from their places, and why they are no one grid. Waits for the device once.

    Args:
        ids: `[N, 3 or more]`: a number that changes from image to image, then row and column.
    """
    ids = ids[:, :3].float().cpu()
    counts = torch.unique_consecutive(ids[:, 0], return_counts=True)[1].tolist()
    images: list[Grid] = []
    for part in ids.split(counts):
        row, column = part[:, 1], part[:, 2]
        rows, columns = int(row.amax()) + 1, int(column.amax()) + 1
        if rows * columns != len(part) or not torch.equal(row * columns + column, torch.arange(float(len(part)))):
            return (1, 1, len(ids)), "places that are not row by row"
        images.append((1, rows, columns))
    return grid_of_images(images)


def grid_of_images(images: Sequence[Grid]) -> tuple[Grid, str | None]:
    """All images as frames of one grid, where they are of one size; else a line of all their tokens, and why.

    images: frames, rows and columns of each.
    """
    frames, rows, columns = images[0]
    if len(set(images)) == 1:
        return (frames * len(images), rows, columns), None
    sizes = ", ".join(f"{rows}x{columns}" for _, rows, columns in images)
    reason = f"reference images of another size than the image ({sizes} tokens)"
    return (1, 1, sum(map(math.prod, images))), reason
