"""For tests of Stable Diffusion 3: its configurations, and a transformer whose norms can be told apart."""

import torch

from dit_accel.testing import tiny_sd3_transformer

# every configuration that may be reordered
REORDERED = {
    "sd3": {},
    "sd3.5": {"qk_norm": "rms_norm"},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}
MEDIUM = REORDERED["sd3.5-medium"]


def tiny(**config):
    """A tiny transformer whose norms have weights of their own too, so that none can stand in for another."""
    transformer = tiny_sd3_transformer(**config)
    generator = torch.Generator().manual_seed(5)
    for name, weight in transformer.named_parameters():
        if "norm_" in name and weight.ndim == 1:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    return transformer


def calls_in(config):
    return 2 + len(config.get("dual_attention_layers", ()))
