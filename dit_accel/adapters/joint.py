"""What families of joint attention (MMDiT) have in common: dual blocks, then single ones, and tokens as `[B, N, C]`."""

from __future__ import annotations

from torch import Tensor, nn

from dit_accel.layout import TokenLayout


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
