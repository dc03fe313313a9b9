"""The `dit-accel` command line: one file per verb."""
