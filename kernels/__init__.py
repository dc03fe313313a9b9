"""The kernels of dit_accel, one folder per operation. Importing this imports neither triton nor any backend."""

if __name__ == "kernels":
    raise ImportError(
        "This folder is the package dit_accel.kernels, not Hugging Face's `kernels`: Python found it because the "
        "repository's root is on sys.path. Import `dit_accel.kernels`, and run `pytest` (not `python -m pytest`) "
        "or use `python -P`."
    )
