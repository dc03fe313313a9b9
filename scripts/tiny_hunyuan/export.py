"""Turn trained shards into the folder that ships."""

from __future__ import annotations

from pathlib import Path

from diffusers import HunyuanVideoPipeline
from tiny_models.folder import write_folder

from .dit import make_student
from .models import load_vae
from .text import CaptionTokenizer, make_tokenizers


def build_pipeline(run: Path, vae_from: Path) -> HunyuanVideoPipeline:
    """A stock pipeline (fp32) of the shards in `run` (dit-*, text-*, clip-*) and the VAE of `vae_from`."""
    tokenizers = make_tokenizers()
    student = make_student(CaptionTokenizer(tokenizers[0]))
    student.load(run)
    return student.make_pipeline(load_vae(vae_from), *tokenizers)


def export_hunyuan(run: Path, vae_from: Path, to: Path) -> None:
    write_folder(build_pipeline(run, vae_from), to)
