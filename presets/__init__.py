"""The presets that ship with dit_accel: TOML files, and beside them small trained models and trained SLA weights."""

if __name__ == "presets":
    raise ImportError(
        "This folder is `dit_accel.presets`, but it was imported as `presets`: the repository root is on "
        "sys.path. Run `pytest` or `python -P`, and import `dit_accel.presets`."
    )

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped_models() -> tuple[str, ...]:
    """The names of the models that ship with the package."""
    models = FOLDER / "models"
    if not models.is_dir():
        return ()
    return tuple(sorted(path.name for path in models.iterdir() if (path / "model_index.json").is_file()))


def shipped_weights() -> tuple[str, ...]:
    """The names of the SLA weights that ship with the package, folders of side files."""
    models = FOLDER / "models"
    return tuple(sorted(path.parent.name for path in models.glob("*/transformer.safetensors")))


def model_path(name: str) -> Path:
    """The folder of a shipped model, in diffusers' format.

    Raises:
        UnknownNameError: no model of that name ships with the package.
    """
    if name not in shipped_models():
        from dit_accel.errors import unknown_name

        raise unknown_name("shipped model", name, shipped_models())
    return FOLDER / "models" / name
