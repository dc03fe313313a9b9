"""The nodes, a file for each: what the user sees of it, and which function it calls."""

CATEGORY = "DiT-Accel"
