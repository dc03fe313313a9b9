"""Rows in another order, each head in its own: `take_rows` and its inverse, `put_rows`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, put_rows, take_rows, why_not

__all__ = ["IMPLEMENTATIONS", "choose", "put_rows", "take_rows", "why_not"]
