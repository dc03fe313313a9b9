"""Write: the preset with what it rests on, and its record, both at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel.pipelines.staging import Stage
from dit_accel.preset import Preset
from dit_accel.tuning.as_preset import load, to_toml
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.plan import Plan
from dit_accel.tuning.results import Tried, Tuned

EQUAL = 0.05  # of dense's computed time, by which a rival may take longer and still stand for the same
_COMMIT = re.compile(r"[0-9a-f]{40}")


def make_record(opened: Mapping[str, Any], plan: Plan, budget: Budget, tuned: Tuned) -> dict[str, Any]:
    """All that the preset rests on. Figures are of held-out clips alone.

    Args:
        opened: what every record begins with, and the `commit` of a checkout.
    """
    rivals = [one.to_dict() for one in tuned.rivals]
    best = max(rivals, key=lambda one: one["psnr"], default=None)
    hand = (found := best_hand_set(tuned.chosen, tuned.rivals)) and found.to_dict()
    chosen, made = tuned.chosen.to_dict(), plan.base.generate
    return {
        **opened,
        # what a committed preset's claims are compared with, under the names that every record has
        "environment": {
            "chip": _chip(opened["machine"]),
            "date": opened["written"],
            "versions": opened["versions"],
            "commit": opened["commit"],
        },
        "model": plan.base.model,
        "size": made.width,
        **{key: getattr(made, key) for key in ("frames", "steps", "guidance", "flow_shift")},
        "options": {"tuned": chosen["options"]["sparse"]},
        "verb": "tune",
        "budget": str(budget),
        "keeps": list(plan.keeps),
        "followed": plan.follow,
        "tuned_on": [dataclasses.asdict(clip) for clip in plan.clips],
        "held_out": [dataclasses.asdict(clip) for clip in plan.held_out],
        "summary": {
            "dense": {
                "seconds_of_clips": [round(one.seconds, 3) for one in tuned.dense],
                "forward_share": round(tuned.forward_share, 4),
            },
            "tuned": chosen,
            "times_as_fast": round(1 / chosen["time"], 4),
            "way": tuned.way,
            "predicted": tuned.predicted,
            "gain_db_over_best_hand_set": None if hand is None else round(chosen["psnr"] - hand["psnr"], 4),
            "best_hand_set": hand and hand["name"],
            "best_rival": best and best["name"],
            "additivity": [round(value, 4) for value in tuned.additivity],
        },
        "equal_time": "computed: forwards and blocks really run, by seconds measured of each kind of forward; a rival "
        "takes no less, but for the base preset's sparse attention as it is; to be the best hand-set it takes no more "
        f"than {EQUAL:g} of dense's above",
        "ways": [one.to_dict() for one in tuned.entrants],
        "carried": [one.to_dict() for one in tuned.carried],
        "rivals": rivals,
        "tries": [one.to_dict() for one in tuned.tries],
        "allocation": dataclasses.asdict(tuned.allocation),
    }


def write_preset(
    folder: Path, name: str, plan: Plan, budget: Budget, tuned: Tuned, record: dict[str, Any], revision: str
) -> tuple[Preset, list[Path]]:
    """Write NAME.toml and NAME.json to a folder, and the best hand-set rival as NAME-rival.toml.

    Returns:
        The preset as it will be read, and the files.
    """
    preset_file, record_file = folder / f"{name}.toml", folder / f"{name}.json"
    rival_file = folder / f"{name}-rival.toml"
    options = plan.base.generate
    size = f"{options.width}x{options.height}"
    figures = {
        "psnr_db": ("summary", "tuned", "psnr"),
        "worst_psnr_db": ("summary", "tuned", "worst_psnr"),
        "computed_time": ("summary", "tuned", "computed_time"),
    }
    tables = {
        "description": f"{plan.base.name} tuned for {budget}",
        "level": "turbo" if "cache" in tuned.tables else "fast",
        "status": "measured",
        **tuned.tables,
        "provenance": {
            "record": record_file.name,
            "revision": revision,
            "size": size if options.frames == 1 else f"{options.frames} frames of {size}",
            "steps": options.steps,
            "scheduler": record["scheduler"],
            "gpu": record["environment"]["chip"],
            "date": record["written"][:10],
            "figures": {key: {"value": _follow(record, at), "at": list(at)} for key, at in figures.items()},
        },
    }
    if not any(key in tables for key in ("sparse", "cache")):
        tables["level"] = "exact"
    remark = f"Made by dit-accel tune --budget '{budget}'; {record_file.name} has what it rests on."
    text = to_toml(name, tables, remark)
    preset = load(text, name, str(preset_file))
    rival = best_hand_set(tuned.chosen, tuned.rivals)
    with Stage() as stage:
        stage.write_text(record_file, json.dumps(record, indent=2) + "\n")
        stage.write_text(preset_file, text)
        if rival is not None:
            stage.write_text(rival_file, _rival_text(f"{name}-rival", rival, plan))
    if rival is None:
        rival_file.unlink(missing_ok=True)  # another budget's is no rival of this preset
    return preset, [preset_file, record_file, *([] if rival is None else [rival_file])]


def best_hand_set(chosen: Tried, rivals: Sequence[Tried]) -> Tried | None:
    """The likest of what one would set by hand; None where all of that takes longer by more than `EQUAL`.

    Fewer steps, with nothing of ours, are not set by hand.
    """
    most = chosen.cost + EQUAL
    by_hand = (one for one in rivals if not one.preset.is_stock and one.cost <= most)
    return max(by_hand, key=lambda one: one.figure("psnr"), default=None)


def _rival_text(name: str, rival: Tried, plan: Plan) -> str:
    told: dict[str, Any] = {"pipeline": plan.base.pipeline, "model": plan.base.model, "description": rival.name}
    told["generate"] = dataclasses.asdict(plan.base.generate)
    parts = {"sparse": rival.preset.sparse, "cache": rival.preset.cache}
    told |= {key: part.to_mapping() for key, part in parts.items() if part is not None}
    return to_toml(name, told, "The best that was set by hand, at no less computed time: to be run beside it.")


def _chip(machine: Mapping[str, Any]) -> str:
    return machine.get("gpu") or f"CPU {platform.machine()}, {machine['threads']} threads"


def _follow(record: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        record = record[key]
    return record


def revision_of(folder: Path) -> str:
    """A model's commit where the hub's cache names it, else a checksum of its transformers' weights."""
    if _COMMIT.fullmatch(folder.name):
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(folder.glob("transformer*/*.safetensors")):
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return f"sha256:{digest.hexdigest()[:16]}"
