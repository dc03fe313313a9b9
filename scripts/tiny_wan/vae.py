"""The VAE stage: single frames first, then clips through the temporal resampling.

Wan's VAE is causal: each 3x3x3 convolution sees two past frames. Trained on short clips, these past taps drift on
longer and larger ones (and collapse small models to the mean). Here they are zero throughout: every frame is coded
by itself, and time enters only where the model halves and doubles the frame rate (`time_conv`). The receptive field
in time is three frames, so what holds at the trained length holds at every length. Training uses equal 2D
convolutions, a third of the work, and `export_vae` writes them into the last tap of the stock 3D ones.

The single-head attention of the mid blocks is switched off (zero projection): it would tie quality to the frame size.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, WanResample
from tiny_models.autoencoder import KL_WEIGHT, measure_reconstruction
from tiny_models.clip_pool import ClipPool, draw_unseen_clip
from tiny_models.shards import save_shards
from torch import Tensor, nn

from .models import make_vae


class FrameConv(nn.Conv2d):
    """A causal 3x3x3 convolution whose past taps are zero, applied as a 2D convolution to every frame."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        batch, _, frames, height, width = x.shape
        flat = x.transpose(1, 2).reshape(batch * frames, -1, height, width)
        return super().forward(flat).view(batch, frames, -1, height, width).transpose(1, 2)


def make_trainable_vae(base_dim: int) -> AutoencoderKLWan:
    """The stock VAE with per-frame convolutions, attention off and frame-rate changes that start as averages."""
    vae = make_vae(base_dim)
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, WanCausalConv3d) and child.kernel_size == (3, 3, 3):
                setattr(module, name, FrameConv(child.in_channels, child.out_channels, 3, padding=1))
        if isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
            module.requires_grad_(False)
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            _start_as_average(module)
    return vae


def _start_as_average(resample: WanResample) -> None:
    conv, dim = resample.time_conv, resample.dim
    eye = torch.eye(dim)
    with torch.no_grad():
        conv.bias.zero_()
        conv.weight.normal_(std=0.3 / math.sqrt(dim))
        if resample.mode == "downsample3d":
            conv.weight[:, :, 0].zero_()
            conv.weight[:, :, 1, 0, 0] += 0.5 * eye
            conv.weight[:, :, 2, 0, 0] += 0.5 * eye
        else:
            conv.weight[:, :, :2].mul_(0.1)
            conv.weight[:, :, 2, 0, 0] += torch.cat([eye, eye])


def encode_clip(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """Moments `[B, 2 z, 1 + (F - 1) / 2, H / 4, W / 4]` of a clip in one pass; equals the chunked `vae.encode`."""
    encoder = vae.encoder
    x = encoder.conv_in(clip)
    for layer in encoder.down_blocks:
        x = layer(x)
        if isinstance(layer, WanResample) and layer.mode == "downsample3d" and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    x = _mid_without_attention(encoder.mid_block, x)
    return vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x))))


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The whole clip in one pass; equals the frame-by-frame `vae.decode` without its clamp."""
    decoder = vae.decoder
    x = _mid_without_attention(decoder.mid_block, decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is None:
            continue
        resample = block.upsamplers[0]
        if resample.mode == "upsample3d" and x.shape[2] > 1:
            pairs = resample.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T, h, w]
            x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
        x = resample(x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def _mid_without_attention(mid: nn.Module, x: Tensor) -> Tensor:
    for resnet in mid.resnets:
        x = resnet(x)
    return x


def export_vae(
    trained: AutoencoderKLWan, base_dim: int, mean: list[float], std: list[float]
) -> AutoencoderKLWan:
    """The stock causal VAE that computes what `trained` computes."""
    stock = make_vae(base_dim, mean, std)
    state = stock.state_dict()
    for name, value in trained.state_dict().items():
        if state[name].ndim == 5 and value.ndim == 4:
            state[name].zero_()
            state[name][:, :, -1] = value
        else:
            state[name].copy_(value)
    stock.load_state_dict(state)
    return stock.eval()


def train_vae(
    out: Path, base_dim: int, minutes: float, rate: float, seed: int, device: str, clips_rendered: int = 640
) -> dict:
    """Train for `minutes`, write `vae-*.safetensors` and `vae.json` (the record) to `out`."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    rng = random.Random(seed)
    started = time.time()
    vae = make_trainable_vae(base_dim).to(device).to(memory_format=torch.preserve_format)
    average = copy.deepcopy(vae)
    optimiser = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.99)
    )
    small = ClipPool(rng, clips_rendered, 33, 128, device)
    large = ClipPool(rng, max(2, clips_rendered // 26), 33, 352, device)
    history, step, image_share = [], 0, 0.28
    while True:
        progress = (time.time() - started) / (60 * minutes)
        if progress >= 1:
            break
        clips = progress >= image_share
        if not clips:
            batch, weight = small.draw_frames(96) if step % 8 else large.draw_frames(12)
        else:
            batch, weight = small.draw_clips(12, 17) if step % 8 else large.draw_clips(2, 17)
        _set_rate(optimiser, rate * _warm_cosine(progress, step))
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            mean, spread = encode_clip(vae, batch).float().chunk(2, 1)
            spread = spread.clamp(-20, 4)
            sampled = mean + torch.exp(0.5 * spread) * torch.randn_like(mean)
            output = decode_clip(vae, sampled)
        error = (output.float() - batch).square()
        recon = (error * weight).mean() / weight.mean() + 0.02 * (output.float() - batch).abs().mean()
        kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        loss = recon + KL_WEIGHT * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        if step % 250 == 0:
            psnr = 10 * math.log10(4 / error.mean().item())
            history.append(
                {"step": step, "seconds": round(time.time() - started, 1), "clips": clips, "psnr": psnr}
            )
            print(
                f"vae[{base_dim}, {rate:g}] step {step} {history[-1]['seconds']}s clips={clips} psnr {psnr:.2f} "
                f"kl {kl.item():.2f} norm {norm.item():.2f}",
                flush=True,
            )
    mean, std = measure_latents(average, small)
    record = {
        "base_dim": base_dim,
        "rate": rate,
        "seed": seed,
        "steps": step,
        "minutes": minutes,
        "history": history,
        "latents_mean": mean,
        "latents_std": std,
        "kl_weight": KL_WEIGHT,
    }
    record |= {
        "reconstruction_128": measure_whole(average, 48, 128, device),
        "reconstruction_352": measure_whole(average, 6, 352, device),
    }
    save_shards(export_vae(average.float().cpu(), base_dim, mean, std).state_dict(), out, "vae")
    (out / "vae.json").write_text(json.dumps(record, indent=1))
    print(
        f"vae[{base_dim}, {rate:g}] {record['reconstruction_128']} {record['reconstruction_352']}", flush=True
    )
    return record


def _warm_cosine(progress: float, step: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, pool: ClipPool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel, for the pipeline's normalisation."""
    moments = [encode_clip(vae, pool.draw_clips(8, 33)[0]).float().chunk(2, 1)[0] for _ in range(12)]
    latents = torch.cat(moments).transpose(0, 1).flatten(1)
    return latents.mean(1).tolist(), latents.std(1).tolist()


@torch.no_grad()
def measure_whole(vae: AutoencoderKLWan, count: int, size: int, device: str, frames: int = 33) -> dict:
    """`measure_reconstruction` of full-length clips."""
    return measure_reconstruction(
        lambda clip: decode_clip(vae, encode_clip(vae, clip).chunk(2, 1)[0]),
        lambda rng: draw_unseen_clip(rng, frames, size, device),
        count,
        "clips",
    )
