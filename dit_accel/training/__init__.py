"""Training what a sparse method learns: SLA. The only part of this package with gradients."""
