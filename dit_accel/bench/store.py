"""The folder of a report while it is measured: results.json and what belongs to it get their names together."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_accel.bench.results import RESULTS, Results, load_results
from dit_accel.errors import UsageError
from dit_accel.pipelines.staging import Stage
from dit_accel.pipelines.video import stage_clip

MEDIA = "media"
# Dense clips, not compressed, against which later ones are measured; away when the report is complete.
_FRAMES = ".dense-frames"


@dataclass(frozen=True)
class Store:
    """Writes what was measured, whole or not at all.

    Args:
        folder: of the report.
        fps: of the videos.
        suffix: ".mp4" or ".png".
    """

    folder: Path
    fps: float
    suffix: str

    def name(self, variant: str, clip: int, what: str = "", suffix: str | None = None) -> str:
        """The file of a variant's clip, relative to the folder."""
        safe = re.sub(r"[^\w.]+", "-", variant)
        return f"{MEDIA}/{safe}-{clip + 1:04d}{what}{suffix or self.suffix}"

    def write(
        self,
        results: Results,
        clips: Mapping[str, np.ndarray] | None = None,
        dense: tuple[int, np.ndarray] | None = None,
    ) -> None:
        """Write the results, and clips that they speak of.

        Args:
            clips: uint8 `[F, H, W, 3]` by their names.
            dense: a clip's place and frames, to be had again from `dense_frames`.

        Raises:
            EnvironmentProblem: a file cannot be written; nothing of these has its name then.
        """
        with Stage() as stage:
            for name, frames in (clips or {}).items():
                stage_clip(stage, self.folder / name, frames, self.fps)
            if dense is not None:
                np.save(stage.add(self._frames(dense[0])), dense[1])
            stage.write_text(self.folder / RESULTS, json.dumps(results.to_dict(), indent=1, allow_nan=False) + "\n")

    def dense_frames(self, clip: int) -> np.ndarray:
        """The dense clip of this place, as it was made."""
        return np.load(self._frames(clip))

    def tidy(self) -> None:
        """Remove what was needed for measuring alone."""
        shutil.rmtree(self.folder / _FRAMES, ignore_errors=True)

    def _frames(self, clip: int) -> Path:
        return self.folder / _FRAMES / f"{clip + 1:04d}.npy"


def check_folder(folder: Path, *, resume: bool) -> Results | None:
    """What is in the folder of a report already.

    Returns:
        The results of an earlier bench in it, or None for a new or empty folder.

    Raises:
        UsageError: a folder that holds something else, nothing to resume, or results that cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; a report is several files: name a folder")
    if (folder / RESULTS).is_file():
        return load_results(folder)
    if resume:
        raise UsageError(f"--resume: {folder} holds no {RESULTS}; leave --resume out to begin one there")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"folder {folder} holds files that no earlier bench wrote; choose a new or empty folder")
    return None


def clear_folder(folder: Path, earlier: Results) -> None:
    """Remove what an earlier bench left in the folder: its clips, which are ours to replace."""
    for variant in earlier.variants:
        for made in variant.clips:
            for name in (*made.files, *made.worst_frame_files):
                (folder / MEDIA / Path(name).name).unlink(missing_ok=True)
    shutil.rmtree(folder / _FRAMES, ignore_errors=True)
