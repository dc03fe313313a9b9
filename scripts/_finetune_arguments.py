"""The command line of finetune_sla.py."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from dit_accel.cli.request import parse_size
from dit_accel.errors import UsageError
from dit_accel.training.distill import DECAYS, GUIDED, PRECISIONS, DistillOptions
from dit_accel.training.draws import NOISES
from dit_accel.training.student import TRAINS


@dataclass(frozen=True)
class Best:
    """So many layers, the best of a file of scores."""

    count: int


def read_options(about: str, words: list[str] | None = None) -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=plain)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{latents,score,train,evaluate}")
    add_latents(verbs.add_parser("latents", help="make training data", description=about, formatter_class=plain))
    add_score(
        verbs.add_parser(
            "score", help="find layers that can be linear", description=about, formatter_class=plain
        )
    )
    add_train(verbs.add_parser("train", help="fine-tune", description=about, formatter_class=plain))
    add_evaluate(
        verbs.add_parser("evaluate", help="compare velocities with dense", description=about, formatter_class=plain)
    )
    return parser.parse_args(words)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny-wan", help="names the model, sizes and schedule (tiny-wan)")
    parser.add_argument("--model", help="shipped name, folder or hub id instead of the preset's")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (auto)")


def add_expert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expert", choices=("transformer", "transformer_2"), default="transformer",
                        help="of a model with two, as Wan 2.2 14B (transformer)")  # fmt: skip


def add_latents(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (auto)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt a line; the model denoises them")
    source.add_argument("--builtin-prompts", action="store_true", help="32 prompts of ours; the model denoises them")
    source.add_argument("--videos", type=Path, metavar="DIR", help="videos, each with its caption in a .txt beside it")
    source.add_argument(
        "--scenes", choices=("rendered", "denoised"), help="scenes that the small shipped models know: rendered, or "
        "their captions denoised",
    )  # fmt: skip
    parser.add_argument("--first", type=int, default=0, help="number of the first scene; from 1000000 on unseen ones")
    parser.add_argument("--count", type=int, required=True, help="samples; those that are there count")
    parser.add_argument("--size", type=size, metavar="WxH", help="pixels instead of the preset's")
    parser.add_argument("--frames", type=int, help="instead of the preset's")
    parser.add_argument("--steps", type=int, help="of the schedule, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of noise and scenes (0)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the samples")


def size(text: str) -> tuple[int, int]:
    """Width and height; argparse tells of an ArgumentTypeError in its own words alone."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_guidance(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (that of the latents' making)")
    parser.add_argument("--below", type=float, default=1.0, metavar="SIGMA", help="noise levels up to this one alone: "
                        "the dense_above of the preset to be used (1)")  # fmt: skip


