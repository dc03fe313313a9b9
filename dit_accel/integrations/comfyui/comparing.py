"""How far two runs are apart, as a text and a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.quality.metrics import flicker, frame_psnr, frame_ssim, psnr


def compare_images(images: Tensor, reference: Tensor, gain: float) -> tuple[str, Tensor]:
    """Distances of frames from their reference, and the worst frame side by side.

    Args:
        images: `[F, H, W, C]`, float 0 to 1; as is the reference.
        gain: by how much the difference in the picture is multiplied.

    Returns:
        A text, and `[1, H, 3 W, C]`: the reference, the frame, and their difference.

    Raises:
        UsageError: frames of other size or number.
    """
    if images.shape != reference.shape:
        raise UsageError(
            f"images of {_size(images)} and a reference of {_size(reference)} cannot be compared: make both with one "
            "size, length and seed."
        )
    images, reference = images.float(), reference.float()
    each = frame_psnr(images, reference)
    worst = min(range(len(each)), key=each.__getitem__)
    lines = [f"PSNR {psnr(images, reference):.2f} dB over {len(each)} frame{'s' * (len(each) > 1)}"]
    lines.append(f"worst frame: {worst}, {each[worst]:.2f} dB")
    if min(images.shape[1:3]) >= 11:
        likeness = frame_ssim(images, reference)
        lines.append(f"SSIM {sum(likeness) / len(likeness):.4f}, worst {min(likeness):.4f}")
    if len(each) > 1:
        lines.append(f"flicker {flicker(images, reference):.3f} times the reference's")
    if torch.equal(images, reference):
        lines.append("equal, bit for bit")
    frame, other = images[worst], reference[worst]
    return "\n".join(lines), torch.cat([other, frame, ((frame - other).abs() * gain).clamp(0, 1)], dim=1)[
        None
    ]


def _size(frames: Tensor) -> str:
    return f"{frames.shape[0]} frames of {frames.shape[2]}x{frames.shape[1]}"
