"""`dit-accel presets`: what can be asked for. No torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dit_accel.cli.request import show as show_value
from dit_accel.cli.terminal import tables
from dit_accel.preset import load_preset, preset_names
from dit_accel.roles import spread

app = typer.Typer(help="List the presets, or show one with the source of each value.", no_args_is_help=True)


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Name, model, status and purpose of every shipped preset."""
    presets = [load_preset(name) for name in preset_names()]
    if as_json:
        told = ("name", "description", "pipeline", "model", "status")
        print(json.dumps([{key: getattr(preset, key) for key in told} for preset in presets], indent=2))
        return
    from rich.table import Table

    table = Table("preset", "status", "model", "what it is")
    for preset in presets:
        table.add_row(preset.name, preset.status, preset.model, preset.description)
    tables().print(table)


@app.command("show")
def show(
    preset: Annotated[str, typer.Argument(help="A name, FILE.toml or FILE.toml#NAME.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every value of a preset, and which preset it comes from."""
    chosen = load_preset(preset)
    told = chosen.to_dict()
    if as_json:
        print(json.dumps(told, indent=2))
        return
    from rich.table import Table

    table = Table("value", "set to", "source", title=f"{chosen.name} ({chosen.status})", title_justify="left")
    for key in ("description", "pipeline", "model"):
        table.add_row(key, told[key], chosen.provenance.get(key, "default"))
    for group in ("generate", "sparse", "cache", "region"):
        for key, value in spread(told[group] or {}):
            name = f"{group}.{key}"
            table.add_row(name, show_value(value), chosen.provenance[name])
    tables().print(table)
