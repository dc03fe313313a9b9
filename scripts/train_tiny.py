"""Train tiny-wan, the small Wan model that ships with the package.

Stages, each of which writes safetensors shards that the next one reads:

    python scripts/train_tiny.py vae --out run --minutes 5
    python scripts/train_tiny.py text --out run --minutes 5
    torchrun --nproc-per-node 4 scripts/train_tiny.py dit --out run --minutes 20
    python scripts/train_tiny.py export --run run --to presets/models/tiny-wan

To go on from the model that ships, give its folder to --resume and --vae-from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import _source_tree  # noqa: F401  (this tree's dit_accel, installed or not)
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)
Out = Annotated[Path, typer.Option(help="Folder for shards and records.")]


@app.command()
def vae(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for.")] = 5.0,
    base_dim: Annotated[int, typer.Option(help="Channels at full resolution.")] = 24,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 6e-4,
    seed: int = 0,
    device: str = "cuda",
) -> None:
    """Train the video autoencoder."""
    from tiny_wan.vae import train_vae

    train_vae(out, base_dim, minutes, rate, seed, device)


@app.command()
def text(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for.")] = 5.0,
    resume: Annotated[Path | None, typer.Option(help="Folder to start from: shards or a pipeline.")] = None,
    batch: Annotated[int, typer.Option(help="Captions a step.")] = 128,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train the text encoder on captions alone; minutes on a CPU."""
    from tiny_wan.text import train_text

    train_text(out, resume, minutes, batch, rate, seed, device)


@app.command()
def dit(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for, rendering included.")] = 9.0,
    vae_from: Annotated[
        Path | None, typer.Option(help="Folder with the VAE: shards or a pipeline; default: --out.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder to start from: shards or a pipeline.")] = None,
    text_from: Annotated[
        Path | None, typer.Option(help="Folder with the text encoder; default: --resume, or else --out.")
    ] = None,
    mix: Annotated[
        list[str],
        typer.Option(help="Kinds of clips: SIZExFRAMES:BATCH:SHARE:CLIPS, batch and clips for each GPU."),
    ] = ["128x33:24:0.6:4096", "128x17:48:0.4:4096"],  # noqa: B006  (typer copies it)
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    final: Annotated[float, typer.Option(help="Learning rate at the end, as a share of the peak.")] = 0.01,
    compiled: Annotated[bool, typer.Option(help="Compile the transformer blocks.")] = True,
    seed: int = 0,
    device: str = "cuda",
) -> None:
    """Train the transformer and the text encoder; run under torchrun for several GPUs."""
    from tiny_wan.clips import Mix
    from tiny_wan.dit import DitOptions, train_dit

    try:
        kinds = tuple(Mix.parse(kind) for kind in mix)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    text_from = text_from or resume or out
    options = (out, minutes, vae_from or out, text_from, resume, kinds, rate, final, compiled, seed, device)
    train_dit(DitOptions(*options))


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="Folder with dit-* and text-* shards.")],
    to: Annotated[Path, typer.Option(help="Folder to write in diffusers' format.")],
    vae_from: Annotated[
        Path | None, typer.Option(help="Folder with the VAE: shards or a pipeline; default: --run.")
    ] = None,
) -> None:
    """Write the trained parts as a bf16 pipeline folder that a stock WanPipeline loads."""
    from tiny_wan.export import export_pipeline

    export_pipeline(run, vae_from or run, to)


if __name__ == "__main__":
    app()
