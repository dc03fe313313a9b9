"""Train tiny-wan, the small Wan model that ships with the package.

Stages, each of which writes safetensors shards that the next one reads:

    python scripts/train_tiny.py vae --out run --minutes 5
    torchrun --nproc-per-node 4 scripts/train_tiny.py dit --out run --minutes 9
    torchrun --nproc-per-node 4 scripts/train_tiny.py dit --out run --minutes 6 --resume run --large-share 0.2
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
def dit(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for, rendering included.")] = 9.0,
    vae_from: Annotated[
        Path | None, typer.Option(help="Folder with the VAE: shards or a pipeline; default: --out.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder to start from: shards or a pipeline.")] = None,
    batch: Annotated[int, typer.Option(help="Default-size clips a step on each GPU.")] = 32,
    short_share: Annotated[float, typer.Option(help="Share of the steps on clips of 17 frames.")] = 0.0,
    short_batch: Annotated[int, typer.Option(help="Short clips a step on each GPU.")] = 64,
    large_share: Annotated[float, typer.Option(help="Share of the steps on 352x352 clips.")] = 0.0,
    large_batch: Annotated[int, typer.Option(help="Large clips a step on each GPU.")] = 3,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    final: Annotated[float, typer.Option(help="Learning rate at the end, as a share of the peak.")] = 0.01,
    clips: Annotated[int, typer.Option(help="Clips rendered and encoded on each GPU.")] = 6144,
    compiled: Annotated[bool, typer.Option(help="Compile the transformer blocks.")] = True,
    seed: int = 0,
    device: str = "cuda",
) -> None:
    """Train the transformer and the text encoder; run under torchrun for several GPUs."""
    from tiny_wan.dit import DitOptions, train_dit

    train_dit(
        DitOptions(
            out,
            minutes,
            vae_from or out,
            resume,
            batch,
            short_share,
            short_batch,
            large_share,
            large_batch,
            rate,
            final,
            clips,
            compiled,
            seed,
            device,
        )
    )


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
