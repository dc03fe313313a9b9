"""LPIPS, where the package `lpips` and the weights it builds on are installed. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Lpips = Callable[[np.ndarray, np.ndarray], float]

_WEIGHTS = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet, under its name in torch's hub cache


def open_lpips() -> Lpips | str:
    """A function that measures two clips, uint8 `[F, H, W, 3]`, or why there is none.

    It gives the mean over frames of the learned perceptual distance, 0 (equal) upwards.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
    """
    missing = [name for name in ("lpips", "torchvision") if find_spec(name) is None]
    if missing:
        return f"not run: {' and '.join(missing)} not installed"
    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
    if not weights.is_file():
        return f"not run: {_WEIGHTS} is not in torch's hub cache, and nothing is downloaded for it"
    import lpips

    model = lpips.LPIPS(net="alex", verbose=False).eval()

    def measure(clip: np.ndarray, reference: np.ndarray) -> float:
        with torch.no_grad():
            # One frame at a time: the features of a whole clip would not fit.
            pairs = zip(clip, reference, strict=True)
            values = [float(model(*(_signed(frame) for frame in pair))) for pair in pairs]
        return float(np.mean(values))

    def _signed(frame: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1

    return measure
