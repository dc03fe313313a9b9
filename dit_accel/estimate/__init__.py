"""What a preset should gain on a GPU, told from a model's configuration and from what was measured. No torch."""

from dit_accel.estimate.estimate import Estimate, estimate
from dit_accel.estimate.gpus import Gpu, find_gpu, gpu_names, own_gpu

__all__ = ["Estimate", "Gpu", "estimate", "find_gpu", "gpu_names", "own_gpu"]
