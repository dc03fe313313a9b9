"""DiT-Accel's nodes for ComfyUI: a folder for `custom_nodes`. The nodes themselves are in the package dit_accel."""

try:
    from dit_accel.integrations.comfyui import comfy_entrypoint
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "dit_accel":
        raise
    import sys

    raise ModuleNotFoundError(
        "dit_accel is not installed in the Python that runs ComfyUI, or too old. Run: "
        f"{sys.executable} -m pip install --upgrade dit-accel",
        name=error.name,
    ) from error

WEB_DIRECTORY = "./web"  # the nodes' help pages: web/docs/NODE_ID.md

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
