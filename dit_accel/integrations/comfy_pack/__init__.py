"""DiT-Accel's nodes for ComfyUI: a folder for `custom_nodes`. The nodes themselves are in the package dit_accel."""

try:
    from dit_accel.integrations.comfyui import comfy_entrypoint
except ModuleNotFoundError as error:
    if error.name != "dit_accel":
        raise
    import sys

    raise ModuleNotFoundError(
        f"dit_accel is not installed in the Python that runs ComfyUI. Run: {sys.executable} -m pip install dit-accel",
        name=error.name,
    ) from error

WEB_DIRECTORY = "./web"  # the nodes' help pages: web/docs/NODE_ID.md

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
