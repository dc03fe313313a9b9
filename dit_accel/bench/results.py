"""Results: everything `dit-accel bench` measured, as it stands in results.json. No torch.

Times are seconds of whole generations (text encoding, denoising, decoding), sizes bytes, PSNR dB against the dense clip
of the same prompt and seed. A PSNR of None is that of equal clips, which JSON could not hold. Where something else is
None, a field beside it, or `not_run`, says why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dit_accel.bench.plain import from_plain, to_plain
from dit_accel.errors import UsageError

VERSION = 1
RESULTS = "results.json"  # its name in the folder of a report
Kind = Literal["dense", "preset", "fewer steps", "dense again"]


@dataclass(frozen=True)
class Check:
    """One line of `dit-accel doctor`."""

    name: str
    status: Literal["ok", "absent", "broken"]
    detail: str


@dataclass(frozen=True)
class Environment:
    """What it ran on: what `dit-accel doctor --json` knows, and more of the chip."""

    chip: str  # "NVIDIA H200", or "CPU x86_64, 2 threads"
    platform: str
    versions: dict[str, str]  # of Python and packages
    driver: str | None  # of the GPU; None without one
    cuda: str | None
    power_limit_watts: float | None  # None: no GPU, or its driver does not tell
    commit: str | None  # of the checkout this runs from, `+` where files differ; None where it is none
    checks: tuple[Check, ...]
    # milliseconds of one self-attention of the model by each of torch's kernels that can run it, the quickest first
    dense_kernels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """What was asked for. Two runs may be joined, or compared, where this is equal."""

    presets: tuple[str, ...]  # the first is the one that is asked about, the others stand beside it
    settings: tuple[str, ...]  # texts of --set, for every preset
    options: dict[str, dict[str, Any]]  # every value of each preset
    model: str
    weights: Literal["trained", "random", "unknown"]  # quality of random weights is none
    makes: Literal["video", "image"]
    width: int
    height: int
    frames: int
    fps: float
    video_tokens: int  # that meet in one self-attention
    text_tokens: int  # among them too (joint attention); 0 where text has attention of its own
    steps: int
    guidance: float
    passes_per_step: int  # forwards of the transformer: 2 with a negative branch run apart
    scheduler: str  # class of diffusers
    dtype: str
    device: str
    offload: str
    compiled: bool
    prompts: tuple[str, ...]
    negative_prompt: str | None
    seeds: tuple[int, ...]
    rounds: int  # asked for; each variant runs at least so often, and every clip at least once
    fewer_steps: str  # "auto", "off" or numbers
    image: str | None = None  # the picture at which videos begin


@dataclass(frozen=True)
class Run:
    """One timed generation."""

    round: int  # counted from 0; in one round every variant makes the same clip
    clip: int  # place in `Results.clips`
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a median run goes, in seconds; the parts add up to it.

    The shares were measured in a run of its own with clocks around every part, which slow it; the timed runs have none.
    """

    text_encoder: float
    attention: float  # self-attention, its prediction included, without projections
    rest_of_transformer: float
    vae_decode: float
    other: float  # scheduler, moving, packing
    profiled_seconds: float  # what the run with the clocks took

    @property
    def total(self) -> float:
        return (
            self.text_encoder + self.attention + self.rest_of_transformer + self.vae_decode + self.other
        )

    @property
    def attention_share(self) -> float:
        """Of the whole generation, 0 to 1."""
        return self.attention / self.total if self.total else 0.0


@dataclass(frozen=True)
class Quality:
    """Distance of one clip from the dense clip of the same prompt and seed."""

    equal: bool  # pixel for pixel; every PSNR is None then
    psnr_db: float | None  # of the whole clip
    ssim: float | None  # in [-1, 1]; None for frames below 11x11 pixels
    worst_frame: int  # counted from 0
    worst_psnr_db: float | None
    frame_psnr_db: tuple[float | None, ...]  # of every frame; None: equal
    flicker: float | None  # temporal change over dense's, 1 is equal; None: an image, or dense stands still
    flicker_error: float  # RMS difference of temporal changes, 0 is equal
    lpips: float | None
    lpips_missing: str | None  # why there is none


@dataclass(frozen=True)
class MadeClip:
    """One clip of one variant, as it came out the first time."""

    clip: int  # place in `Results.clips`
    files: tuple[str, ...]  # relative to the folder of results.json; a video is H.264, near to lossless but not it
    worst_frame_files: tuple[str, ...]  # lossless PNG: the frame farthest from dense, and dense's own; () for dense
    problem: str | None  # "not finite": there are no files and no quality then
    quality: Quality | None  # None for dense itself


@dataclass(frozen=True)
class Memory:
    """The most of GPU memory in any timed run; None with the reason."""

    peak_allocated: int | None
    peak_reserved: int | None
    missing: str | None


