"""Training of tiny-wan, the small Wan that ships in `presets/models/tiny-wan` (driven by `scripts/train_tiny.py`)."""
