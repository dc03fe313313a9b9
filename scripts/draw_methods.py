"""Draw what each sparse method reads, for its page in docs/methods: real plans of tiny-wan, all in one layout.

    python scripts/draw_methods.py --output docs/pictures/methods            # all of them, some minutes on a CPU
    python scripts/draw_methods.py --output docs/pictures/methods radial svg2

One prompt and seed, the same layer, step and heads for all. Above: which key blocks (across) each query block (down)
reads, as the kernel sees them, in the method's own token order. Below: what one token in the middle of the video reads,
frame by frame, which means the same whatever the order.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import dit_accel
from dit_accel.methods import method_names
from dit_accel.options import SparseOptions
from dit_accel.pipelines.staging import Stage
from dit_accel.preset import load_preset
from dit_accel.quality.recall import block_of_token, keep_by_head, rows_of_mask

PROMPT = "a red star moving left over a checkered background"
STEPS, STEP, LAYER = 4, 3, 4
HEADS = 3
# A quarter of the key blocks where that can be asked for; else what reads a moderate share of so small a video.
SETTINGS: dict[str, dict[str, Any]] = {
    "clear": {"radius": 5},
    "lite": {"threshold": -2.0},
    "nabla": {"tile": [1, 4, 8]},
    "neighborhood": {"tile": [2, 4, 4]},
    "radial": {},
}
QUARTER = {"keep": 0.25}
BLOCK = 32  # the video is small, and blocks of 128 would be half a frame each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="a folder: NAME.png for each method")
    parser.add_argument("methods", nargs="*", default=method_names(), metavar="METHOD")
    options = parser.parse_args()
    unknown = set(options.methods) - set(method_names())
    if unknown:
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(method_names())}")
    from dit_accel.pipelines import wan

    preset = load_preset("tiny-wan")
    pipe = wan.load("tiny-wan", device="cpu", flow_shift=preset.generate.flow_shift)
    for name in options.methods:
        given = SETTINGS.get(name, QUARTER)
        sparse = {"method": name, "min_tokens": 0, "block": BLOCK, **given}
        seen = see(pipe, preset.generate, SparseOptions.from_mapping(sparse))
        with Stage() as stage:
            draw(name, given, *seen).save(
                stage.add(options.output / f"{name}.png"), format="PNG", optimize=True
            )
        print(options.output / f"{name}.png")
    return 0


def see(pipe: Any, generate: Any, sparse: SparseOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run as far as the step to be drawn.

    Returns:
        Masks bool `[HEADS, Nq, Nk]`; the tokens that the middle token reads in the first head, bool
        `[frames, rows, columns]`; and the share of the keys that each of the heads reads.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def watch(call: Any, layout: Any, query: Any, key: Any, value: Any, plan: Any) -> None:
        if (call.step, call.layer, call.branch) != (STEP, LAYER, "cond"):
            return
        heads = query.shape[2]
        mask = plan.to_mask()[0].expand(heads, -1, -1)
        keep = keep_by_head(plan)[0].expand(heads)
        found.append((mask[:HEADS].numpy(), tokens_read(plan, layout), keep[:HEADS].numpy()))

    with dit_accel.accelerate(pipe, sparse) as handle:
        handle.observe(watch)
        pipe(
            prompt=PROMPT,
            guidance_scale=1.0,  # one branch shows as much, in half the time
            height=generate.height,
            width=generate.width,
            num_frames=generate.frames,
            num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(1),
            output_type="latent",
        )
    if not found:
        raise RuntimeError(f"{sparse.method} ran dense: {handle.report()}")
    return found[0]


def tokens_read(plan: Any, layout: Any) -> np.ndarray:
    """Which tokens the one in the middle of the grid reads in the first head, bool `[frames, rows, columns]`."""
    middle = torch.tensor([n // 2 for n in layout.grid])
    places = layout.coordinates().long()
    token = (places == middle).all(1).nonzero()[0]
    blocks = rows_of_mask(plan, token)[0, 0, 0]
    read = torch.zeros(layout.grid, dtype=torch.bool)
    read[tuple(places.unbind(1))] = blocks[block_of_token(plan, "k")[0, 0]]
    return read.numpy()


def draw(
    name: str, given: dict[str, Any], masks: np.ndarray, read: np.ndarray, keep: np.ndarray
) -> Image.Image:
    """One picture of a method; every method's has the same places and sizes."""
    frames = len(read)
    columns = -(-frames // 2)
    figure = Figure(figsize=(7.2, 5.0), dpi=125)
    said = ", ".join(f"{key} = {value}" for key, value in given.items()) or "defaults"
    figure.text(0.02, 0.975, f"{name}: {said}", fontsize=11, weight="bold", va="top")
    for head, (mask, share) in enumerate(zip(masks, keep, strict=True)):
        axes = figure.add_axes((0.02 + head * 0.33, 0.425, 0.30, 0.432))
        axes.imshow(~mask, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_title(f"head {head}: reads {share:.0%} of the keys", fontsize=8, pad=3)
        axes.set_xticks([]), axes.set_yticks([])
    n_q, n_k = masks.shape[1:]
    note = f"{n_q} query blocks down, {n_k} key blocks across; black is read"
    figure.text(0.02, 0.405, note, fontsize=7.5, va="top", color="0.35")
    grid = " x ".join(map(str, read.shape))
    note = f"below, frame by frame: what the token at the cross reads in head 0 ({grid} tokens)"
    figure.text(0.02, 0.37, note, fontsize=7.5, va="top", color="0.35")
    for frame in range(frames):
        line, column = divmod(frame, columns)
        axes = figure.add_axes((0.02 + column * 0.96 / columns, 0.19 - line * 0.17, 0.9 / columns, 0.144))
        axes.imshow(~read[frame], cmap="gray", vmin=-0.6, vmax=1, interpolation="nearest")
        axes.set_xticks([]), axes.set_yticks([])
        if frame == frames // 2:
            axes.plot(read.shape[2] // 2, read.shape[1] // 2, "+", color="red", markersize=6)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    # a palette of the rarest colours too, or the cross would turn grey
    return Image.open(written).convert("RGB").quantize(64, method=Image.Quantize.MAXCOVERAGE)


if __name__ == "__main__":
    sys.exit(main())
