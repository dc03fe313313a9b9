"""Guards: what looks after sparse attention while it runs, and how a run that fails ends.

- `attempt`: one call of sparse or linear attention, tried; dense attention in its place where it fails;
- `drift`: a few rows beside dense attention every few steps, and more key blocks where they differ too much;
- `memory`: what there is to say where memory ran out.
"""

from dit_accel.guards.attempt import NOT_FINITE, OUT_OF_MEMORY, Attended, Guards

__all__ = ["NOT_FINITE", "OUT_OF_MEMORY", "Attended", "Guards"]
