"""The options that `generate` and `inspect` share, each said once. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Prompt = Annotated[str | None, typer.Option(help="What the video or image shall show.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What it shall not show.")]
Image = Annotated[
    Path | None,
    typer.Option(
        help="The picture at which the video begins, for a model that begins at one.", show_default=False
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Shipped name, folder or hub id; overrides the preset's model.")
]
Size = Annotated[
    str | None,
    typer.Option(help="Width and height in pixels; with --image its shape, if left out.", metavar="WxH"),
]
Frames = Annotated[int | None, typer.Option(help="Number of frames.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; 1 turns it off and halves the time, where it is not built in."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the noise; drawn and printed if left out.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16; auto: float32 on a CPU, else bfloat16.")
]
Offload = Annotated[str, typer.Option(help="none, model or group: what waits in main memory.")]
Lora = Annotated[
    list[str] | None, typer.Option(help="LoRA .safetensors as FILE or FILE=STRENGTH. Repeatable.")
]
Sla = Annotated[
    Path | None,
    typer.Option(
        help="Trained weights of SLA (scripts/finetune_sla.py) to run method sla with: a file, a folder "
        "with one for each transformer, or the name of weights that ship.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any option of the preset, as sparse.keep=0.3. Repeatable.", metavar="KEY=VALUE"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="The whole report, libraries' messages, tracebacks.")
]
