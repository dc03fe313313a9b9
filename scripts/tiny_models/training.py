"""The loop: batches of several kinds, a learning rate that follows the clock, an average of the weights.

Every GPU renders and encodes its own scenes once, then draws batches from them. Ranks are kept equal by averaging
gradients; the learning rate follows the share of the wall-clock budget that is used, so a run always ends its decay.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from .attention import prefer_fastest
from .graphs import GraphedStep
from .learner import Heads, Learner, Student
from .pool import ScenePool
from .ranks import Ranks

GIVEN_TIME, DIVERGED = 300, 4.0  # from this step on, a loss so many times the least one ends a run
SAVE_SECONDS = 150


class Kind(Protocol):
    """One kind of scene: `batch` of them a step on each GPU, in a `share` of the steps. A dataclass."""

    batch: int
    share: float


@dataclass(frozen=True)
class Pace:
    """How long and how fast to train. See the command line's help for each field."""

    minutes: float
    rate: float
    final: float
    compiled: bool
    seed: int
    graphed: bool = False


def train(
    student: Student,
    heads: Heads,
    pools: Sequence[ScenePool],
    mix: Sequence[Kind],
    pace: Pace,
    ranks: Ranks,
    *,
    started: float,
    shift: float,
    tapped: int,
    tokens: int,
    save: Callable[[Student, Heads], None],
) -> dict:
    """Train until `pace.minutes` after `started`.

    Args:
        student: with equal weights on every rank.
        shift: of the noise schedule.
        tapped: the block whose output the token reader reads.
        tokens: of the first kind of scene; the attention kernel is chosen for it.
        save: called on the first rank with the averaged weights, now and then and at the end.

    Returns:
        The record: steps, pace, kinds, losses over time.
    """
    device = ranks.device
    average = copy.deepcopy(student)
    student.tap(tapped)
    heads_of = student.transformer.config.num_attention_heads
    attention = prefer_fastest(ranks, mix[0].batch, tokens, heads_of, student.head_width, student.joint)
    if pace.compiled:
        student.compile_parts()
    torch.manual_seed(pace.seed * 1000 + ranks.rank + 1)
    learner = Learner(student, heads, pace.rate, pace.final, shift, ranks, pace.graphed)

    def step_of(pool: ScenePool, kind: Kind) -> Callable[[], torch.Tensor]:
        def take() -> torch.Tensor:
            return learner.take_step(pool.draw(kind.batch))

        return GraphedStep(take) if pace.graphed else take

    steps = [step_of(pool, kind) for pool, kind in zip(pools, mix, strict=True)]
    order = random.Random(pace.seed)  # the same kinds of batches in the same order on every rank
    history, losses, step, progress, saved, best = [], [[] for _ in pools], 0, 0.0, time.time(), math.inf
    with attention:
        while progress < 1:
            kind = order.choices(range(len(pools)), [each.share for each in mix])[0]
            learner.set_pace(progress, step)
            losses[kind].append(steps[kind]())
            step += 1
            decay = min(0.999, step / (step + 30))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
            if step % (20 if device.startswith("cuda") else 1) == 0:  # agreeing makes the GPU wait
                progress = ranks.agree((time.time() - started) / (60 * pace.minutes))
            if step % 100 == 0 or progress >= 1:
                means = [torch.stack(part).mean(0).tolist() if part else [None] * 3 for part in losses]
                losses = [[] for _ in pools]
                seconds = round(time.time() - started, 1)
                history.append({"step": step, "seconds": seconds, "loss": [m[0] for m in means]})
                now = ranks.agree(sum(m[0] or 0.0 for m in means))
                best = min(best, now) if step % 100 == 0 else best
                if step >= GIVEN_TIME and now > DIVERGED * best:
                    raise SystemExit(
                        f"the run diverges: by step {step} the loss has risen from {best:.3f} to {now:.3f}. Give a "
                        "smaller --rate, or larger batches in --mix."
                    )
                if ranks.first:
                    told = ", ".join(f"{m[0]:.4f} ({m[1]:.2f} {m[2]:.3f})" if m[0] else "-" for m in means)
                    print(f"step {step} {seconds} s, loss (reading tokens, words): {told}", flush=True)
            if ranks.first and time.time() - saved > SAVE_SECONDS:
                save(average, heads)
                saved = time.time()
    if ranks.first:
        save(average, heads)
    return {
        "steps": step,
        "mix": [asdict(each) for each in mix],
        **{name: getattr(pace, name) for name in ("minutes", "rate", "final", "seed", "graphed")},
        "reading": heads.weight,
        "gpus": ranks.world,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "history": history,
    }