@dataclass(frozen=True)
class Ran:
    """What really ran, of all timed runs of a variant (see `dit_accel.report`). Empty for dense."""

    sparse_calls: int
    linear_calls: int
    dense_calls: int
    dense_reasons: dict[str, int]  # planned and unplanned
    fallbacks: dict[str, int]  # the unplanned ones among them; 0 expected
    keep_requested: float | None
    keep_achieved: float | None
    keep_per_layer: dict[int, float]
    keep_per_step: dict[int, float]
    executors: dict[str, int]
    forwards: dict[str, int]  # under a step cache: computed, reused
    # what the caches decided in the last run, by transformer: a digit a step, 0 for a skipped one; branches that
    # decided differently as "cond=1101; uncond=1111"
    decisions: dict[str, str]
    regions: dict[str, int]
    guards: dict[str, int]


@dataclass(frozen=True)
class Variant:
    """One thing that ran, and what it cost."""

    name: str  # "dense", a preset's, "dense, 14 steps", "dense again"
    kind: Kind
    about: str  # which dense kernel, which repetition, which preset it is the rival of
    of: str | None  # of "fewer steps": the preset in whose time it shall end; else None
    steps: int
    warm_up_seconds: float  # of the first generation, shown and not counted
    runs: tuple[Run, ...]
    seconds: float | None  # median; None before the first run is done
    quartiles: tuple[float, float] | None
    breakdown: Breakdown | None
    memory: Memory
    ran: Ran | None  # None for dense: stock diffusers counts nothing, and nothing can fall back
    clips: tuple[MadeClip, ...]


@dataclass(frozen=True)
class EqualTime:
    """The honest rival: dense with so many steps that it takes as long as a preset, between two whole numbers."""

    preset: str
    steps: float  # where a straight line through both neighbours meets the preset's time
    below: str  # the variants of these neighbours; the same one where a whole number meets it
    above: str
    psnr_db: float | None  # mean over clips, between the neighbours' by the same line; None: equal to dense
    preset_psnr_db: float | None


@dataclass(frozen=True)
class Gain:
    """How many times as fast as dense one preset is."""

    preset: str
    whole: float  # dense's median over the preset's
    whole_low: float  # the least and the most of any round
    whole_high: float
    transformer: float | None  # from the breakdowns; None without
    attention: float | None
    amdahl_bound: float | None  # of the whole, if dense's attention took no time at all


@dataclass(frozen=True)
class NotRun:
    """What a report like this should hold and this one does not."""

    what: str
    why: str


@dataclass(frozen=True)
class Clip:
    """A prompt and a seed."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Results:
    """A report, whole or as far as it got."""

    command: str
    date: str  # ISO 8601, UTC, of the start
    complete: bool
    environment: Environment
    workload: Workload
    clips: tuple[Clip, ...]  # every prompt with every seed
    variants: tuple[Variant, ...]
    equal_time: tuple[EqualTime, ...] = ()
    gains: tuple[Gain, ...] = ()  # none where `problems` forbid them
    problems: tuple[str, ...] = ()  # failed checks of correctness
    verdict: str | None = None
    not_run: tuple[NotRun, ...] = ()

    def variant(self, name: str) -> Variant:
        """The variant of this name.

        Raises:
            KeyError: there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)

    def of_kind(self, kind: Kind) -> tuple[Variant, ...]:
        """The variants of one kind, in their order."""
        return tuple(variant for variant in self.variants if variant.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return {"tool": "dit_accel bench", "version": VERSION, **to_plain(self)}


def mean_psnr(variant: Variant) -> float | None:
    """Mean of the clips' PSNR in dB, over those that differ from dense; None where none does."""
    found = [made.quality.psnr_db for made in variant.clips if made.quality and made.quality.psnr_db is not None]
    return sum(found) / len(found) if found else None


def worst_clip(variant: Variant) -> MadeClip | None:
    """The clip whose worst frame is farthest from dense; None where all are equal or none was compared."""
    apart = [made for made in variant.clips if made.quality and made.quality.worst_psnr_db is not None]
    return min(apart, key=lambda made: made.quality.worst_psnr_db, default=None)


def load_results(path: Path) -> Results:
    """Read results.json, or the one in a folder.

    Raises:
        UsageError: no such file, not one of ours, of another version, or not whole.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read results {file}: {error.strerror or error}") from None
    except ValueError:
        raise UsageError(f"{file} is not JSON; give a folder or results.json of dit-accel bench") from None
    return results_of(told, str(file))


def results_of(told: Any, where: str) -> Results:
    """Results from what `Results.to_dict` gave.

    Raises:
        UsageError: not results, of another version, or not whole.
    """
    if not isinstance(told, dict) or told.get("tool") != "dit_accel bench":
        raise UsageError(f"{where} is no result of dit-accel bench")
    if told.get("version") != VERSION:
        raise UsageError(
            f"{where} is of version {told.get('version')!r}; this program reads version {VERSION}: use the program "
            "that wrote it, or run dit-accel bench again"
        )
    return from_plain(Results, {k: v for k, v in told.items() if k not in ("tool", "version")}, where)
