"""Training of tiny-hunyuan, a small HunyuanVideo (driven by `scripts/train_tiny.py`)."""
