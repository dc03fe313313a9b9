"""What families of joint attention (MMDiT) have in common: dual blocks, then single ones, and tokens as `[B, N, C]`.

Editing families put the tokens of reference images behind those of the image that is made. Where all are of one size
they are frames of one grid; the first frame is what is made.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def grid_of_images(images: Sequence[Grid]) -> Grid:
    """All images as frames where they are of one size, else the first alone. images: frames, rows, columns of each."""
    frames, rows, columns = images[0]
    return (frames * len(images) if len(set(images)) == 1 else frames, rows, columns)


def why_images_are_dense(images: Sequence[Grid]) -> str | None:
    """Why images fill no common grid, or None if they do."""
    if len(set(images)) == 1:
        return None
    sizes = ", ".join(f"{rows}x{columns}" for _, rows, columns in images)
    return f"reference images of another size than the image ({sizes} tokens)"
