"""`python -m dit_accel.cli` does what `dit-accel` does."""

from dit_accel.cli import main

main()
