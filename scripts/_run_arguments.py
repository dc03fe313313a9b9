"""What is asked of every script that runs a model over held-out prompts and judges the clips."""

from __future__ import annotations

import argparse
import os

from dit_accel.preset import GenerateOptions

GRIDS = {"default": None, "large": (256, 65)}  # side in pixels, frames; none: the preset's


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder of a model, or a shipped model's name")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise (1)")
    parser.add_argument("--grid", choices=GRIDS, default="default")
    parser.add_argument("--size", type=int, help="side in pixels instead of the grid's")
    parser.add_argument("--frames", type=int, help="frames instead of the grid's")
    parser.add_argument("--steps", type=int, help="denoising steps instead of the preset's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--judges", type=int, default=min(8, (os.cpu_count() or 1) - 1), help="processes that judge"
    )
    parser.add_argument(
        "--merge", nargs="+", metavar="RECORD", help="merge the records of all shards and print"
    )


def choose_size(options: argparse.Namespace, generate: GenerateOptions) -> tuple[int, int]:
    """Side in pixels and frames: as asked for, or else those of the grid."""
    side, frames = GRIDS[options.grid] or (generate.width, generate.frames)
    return options.size or side, options.frames or frames
