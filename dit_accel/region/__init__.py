"""Region-adaptive sampling: at most steps only a part of the tokens is computed, the others keep their velocity.

Parts of a picture or a clip settle at different steps. After each step a *selector* looks at the guided velocity and
chooses the tokens of the next; the transformer computes these alone, whose queries read the keys of all tokens as they
were computed last; the scheduler then moves every token, by its new velocity or by its last one.

Source: RAS, arXiv:2502.10389. Where the published code falls short this one differs: keys are kept by branch of
guidance, a token that was left out gains in urgency at whichever end it was dropped, any grid and batch will do,
schedulers with a history are mended where a token comes back, and nothing is a global.

- `options`: what may be said about it;
- `steps`: which steps compute everything;
- `choose`: which tokens are computed;
- `blocks`: whole blocks as what is chosen, and the rows of a plan that they have;
- `active`: taking these tokens out of a sequence, and putting them back;
- `block_attention`: sparse attention with these;
- `schedulers`: standing in a scheduler's `step`, and mending its history;
- `chooser`: one run's choice, from step to step;
- `forwards`: one transformer's forwards, and what is kept of them;
- `sampler`, `engine`: both in a pipeline of diffusers.
"""

from __future__ import annotations

from dit_accel.region.options import Region, load_region

__all__ = ["Region", "load_region"]
