"""Recipes per model family: load, schedule, run, save. Never a denoising loop of our own."""

if __name__ == "pipelines":
    raise ImportError(
        "This folder is `dit_accel.pipelines`, but it was imported as `pipelines`: the repository root is on "
        "sys.path. Run `pytest` or `python -P`, and import `dit_accel.pipelines`."
    )
