"""Training of tiny-flux and tiny-sd3, two small text-to-image models (driven by `scripts/train_tiny.py`)."""
