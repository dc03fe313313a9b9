"""Barriers of the processor that count threads, by number; Triton itself takes the lowest.

Unlike barriers in memory they cost the computing groups one instruction: no thread need speak for its group, and nobody
polls. Numbers 8 to 15 are ours; what stands in the way of what:

- groups that share their tiles (all 288 threads): `go` 8 and 9, queries 10 and 11, stages 12 to 15;
- groups that work alone (160 threads each): queries 8 and 9, stages 10 to 12 and 13 to 15.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

GO = gl.constexpr(8)  # and 9: a computing group may issue its products
Q_FREE = gl.constexpr(10)  # and 11: both groups need this copy of the queries no longer
FREE = gl.constexpr(12)  # to 15: both groups have multiplied this stage's values
LONE_Q_FREE = gl.constexpr(8)  # and 9: the same of groups that work alone
LONE_FREE = gl.constexpr(10)  # to 12, and to 15 of the second group
LONE_STAGES = gl.constexpr(3)  # of each group at most
PAIR = gl.constexpr(256)  # threads of both computing groups
ALL = gl.constexpr(288)  # and of the loading warp
LONE = gl.constexpr(160)  # threads of one computing group and of its loading warp


@gluon.jit
def named_wait(which, threads):
    """Wait until `threads` threads, these among them, have come to the processor's barrier of this number."""
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [which, threads], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def named_arrive(which, threads):
    """Come to the barrier of this number and go on."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [which, threads], dtype=gl.int32, is_pure=False, pack=1
    )
