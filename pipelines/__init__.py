"""Recipes per model family: load, schedule, run, save. Never a denoising loop of our own.

A recipe is a module that offers
- `MAKES`: "video" or "image";
- `find(model, download=)`: the model's folder, its files judged;
- `start_image(folder)`: whether what it makes begins at a picture: "never", "optional" or "always";
- `size_rule(folder)`, `size_rule_of(pipe)`: what sizes the model can make;
- `load(model, ...)`: the stock pipeline, ready to run; one that may begin at a picture takes `from_image=`;
- `generate(pipe, options, prompt, seed=, callback=)`: frames; one that may begin at a picture takes `image=`.

All but `load` and `generate` import no torch.
"""

import importlib
from types import ModuleType

if __name__ == "pipelines":
    raise ImportError(
        "This folder is `dit_accel.pipelines`, but it was imported as `pipelines`: the repository root is on "
        "sys.path. Run `pytest` or `python -P`, and import `dit_accel.pipelines`."
    )

RECIPES = ("flux", "hunyuan_video", "sd3", "wan")


def recipe(name: str) -> ModuleType:
    """The recipe that a preset names."""
    assert name in RECIPES, name
    return importlib.import_module(f"{__name__}.{name}")
