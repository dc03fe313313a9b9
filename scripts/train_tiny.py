"""Train the small models that ship with the package: tiny-wan, and the image models tiny-flux and tiny-sd3.

Stages, each of which writes safetensors shards that the next one reads. tiny-wan:

    python scripts/train_tiny.py vae --out run --minutes 5
    python scripts/train_tiny.py text --out run --minutes 5
    torchrun --nproc-per-node 4 scripts/train_tiny.py dit --out run --minutes 20
    python scripts/train_tiny.py export --run run --to presets/models/tiny-wan

The image models share one autoencoder and one text stage, which starts from tiny-wan's (FAMILY is flux or sd3):

    python scripts/train_tiny.py image-text --out run/text --minutes 4
    python scripts/train_tiny.py image-vae --out run/vae --minutes 5
    torchrun --nproc-per-node 4 scripts/train_tiny.py image-dit FAMILY --out run/FAMILY --vae-from run/vae \
        --text-from run/text --minutes 8
    python scripts/train_tiny.py image-export FAMILY --run run/FAMILY --vae-from run/vae --to presets/models/tiny-FAMILY

To go on from a model that ships, give its folder to --resume and --vae-from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import _source_tree  # noqa: F401  (this tree's dit_accel, installed or not)
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)
Out = Annotated[Path, typer.Option(help="Folder for shards and records.")]
Family = Annotated[Literal["flux", "sd3"], typer.Argument(help="Whose transformer it is.")]


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


@app.command()
def image_vae(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for, rendering included.")] = 5.0,
    resume: Annotated[Path | None, typer.Option(help="Folder to start from: shards or a pipeline.")] = None,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = 48,
    images: Annotated[int, typer.Option(help="Images to render, at each of two sizes.")] = 2048,
    size: Annotated[
        int, typer.Option(help="Pixels of the larger size, a multiple of 8; the other is half.")
    ] = 256,
    seed: int = 0,
    device: str = "cuda",
) -> None:
    """Train the image autoencoder, on one GPU."""
    from tiny_image.vae import VaeOptions, train_vae

    if size % 8:
        raise typer.BadParameter(f"--size {size} is not a multiple of 8")
    train_vae(VaeOptions(out, resume, minutes, rate, batch, images, size, seed, device))


@app.command()
def image_text(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for.")] = 4.0,
    text_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder to start from: text shards or a tiny-wan; default: the tiny-wan that ships."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Captions a step.")] = 128,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train the image models' text encoder on captions alone; minutes on a CPU."""
    from tiny_image.text import train_text
    from tiny_models.reading import TextPace

    from dit_accel.presets import model_path

    pace = TextPace(minutes, batch, rate, seed, device)
    train_text(out, text_from or model_path("tiny-wan"), pace)


@app.command()
def image_dit(
    family: Family,
    out: Out,
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for, rendering included.")] = 8.0,
    vae_from: Annotated[
        Path | None, typer.Option(help="Folder with the image VAE: shards or a pipeline; default: --out.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder to start from: shards or a pipeline.")] = None,
    text_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the text encoder, without --resume; default: the tiny-wan that ships."
        ),
    ] = None,
    mix: Annotated[
        list[str],
        typer.Option(help="Kinds of images: SIZE:BATCH:SHARE:IMAGES, batch and images for each GPU."),
    ] = ["256:24:0.5:6144", "128:96:0.5:6144"],  # noqa: B006  (typer copies it)
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    final: Annotated[float, typer.Option(help="Learning rate at the end, as a share of the peak.")] = 0.01,
    compiled: Annotated[bool, typer.Option(help="Compile the transformer blocks.")] = True,
    seed: int = 0,
    device: str = "cuda",
) -> None:
    """Train an image transformer and its text encoders; run under torchrun for several GPUs."""
    from tiny_image.dit import ImageOptions, train_image
    from tiny_image.images import Mix
    from tiny_models.training import Pace

    from dit_accel.presets import model_path

    try:
        kinds = tuple(Mix.parse(kind) for kind in mix)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    if resume and text_from:
        raise typer.BadParameter("--resume brings its own text encoder: leave --text-from out")
    pace = Pace(minutes, rate, final, compiled, seed)
    text_from = text_from or model_path("tiny-wan")
    train_image(ImageOptions(family, out, vae_from or out, text_from, resume, kinds, pace, device))


@app.command()
def image_export(
    family: Family,
    run: Annotated[Path, typer.Option(help="Folder with dit-*, text-* and clip-* shards.")],
    to: Annotated[Path, typer.Option(help="Folder to write in diffusers' format.")],
    vae_from: Annotated[
        Path | None, typer.Option(help="Folder with the image VAE: shards or a pipeline; default: --run.")
    ] = None,
) -> None:
    """Write the trained parts as a bf16 folder that a stock FluxPipeline or StableDiffusion3Pipeline loads."""
    from tiny_image.export import export_image

    export_image(family, run, vae_from or run, to)


if __name__ == "__main__":
    app()
