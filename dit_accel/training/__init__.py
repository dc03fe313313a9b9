"""Fine-tuning of sparse-linear attention (SLA): the only part with gradients."""
