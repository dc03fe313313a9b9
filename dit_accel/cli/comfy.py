"""`dit-accel comfy`: the node pack's way into a ComfyUI folder, and out of it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.terminal import remark

app = typer.Typer(help="Put the nodes for ComfyUI into its folder, or take them out.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(metavar="PATH", help="ComfyUI's folder: the one that holds custom_nodes.")
]


@app.command("install")
def install(path: Folder) -> None:
    """Put the node pack into custom_nodes; one that is there is replaced.

    Prints where it is. The Python that runs ComfyUI must have dit-accel, too.
    """
    from dit_accel.integrations import comfy_install

    print(comfy_install.install(path.expanduser()))
    remark(
        "start ComfyUI anew: nodes are under DiT-Accel, examples under Templates. dit-accel must be installed in "
        "ComfyUI's Python."
    )


@app.command("uninstall")
def uninstall(path: Folder) -> None:
    """Take the node pack out of custom_nodes, and nothing else."""
    from dit_accel.integrations import comfy_install

    print(comfy_install.uninstall(path.expanduser()))
    remark("taken out: start ComfyUI anew")
