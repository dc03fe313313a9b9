"""Turn trained shards into the folder that ships: bf16, diffusers' layout, no file over 15 MB."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import WanPipeline

from .models import load_shards, load_vae, make_pipeline, make_text_encoder, make_tokenizer, make_transformer


def build_pipeline(run: Path, vae_from: Path) -> WanPipeline:
    """A `WanPipeline` (fp32) of the shards in `run` (dit-*, text-*) and the VAE of `vae_from`."""
    vae = load_vae(vae_from)
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(len(tokenizer))
    text_encoder.load_state_dict(load_shards(run, "text"))
    transformer = make_transformer()
    transformer.load_state_dict(load_shards(run, "dit"))
    return make_pipeline(tokenizer, text_encoder, transformer, vae)


def export_pipeline(run: Path, vae_from: Path, to: Path) -> None:
    """Write the pipeline next to `to` and swap it in, so that an interrupted export leaves the old one."""
    draft = to.with_name(to.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    build_pipeline(run, vae_from).to(torch.bfloat16).save_pretrained(
        draft, max_shard_size="12MB", safe_serialization=True
    )
    shutil.rmtree(to, ignore_errors=True)
    draft.replace(to)
    files = [f for f in to.rglob("*") if f.is_file()]
    print(
        f"{to}: {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB in {len(files)} files, "
        f"largest {max(f.stat().st_size for f in files) / 2**20:.1f} MiB"
    )
