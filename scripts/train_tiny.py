"""Train the small models that ship with the package: tiny-wan, the image models tiny-flux and tiny-sd3, tiny-hunyuan.

Stages, each of which writes safetensors shards that the next one reads. tiny-wan:

    python scripts/train_tiny.py vae --out run --minutes 5
    python scripts/train_tiny.py text --out run --minutes 5
    torchrun --nproc-per-node 4 scripts/train_tiny.py dit --out run --minutes 20
    python scripts/train_tiny.py export --run run --to presets/models/tiny-wan

The image models share one autoencoder and one text stage, which starts from tiny-wan's (FAMILY is flux or sd3):

    python scripts/train_tiny.py image-text --out run/text --minutes 4
    python scripts/train_tiny.py image-vae --out run/vae --minutes 5
    torchrun --nproc-per-node 4 scripts/train_tiny.py image-dit FAMILY --out run/FAMILY --vae-from run/vae \\
        --text-from run/text --minutes 8
    python scripts/train_tiny.py image-export FAMILY --run run/FAMILY --vae-from run/vae --to presets/models/tiny-FAMILY

tiny-hunyuan, whose guidance is built in by a second run that the first one teaches:

    python scripts/train_tiny.py video-text --out run/text --minutes 4
    python scripts/train_tiny.py video-vae --out run/vae --minutes 9
    torchrun --nproc-per-node 4 scripts/train_tiny.py hunyuan-dit --out run/plain --vae-from run/vae \\
        --text-from run/text --minutes 9
    torchrun --nproc-per-node 4 scripts/train_tiny.py hunyuan-dit --out run/guided --vae-from run/vae \\
        --resume run/plain --guide-from run/plain --minutes 9
    python scripts/train_tiny.py hunyuan-export --run run/guided --vae-from run/vae --to presets/models/tiny-hunyuan

To go on from a model that ships, give its folder to --resume and --vae-from.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import _source_tree  # noqa: F401  (this tree's dit_accel, installed or not)

FAMILIES = ("flux", "sd3")
Run = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_wan(commands)
    _add_image(commands)
    _add_hunyuan(commands)
    options = parser.parse_args(arguments)
    options.run(options)


def _add_wan(commands: Any) -> None:
    command = _command(commands, "vae", _train_wan_vae, "Train tiny-wan's autoencoder.")
    _add_pace(command, minutes=5.0, rate=6e-4)
    command.add_argument("--base-dim", type=int, default=24, help="channels at full resolution (24)")

    command = _command(commands, "text", _train_wan_text, "Train tiny-wan's text encoder on captions alone.")
    _add_pace(command, minutes=5.0, rate=2e-3, device="cpu")
    command.add_argument("--resume", type=Path, help="folder to start from: shards or a pipeline")
    command.add_argument("--batch", type=int, default=128, help="captions a step (128)")

    command = _command(commands, "dit", _train_wan_dit, "Train tiny-wan's transformer and text encoder.")
    _add_dit(command, minutes=9.0, mix_of=_clip_mix, mix=["128x33:24:0.6:4096", "128x17:48:0.4:4096"])
    command.add_argument(
        "--text-from", type=Path, help="folder with the text encoder (--resume, or else --out)"
    )

    _add_export(
        commands, "export", _export_wan, "Write tiny-wan as a bf16 folder that a stock WanPipeline loads."
    )


def _add_image(commands: Any) -> None:
    command = _command(commands, "image-vae", _train_image_vae, "Train the image autoencoder, on one GPU.")
    _add_pace(command, minutes=5.0, rate=1e-3)
    command.add_argument("--resume", type=Path, help="folder to start from: shards or a pipeline")
    command.add_argument("--batch", type=int, default=48, help="crops a step (48)")
    command.add_argument(
        "--images", type=int, default=2048, help="images to render, at each of two sizes (2048)"
    )
    command.add_argument(
        "--size", type=_multiple_of(8), default=256, help="pixels of the larger size; the other is half (256)"
    )

    command = _command(commands, "image-text", _train_image_text, "Train the image models' text encoder.")
    _add_pace(command, minutes=4.0, rate=2e-3, device="cpu")
    command.add_argument("--text-from", type=Path, help="text shards or a tiny-wan (the tiny-wan that ships)")
    command.add_argument("--batch", type=int, default=128, help="captions a step (128)")

    command = _command(
        commands, "image-dit", _train_image_dit, "Train an image transformer and its text encoders."
    )
    command.add_argument("family", choices=FAMILIES, help="whose transformer it is")
    _add_dit(command, minutes=8.0, mix_of=_image_mix, mix=["256:24:0.5:6144", "128:96:0.5:6144"])
    command.add_argument(
        "--text-from",
        type=Path,
        help="folder with the text encoder: shards or a pipeline, without --resume (the tiny-wan that ships)",
    )
    _add_graphed(command)

    help = (
        "Write an image model as a bf16 folder that a stock FluxPipeline or StableDiffusion3Pipeline loads."
    )
    command = _add_export(commands, "image-export", _export_image, help)
    command.add_argument("family", choices=FAMILIES, help="whose transformer it is")


def _add_hunyuan(commands: Any) -> None:
    command = _command(
        commands, "video-vae", _train_video_vae, "Train tiny-hunyuan's autoencoder, on one GPU."
    )
    _add_pace(command, minutes=9.0, rate=1e-3)
    command.add_argument("--resume", type=Path, help="folder to start from: shards or a pipeline")
    command.add_argument("--batch", type=int, default=12, help="tiles of 17 frames a step (12)")
    command.add_argument(
        "--clips", type=int, default=480, help="clips to render, and a twelfth twice as large (480)"
    )
    command.add_argument(
        "--size", type=_multiple_of(16), default=128, help="pixels of the smaller size (128)"
    )
    command.add_argument(
        "--frames", type=_frames_from(41), default=61, help="frames of a clip, at least 41 (61)"
    )

    command = _command(commands, "video-text", _train_video_text, "Train tiny-hunyuan's text encoder.")
    _add_pace(command, minutes=4.0, rate=2e-3, device="cpu")
    command.add_argument("--text-from", type=Path, help="folder with text shards to go on from")
    command.add_argument("--batch", type=int, default=128, help="captions a step (128)")

    command = _command(
        commands, "hunyuan-dit", _train_hunyuan, "Train tiny-hunyuan's transformer and text encoders."
    )
    _add_dit(command, minutes=9.0, mix_of=_clip_mix, mix=["128x61:24:0.6:3072", "128x29:48:0.4:3072"])
    command.add_argument("--text-from", type=Path, help="folder with text shards, without --resume (--out)")
    command.add_argument(
        "--guide-from",
        type=Path,
        help="folder, shards or a pipeline, of a trained model whose guidance is built in",
    )
    _add_graphed(command)

    help = "Write tiny-hunyuan as a bf16 folder that a stock HunyuanVideoPipeline loads."
    _add_export(commands, "hunyuan-export", _export_hunyuan, help)


def _command(commands: Any, name: str, run: Run, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run, refuse=command.error)
    return command


def _add_pace(command: argparse.ArgumentParser, *, minutes: float, rate: float, device: str = "cuda") -> None:
    command.add_argument("--out", type=Path, required=True, help="folder for shards and records")
    command.add_argument(
        "--minutes", type=float, default=minutes, help=f"wall-clock time, rendering included ({minutes:g})"
    )
    command.add_argument("--rate", type=float, default=rate, help=f"peak learning rate ({rate:g})")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default=device)


def _add_dit(
    command: argparse.ArgumentParser, *, minutes: float, mix_of: Callable[[str], Any], mix: list[str]
) -> None:
    """Options of a transformer stage; it runs under torchrun for several GPUs."""
    _add_pace(command, minutes=minutes, rate=1e-3)
    command.add_argument("--vae-from", type=Path, help="folder with the VAE: shards or a pipeline (--out)")
    command.add_argument("--resume", type=Path, help="folder to start from: shards or a pipeline")
    command.add_argument(
        "--mix",
        type=mix_of,
        action="append",
        help="a kind of scene, SIZExFRAMES:BATCH:SHARE:CLIPS or, of images, SIZE:BATCH:SHARE:IMAGES; batch and number "
        f"for each GPU; give it once for each kind ({' '.join(mix)})",
    )
    command.add_argument(
        "--final", type=float, default=0.01, help="last learning rate as a share of the peak (0.01)"
    )
    command.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the transformer's blocks",
    )
    command.set_defaults(usual_mix=mix, mix_of=mix_of, graphed=False)


def _add_graphed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--graphed", action="store_true", help="replay steps as CUDA graphs: small models wait for the host"
    )


def _add_export(commands: Any, name: str, run: Run, help: str) -> argparse.ArgumentParser:
    command = _command(commands, name, run, help)
    command.add_argument(
        "--run", dest="folder", type=Path, required=True, help="folder with the run's shards"
    )
    command.add_argument("--to", type=Path, required=True, help="folder to write in diffusers' format")
    command.add_argument("--vae-from", type=Path, help="folder with the VAE: shards or a pipeline (--run)")
    return command


def _clip_mix(text: str) -> Any:
    return _parse_mix("tiny_models.clips", text)


def _image_mix(text: str) -> Any:
    return _parse_mix("tiny_image.images", text)


def _parse_mix(module: str, text: str) -> Any:
    try:
        return import_module(module).Mix.parse(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


def _multiple_of(step: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) % step or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {step}")
        return int(text)

    return parse


def _frames_from(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) % 4 != 1 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} frames: give 1 + 4k of them, {least} or more")
        return int(text)

    return parse


def _mix(options: argparse.Namespace) -> tuple[Any, ...]:
    return tuple(options.mix or map(options.mix_of, options.usual_mix))


def _pace(options: argparse.Namespace) -> Any:
    from tiny_models.training import Pace

    if options.graphed and not options.device.startswith("cuda"):
        options.refuse(f"--graphed is for GPUs, not for --device {options.device}")
    return Pace(
        options.minutes, options.rate, options.final, options.compiled, options.seed, options.graphed
    )


def _text_pace(options: argparse.Namespace) -> Any:
    from tiny_models.reading import TextPace

    return TextPace(options.minutes, options.batch, options.rate, options.seed, options.device)


def _train_wan_vae(options: argparse.Namespace) -> None:
    from tiny_wan.vae import train_vae

    train_vae(options.out, options.base_dim, options.minutes, options.rate, options.seed, options.device)


def _train_wan_text(options: argparse.Namespace) -> None:
    from tiny_wan.text import train_text

    train_text(options.out, options.resume, _text_pace(options))


def _train_wan_dit(options: argparse.Namespace) -> None:
    from tiny_wan.dit import DitOptions, train_dit

    out, resume = options.out, options.resume
    text_from = options.text_from or resume or out
    train_dit(
        DitOptions(
            out, options.vae_from or out, text_from, resume, _mix(options), _pace(options), options.device
        )
    )


def _export_wan(options: argparse.Namespace) -> None:
    from tiny_wan.export import export_pipeline

    export_pipeline(options.folder, options.vae_from or options.folder, options.to)


def _train_image_vae(options: argparse.Namespace) -> None:
    from tiny_image.vae import VaeOptions, train_vae
    from tiny_models.autoencoder import CodePace

    pace = CodePace(options.minutes, options.rate, options.seed, options.device)
    train_vae(VaeOptions(options.out, options.resume, pace, options.batch, options.images, options.size))


def _train_image_text(options: argparse.Namespace) -> None:
    from tiny_image.text import train_text

    from dit_accel.presets import model_path

    train_text(options.out, options.text_from or model_path("tiny-wan"), _text_pace(options))


def _train_image_dit(options: argparse.Namespace) -> None:
    from tiny_image.dit import train_image

    from dit_accel.presets import model_path

    stage = _stage(options, options.text_from or model_path("tiny-wan"))
    train_image(options.family, options.vae_from or options.out, stage)


def _export_image(options: argparse.Namespace) -> None:
    from tiny_image.export import export_image

    export_image(options.family, options.folder, options.vae_from or options.folder, options.to)


def _train_video_vae(options: argparse.Namespace) -> None:
    from tiny_hunyuan.vae import VaeOptions, train_vae
    from tiny_models.autoencoder import CodePace

    pace = CodePace(options.minutes, options.rate, options.seed, options.device)
    sizes = (options.batch, options.clips, options.size, options.frames)
    train_vae(VaeOptions(options.out, options.resume, pace, *sizes))


def _train_video_text(options: argparse.Namespace) -> None:
    from tiny_hunyuan.text import train_text

    train_text(options.out, options.text_from, _text_pace(options))


def _train_hunyuan(options: argparse.Namespace) -> None:
    from tiny_hunyuan.dit import train_hunyuan

    stage = _stage(options, options.text_from or options.out)
    train_hunyuan(options.vae_from or options.out, options.guide_from, stage)


def _export_hunyuan(options: argparse.Namespace) -> None:
    from tiny_hunyuan.export import export_hunyuan

    export_hunyuan(options.folder, options.vae_from or options.folder, options.to)


def _stage(options: argparse.Namespace, text_from: Path) -> Any:
    from tiny_models.stage import StageOptions

    if options.resume and options.text_from:
        options.refuse("--resume brings its own text encoder: leave --text-from out")
    return StageOptions(options.out, text_from, options.resume, _mix(options), _pace(options), options.device)


if __name__ == "__main__":
    main()
