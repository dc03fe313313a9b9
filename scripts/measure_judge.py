"""Measure the judge: confusion matrices on rendered clips, clean and degraded, and how often it rejects a wrong prompt.

python scripts/measure_judge.py --clips 512
python scripts/measure_judge.py --clips 512 --vae presets/models/tiny-wan/vae --json judge.json
python scripts/measure_judge.py --clips 64 --size 352 --only clean,blurred --failures judge-failures
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import _source_tree  # noqa: F401  (must come before dit_accel)
import torch

from dit_accel.quality.degrade import DEGRADATIONS, round_trip
from dit_accel.quality.judge import expected_from_scene, judge_clip, matches
from dit_accel.quality.readings import ATTRIBUTES, Expectation, Reading
from dit_accel.quality.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    render_scenes,
    sample_scene,
    write_caption,
)

VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    kinds = dict(DEGRADATIONS)
    if options.vae:
        from diffusers import AutoencoderKLWan

        vae = (
            AutoencoderKLWan.from_pretrained(options.vae, torch_dtype=torch.float32).to(options.device).eval()
        )
        kinds["vae"] = lambda clip, seed: round_trip(vae, clip)
    wanted = options.only.split(",") if options.only else list(kinds)
    record = {"clips": options.clips, "frames": options.frames, "size": options.size, "seed": options.seed}
    for name in wanted:
        if name not in kinds:
            raise SystemExit(f"--only {name!r} is not one of {', '.join(kinds)}")
        record[name] = measure(name, kinds[name], options)
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--vae", help="folder of an AutoencoderKLWan; adds a round trip through it")
    parser.add_argument("--device", default="cpu", help="where the VAE runs")
    parser.add_argument("--only", help="comma-separated kinds of degradation instead of all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--failures", help="save a strip of frames of every misread clip into this folder")
    return parser.parse_args()


def measure(name: str, degrade, options: argparse.Namespace) -> dict:
    rng = random.Random(options.seed)
    right, rejected, tried = Counter(), Counter(), Counter()
    confusion = {attribute: Counter() for attribute in ATTRIBUTES}
    seconds = 0.0
    for index in range(options.clips):
        scene = sample_scene(rng, held_out=index % 2 == 1)
        expected = expected_from_scene(scene)
        clip = render_scenes([scene], options.frames, options.size, options.size)[0]
        clip = degrade((clip / 2 + 0.5).clamp(0, 1), options.seed + index)
        frames = (clip.permute(1, 2, 3, 0) * 255).round().clamp(0, 255).to(torch.uint8)
        start = time.perf_counter()
        reading = judge_clip(frames)
        seconds += time.perf_counter() - start
        match = matches(reading, expected)
        for attribute in (*ATTRIBUTES, "panning", "count"):
            right[attribute] += getattr(match, attribute)
        count_confusions(confusion, reading, expected)
        for attribute in ATTRIBUTES:
            tried[attribute] += 1
            rejected[attribute] += not getattr(
                matches(reading, change_one(expected, attribute, rng)), attribute
            )
        if not (match.everything and match.panning):
            show_failure(name, index, write_caption(scene), reading, frames, options.failures)
    report(name, options.clips, right, rejected, tried, confusion, seconds)
    return {
        "right": dict(right),
        "rejected": dict(rejected),
        "confusion": {
            a: {f"{e} read as {s}": n for (e, s), n in sorted(c.items())} for a, c in confusion.items()
        },
        "seconds_per_clip": seconds / options.clips,
    }


def count_confusions(confusion: dict[str, Counter], reading: Reading, expected: Expectation) -> None:
    """Pair objects by order along the frame's colours, so that a misread colour is seen as such."""
    confusion["background"][expected.background, reading.background] += 1
    seen = list(reading.objects)
    missing = []
    for want in expected.objects:
        partner = next((thing for thing in seen if thing.colour == want.colour), None)
        if partner is None:
            missing.append(want)
            continue
        seen.remove(partner)
        for attribute in ("colour", "shape", "motion"):
            confusion[attribute][getattr(want, attribute), getattr(partner, attribute)] += 1
    for want in missing:
        partner = seen.pop() if seen else None
        for attribute in ("colour", "shape", "motion"):
            confusion[attribute][getattr(want, attribute), getattr(partner, attribute, "nothing")] += 1
    for thing in seen:
        confusion["colour"]["nothing", thing.colour] += 1


def change_one(expected: Expectation, attribute: str, rng: random.Random) -> Expectation:
    """The same expectation with one attribute of one object (or the background) set to another value."""
    if attribute == "background":
        return replace(expected, background=rng.choice([b for b in BACKGROUNDS if b != expected.background]))
    index = rng.randrange(len(expected.objects))
    objects = list(expected.objects)
    used = (
        {getattr(o, attribute) for o in objects}
        if attribute == "colour"
        else {getattr(objects[index], attribute)}
    )
    value = rng.choice([v for v in VALUES[attribute] if v not in used])
    objects[index] = replace(objects[index], **{attribute: value})
    return replace(expected, objects=tuple(objects))


def report(name, clips, right, rejected, tried, confusion, seconds) -> None:
    print(f"\n== {name}: {clips} clips, {seconds / clips:.2f} s each")
    for attribute, count in right.items():
        line = f"{attribute:10} right {count / clips:7.2%} ({count})"
        if attribute in tried:
            line += f"   changed prompt rejected {rejected[attribute] / tried[attribute]:7.2%}"
        print(line)
    for attribute, cells in confusion.items():
        print_matrix(attribute, cells)


def print_matrix(attribute: str, cells: Counter) -> None:
    rows = [*VALUES[attribute], *sorted({e for e, _ in cells} - set(VALUES[attribute]))]
    columns = [*VALUES[attribute], *sorted({s for _, s in cells} - set(VALUES[attribute]))]
    print(f"{attribute + ' (row: true, column: read)':28}" + "".join(f"{c:>10}" for c in columns))
    for row in rows:
        print(f"{row:>28}" + "".join(f"{cells[row, c] or '.':>10}" for c in columns))


def show_failure(name, index, caption, reading, frames, folder) -> None:
    read = [
        (o.colour, o.shape, o.motion, round(o.fit, 2), o.turns, round(o.growth, 2)) for o in reading.objects
    ]
    print(f"  {name} {index}: {caption} -> {read} {reading.background} {reading.pan}", flush=True)
    if folder:
        from PIL import Image

        strip = torch.cat(list(frames[:: max(len(frames) // 8, 1)]), dim=1).numpy()
        Path(folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(strip).save(Path(folder) / f"{name}-{index}.png")


if __name__ == "__main__":
    main()
