"""What a bench was asked for, as the record tells it and as resuming compares it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from dit_accel.bench.results import Results, Workload
from dit_accel.errors import UsageError
from dit_accel.preset import Preset

# What is not called on the command line as it is here.
_TOLD = {"presets": "--preset and --against", "settings": "--set", "options": "values of the presets"}


def plain(table: Any) -> Any:
    """As JSON gives it back, so that a loaded record equals the one that was written."""
    return json.loads(json.dumps(table))


def describe_workload(pipe: Any, presets: Sequence[Preset], seen: Any, probe_steps: int, **asked: Any) -> Workload:
    """The workload of presets on a loaded pipeline.

    Args:
        seen: of a generation of `probe_steps` steps (`profile.Seen`).
        asked: the other fields of `Workload`, as the command line has them.
    """
    first = presets[0].generate
    video = math.prod(seen.grid)
    return Workload(
        presets=tuple(preset.name for preset in presets),
        options={preset.name: plain(preset.to_dict()) for preset in presets},
        model=presets[0].model,
        width=first.width,
        height=first.height,
        frames=first.frames,
        fps=first.fps,
        video_tokens=video,
        text_tokens=seen.attended - video,
        steps=first.steps,
        guidance=first.guidance,
        passes_per_step=round(seen.forwards / probe_steps),
        scheduler=type(pipe.scheduler).__name__,
        negative_prompt=first.negative_prompt or None,
        compiled=False,
        **asked,
    )


def check_same(earlier: Results, work: Workload, identity: Mapping[str, Any]) -> None:
    """Whether an earlier bench can be continued with this workload.

    Args:
        identity: fields of `Environment` that must be alike.

    Raises:
        UsageError: it was of another one, or of another machine or program; the message names what differs.
    """
    differ = [_TOLD.get(field.name, field.name) for field in fields(Workload)
              if getattr(earlier.workload, field.name) != getattr(work, field.name)]  # fmt: skip
    differ += [f"{name} of the machine" for name, now in identity.items() if getattr(earlier.environment, name) != now]
    if differ:
        raise UsageError(
            f"--resume: what was begun there differs in {', '.join(differ)}; give the same options, or another --out"
        )