def add_train(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_expert(parser)
    default = DistillOptions(steps=1)
    parser.add_argument("--latents", type=Path, required=True, help="folder that `latents` made")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoint and record")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--from", dest="start", type=Path, metavar="PATH", help="start from these trained weights")
    sla = parser.add_argument_group("SLA")
    sla.add_argument("--keep", type=float, help="share of key blocks read exactly (0.1)")
    sla.add_argument("--variant", help="linear part over the keys not read, complement, or over all (complement)")
    sla.add_argument("--feature", help="softmax, elu or relu (softmax)")
    sla.add_argument("--negligible", type=float, help="share of key blocks in neither part (0)")
    sla.add_argument("--mix", action="store_true", help="a learned ratio of the parts for each head, as SLA2")
    sla.add_argument("--order", help="order of the tokens (the method's)")
    sla.add_argument("--block", type=int, help="tokens in one block (the method's)")
    sla.add_argument("--dense-layers", type=_numbers, default=(), metavar="N,N", help="layers that stay dense")
    sla.add_argument(
        "--linear-layers", type=_layers_or_best, default=(), metavar="N,N|best:N", help="layers that become linear "
        "attention alone; or the N best of --scores",
    )  # fmt: skip
    sla.add_argument("--scores", type=Path, metavar="FILE.json", help="what `score` wrote: which layers are best, and "
                     "projections to start linear layers from")  # fmt: skip
    train = parser.add_argument_group("training")
    train.add_argument(
        "--trains", choices=TRAINS, default="lora", help="full: all weights; lora: a LoRA of the self-attentions; both "
        "with the projections, which projection trains alone (lora)",
    )  # fmt: skip
    train.add_argument("--rank", type=int, default=32, help="of the LoRA (32)")
    train.add_argument("--steps", type=int, help="end after so many steps")
    train.add_argument("--minutes", type=float, help="end after so many minutes")
    for name, help in (
        ("rate", "learning rate of the model's weights or LoRA"),
        ("projection-rate", "learning rate of the projections"),
        ("mix-rate", "learning rate of the mixes"),
        ("weight-decay", "of AdamW"),
        ("warmup", "steps over which the rates rise"),
        ("clip", "largest norm of a step's gradient"),
        ("batch", "samples in a forward, on each GPU; with --guided two rows each"),
        ("accumulate", "forwards in a step"),
        ("blend-steps", "steps over which linear layers lead over from dense attention"),
        ("ema", "decay of the averaged weights, which are those given out"),
        ("seed", "of everything that is drawn"),
        ("held-out", "last samples of the folder, for the velocity error"),
        ("save-minutes", "between checkpoints"),
    ):
        value = getattr(default, name.replace("-", "_"))
        train.add_argument(f"--{name}", type=type(value), default=value, help=f"{help} ({value:g})")
    train.add_argument("--decay", choices=DECAYS, default=default.decay, help="of the rates over the run's steps or "
                       "minutes: half a cosine to 0, or none (cosine)")  # fmt: skip
    train.add_argument(
        "--guided", type=float, metavar="W", help="weight of the guided velocity's error beside the branches' own: a "
        f"sample is two rows of a forward then; 0: one drawn branch, one row ({GUIDED:g} where the pipeline runs two)",
    )  # fmt: skip
    add_guidance(train)
    train.add_argument("--noise", choices=NOISES, default=default.noise, help="noise levels: those the pipeline "
                       "samples at, or log-normal as published (schedule)")  # fmt: skip
    train.add_argument("--precision", choices=PRECISIONS, help="autocast (bf16 on a GPU, else no)")
    train.add_argument("--checkpointing", action="store_true", help="less memory, about a third more time")


def add_score(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_expert(parser)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (auto)")
    parser.add_argument("--latents", type=Path, required=True, help="folder that `latents` made")
    parser.add_argument("--feature", default="softmax", help="softmax, elu or relu (softmax)")
    parser.add_argument("--count", type=int, default=2, help="last samples of the folder, to score on (2)")
    parser.add_argument("--fit", type=int, default=4, help="samples before those, to fit projections on; 0: none (4)")
    parser.add_argument("--levels", type=int, default=3, help="noise levels of the schedule (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="record; the projections go to "
                        "FILE.safetensors")  # fmt: skip


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_expert(parser)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (auto)")
    parser.add_argument("--latents", type=Path, required=True, help="folder that `latents` made; best of unseen scenes")
    parser.add_argument("--sla", type=Path, nargs="*", default=[], metavar="PATH", help="trained weights, one or more")
    parser.add_argument("--keep", type=float, default=0.1, help="share of key blocks where no --sla says it (0.1)")
    parser.add_argument("--count", type=int, default=4, help="last samples of the folder (4)")
    parser.add_argument("--levels", type=int, default=5, help="noise levels of the schedule (5)")
    add_guidance(parser)
    parser.add_argument("--shared-plans", action="store_true", help="every way once more with the conditional branch's "
                        "plan for both (share_plans)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the record there")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _layers_or_best(text: str) -> tuple[int, ...] | Best:
    try:
        return Best(int(text.removeprefix("best:"))) if text.startswith("best:") else _numbers(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of layers, 0,3,5, or best:N") from None
