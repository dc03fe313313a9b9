"""Distances agree with definitions worked out by hand and with their documented ranges."""

import math

import numpy as np
import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.quality.compare import compare_clips, draw_comparison, spread_frames
from dit_accel.quality.metrics import (
    flicker,
    flicker_error,
    frame_psnr,
    frame_ssim,
    psnr,
    ssim,
    wilson_interval,
)


@pytest.fixture
def clip():
    return np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)


def test_psnr_of_a_known_error(clip):
    base = np.full_like(clip, 100)
    off = base.copy()
    off[1] += 10
    assert frame_psnr(off, base)[1] == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(off, base) == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(4))
    assert psnr(base, base) == math.inf
    mask = np.zeros(clip.shape[:3])
    mask[1, :5] = 1
    assert psnr(off, base, mask) == pytest.approx(20 * math.log10(255 / 10))


def test_float_and_uint8_agree(clip):
    other = np.roll(clip, 1, 2)
    a, b = torch.from_numpy(clip).double() / 255, torch.from_numpy(other).double() / 255
    assert psnr(clip, other) == pytest.approx(psnr(a, b))
    assert ssim(clip, other) == pytest.approx(ssim(a, b))


def ssim_by_hand(x, y):
    """Straight from the paper, one window after another."""
    weight = np.exp(-0.5 * (np.add.outer(np.arange(-5, 6) ** 2, np.arange(-5, 6) ** 2)) / 1.5**2)
    weight /= weight.sum()
    values = []
    for channel in range(3):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                a, b = x[i : i + 11, j : j + 11, channel] / 255, y[i : i + 11, j : j + 11, channel] / 255
                ma, mb = (weight * a).sum(), (weight * b).sum()
                va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
                cov = (weight * (a - ma) * (b - mb)).sum()
                top = (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2)
                values.append(top / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2)))
    return np.mean(values)


def test_ssim_follows_the_paper(clip):
    other = (clip * 0.7 + 30).astype(np.uint8)
    noisy = np.roll(clip, 1, 1)
    for changed in (other, noisy):
        assert frame_ssim(changed, clip)[2] == pytest.approx(ssim_by_hand(changed[2], clip[2]), rel=1e-9)
    assert ssim(clip, clip) == pytest.approx(1)


def test_ssim_agrees_with_scikit_image(clip):
    metrics = pytest.importorskip("skimage.metrics")
    other = (clip * 0.8 + 9).astype(np.uint8)
    full = metrics.structural_similarity(
        clip[0] / 255.0,
        other[0] / 255.0,
        channel_axis=2,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert frame_ssim(other, clip)[0] == pytest.approx(full, rel=1e-7)


def test_flicker_sees_what_single_frames_hide():
    still = np.full((6, 16, 16, 3), 0.5)
    moving = still + 0.1 * np.arange(6)[:, None, None, None] / 6
    shaking = moving.copy()
    shaking[::2] += 0.05
    assert flicker(moving, moving) == pytest.approx(1)
    assert flicker(shaking, moving) > 2
    assert flicker(still, moving) == 0
    assert math.isnan(flicker(still, still))
    assert flicker_error(moving + 0.03, moving) == pytest.approx(0)
    assert flicker_error(shaking, moving) == pytest.approx(0.05)


def test_wilson_interval():
    # Worked example of Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0
    for wrong in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(UsageError):
            wilson_interval(*wrong)


def test_clips_that_cannot_be_compared(clip):
    with pytest.raises(UsageError, match="one shape"):
        psnr(clip, clip[:, :-1])
    with pytest.raises(UsageError, match="both uint8"):
        psnr(clip, clip / 255)
    with pytest.raises(UsageError, match="11x11"):
        ssim(clip[:, :8], clip[:, :8])


def test_comparison_names_the_worst_frame_and_shows_it(clip):
    fast = clip.copy()
    fast[2, :10] = 0
    found = compare_clips(clip, fast)
    assert found.worst_frame == 2
    assert found.worst_psnr < found.psnr
    assert found.to_dict()["psnr"] == found.psnr
    assert compare_clips(clip, clip).to_dict()["psnr"] is None
    sheet = draw_comparison(clip, fast, columns=2)
    assert sheet.width == 2 * (24 * 5 + 2)
    assert spread_frames(33, 5) == [0, 8, 16, 24, 32]
    assert spread_frames(3, 5) == [0, 1, 2]
