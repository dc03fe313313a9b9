"""Turn trained shards into the folder that ships: bf16, diffusers' layout, no file over 15 MB."""

from __future__ import annotations

from pathlib import Path

from diffusers import WanPipeline
from tiny_models.folder import write_folder
from tiny_models.shards import load_shards
from tiny_models.text import make_text_encoder

from .models import load_vae, make_pipeline, make_tokenizer, make_transformer


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
    write_folder(build_pipeline(run, vae_from), to)
