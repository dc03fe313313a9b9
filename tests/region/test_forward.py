"""One forward of a part of the tokens, against stock diffusers' forward of all of them.

The oracle is the stock transformer without anything of ours: what a token left out would have given to others, its key
and value, is written over with what was recorded of it. What its row gives then does not matter to the active ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

import dit_accel


class Oracle:
    """Keys and values of a stock Wan's self-attentions, recorded and written over."""

    def __init__(self, rig) -> None:
        self.rig, self.kept = rig, {}
        self.active: Tensor | None = None  # bool [B, S]; None: all
        blocks = [*rig.transformer.blocks, *getattr(rig.transformer, "vace_blocks", ())]
        self.modules = [m for block in blocks for m in (block.attn1.norm_k, block.attn1.to_v)]
        self.handles = [m.register_forward_hook(self.record) for m in self.modules]
        self.branch = ""

    def record(self, module, args, output: Tensor) -> Tensor:
        key = self.branch, module
        if self.active is not None:
            output = torch.where(self.active[..., None], output, self.kept[key])
        self.kept[key] = output
        return output

    def forward(self, x: Tensor, time: float, branch: str, active: Tensor | None) -> Tensor:
        self.branch, self.active = branch, active
        return self.rig.forward(x, time, branch)


MODELS = {
    "t2v": {},
    "i2v": {"in_channels": 36, "image_dim": None},
    "vace": {"vace_layers": [0, 1], "vace_in_channels": 96},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", list(MODELS))
def test_active_tokens_read_what_is_kept_of_the_others(rig, kind, batch):
    """Two branches through four steps, with another input at each: every output is the oracle's."""
    mine, theirs = rig(batch, **MODELS[kind]), rig(batch, **MODELS[kind])
    oracle, handle = Oracle(theirs), mine.accelerate(selector="l2")
    x, before, chosen = mine.x, {}, []
    for step in range(5):
        active = mine.active(handle) if step else None
        out, time = {}, 900.0 - 100 * step
        for branch in ("cond", "uncond"):
            out[branch] = mine.forward(x, time, branch)
            expected = oracle.forward(x, time, branch, active)
            if active is not None:
                rows = mine.by_token(expected)
                rows[~active] = mine.by_token(before[branch])[~active]
                torch.testing.assert_close(mine.by_token(out[branch]), rows, rtol=1e-4, atol=1e-5)
                # and not for want of difference: the others would come out otherwise if they were computed
                assert not torch.allclose(mine.by_token(expected)[~active], rows[~active], rtol=1e-3, atol=1e-3)
            before[branch] = out[branch]
        velocity = out["uncond"] + 5 * (out["cond"] - out["uncond"])
        moved = mine.step(velocity, x)
        x = torch.cat([moved, x[:, 16:]], dim=1)
        chosen.append(active)
    assert not torch.equal(chosen[1], chosen[2])
    assert handle.report().regions == {"36 of 72 tokens": 8, "72 of 72 tokens": 2}


def test_the_choice_is_by_the_guided_velocity(rig):
    mine = rig(2)
    handle = mine.accelerate(selector="l2")
    out = {branch: mine.forward(mine.x, 900.0, branch) for branch in ("cond", "uncond")}
    velocity = out["uncond"] + 5 * (out["cond"] - out["uncond"])
    mine.step(velocity, mine.x)
    size = mine.by_token(velocity).norm(dim=-1).mean(-1)
    expected = [sorted(row.topk(36).indices.tolist()) for row in size]
    assert handle._sampler.chosen().tolist() == expected
    assert expected[0] != expected[1]


class Masked(WanAttnProcessor):
    """As the stock processor, under a mask: the oracle of doing without the keys of the others."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask  # bool [B, 1, 1, S]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@pytest.mark.parametrize(("options", "masked"), [({"keys": "drop"}, (0, 1)), ({"layers": 1}, (0,))])
def test_tokens_left_out_may_be_done_without(rig, options, masked):
    mine, theirs = rig(2), rig(2)
    oracle, handle = Oracle(theirs), mine.accelerate(**options)
    x, first = mine.x, mine.forward(mine.x, 900.0)
    oracle.forward(x, 900.0, "cond", None)
    x = mine.step(first, x)
    active = mine.active(handle)
    for layer in masked:
        theirs.transformer.blocks[layer].attn1.set_processor(Masked(active[:, None, None]))
    expected = mine.by_token(oracle.forward(x, 800.0, "cond", active))
    out = mine.by_token(mine.forward(x, 800.0))
    torch.testing.assert_close(out[active], expected[active], rtol=1e-4, atol=1e-5)
    assert torch.equal(out[~active], mine.by_token(first)[~active])


def test_timesteps_of_each_token_go_with_it(rig):
    """Wan 2.2's 5B model: the given frame's tokens have no noise."""
    mine, theirs = rig(), rig()
    handle, oracle = mine.accelerate(), Oracle(theirs)
    time = torch.full((1, mine.tokens), 900.0)
    time[:, :24] = 0
    first = mine.forward(mine.x, timestep=time)
    theirs.forward(mine.x, timestep=time)
    x = mine.step(first, mine.x)
    active = mine.active(handle)
    assert 0 < active[:, :24].sum() < active.sum()
    oracle.active = active
    expected = mine.by_token(theirs.forward(x, timestep=time))
    out = mine.by_token(mine.forward(x, timestep=time))
    torch.testing.assert_close(out[active], expected[active], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["raster", "tiles", "gilbert"])
def test_keys_kept_of_a_sparse_step_stand_in_its_order(rig, order):
    """Nothing changes from one step to the next, so that a part of the tokens must give what all of them gave."""
    mine = rig(2)
    own = {"sample_ratio": 0.5, "bucket": 4, "start": 1, "error_reset": ()}
    sparse = dict(method="pooled", keep=1.0, order=order, block=16, min_tokens=0)
    handle = dit_accel.accelerate(mine.pipe, region=own, **sparse)
    first = mine.forward(mine.x, 500.0)
    mine.step(first, mine.x)
    second = mine.forward(mine.x, 500.0)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    active = mine.active(handle)
    assert not torch.equal(mine.by_token(second)[active], mine.by_token(first)[active])  # it was computed
    report = handle.report()
    assert report.sparse_calls == 2 and report.regions == {"72 of 72 tokens": 1, "36 of 72 tokens": 1}
    assert report.dense_reasons == {"region sampling: the queries are a part of the tokens": 2}
    assert report.fallbacks == {}


def test_a_row_alone_is_as_among_others(rig):
    outs = {}
    for rows in ((0, 1), (1,)):
        mine = rig(2)
        mine.batch = len(rows)
        mine.text = {name: text[list(rows)] for name, text in mine.text.items()}
        x, handle = mine.x[list(rows)], mine.accelerate()
        for step in range(4):
            out = mine.forward(x, 900.0 - 100 * step)
            x = mine.step(out, x)
        outs[rows] = x
        handle.remove()
    torch.testing.assert_close(outs[1,][0], outs[0, 1][1], rtol=1e-4, atol=1e-5)


def test_guidance_in_one_forward_has_one_choice_for_both_rows(rig):
    mine = rig(2)
    handle = mine.accelerate()
    velocity = mine.forward(mine.x, 900.0)
    guided = velocity[:1] + 5 * (velocity[1:] - velocity[:1])
    mine.step(guided, mine.x[:1])
    second = mine.by_token(mine.forward(mine.x, 800.0))
    same = (second == mine.by_token(velocity)).flatten(2).all(-1)
    assert torch.equal(same[0], same[1]) and torch.equal(~same[:1], mine.active(handle))


def test_a_branch_that_comes_late_computes_everything(rig):
    mine, fresh = rig(), rig()
    handle = mine.accelerate()
    x = mine.x
    for step in range(2):
        x = mine.step(mine.forward(x, 900.0 - 100 * step), x)
    assert torch.equal(mine.forward(x, 700.0, "uncond"), fresh.forward(x, 700.0, "uncond"))
    assert handle.report().whole_reasons["nothing is kept of this branch yet"] == 1


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_the_scheduler_is_mended_for_the_tokens_that_came_back_and_no_others(rig, scheduler):
    """Beside each step, a copy of the scheduler as it was before takes the same one, unmended."""
    mine = rig(2, steps=7)
    mine.pipe.scheduler = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    mine.begin()
    handle, x = mine.accelerate(selector="random", error_reset=(5,), start=2), mine.x
    before = torch.ones(2, mine.tokens, dtype=torch.bool)
    came_back = []
    for step in range(7):
        active = torch.ones_like(before) if step in (0, 1, 5, 6) else mine.active(handle)
        velocity = mine.forward(x, 900.0 - 100 * step)
        unmended = copy.deepcopy(mine.pipe.scheduler)
        plain = unmended.step(velocity, unmended.timesteps[step], x, return_dict=False)[0]
        moved = mine.step(velocity, x)
        differs = (mine.by_token(moved) != mine.by_token(plain)).flatten(2).any(-1)
        # a token's last step has no order: what it gives is x0 itself, but for UniPC's corrector
        if step < 6:
            assert torch.equal(differs, active & ~before), step
        came_back.append(int((active & ~before).sum()))
        before, x = active, moved
    assert came_back[:3] == [0, 0, 0] and all(came_back[3:6])


def test_change_looks_at_the_tokens_that_were_computed(rig):
    """By hand: how far each velocity moved in a step when it was last computed, times the steps that it is behind."""
    mine = rig(2, steps=7)
    handle, x = mine.accelerate(selector="change", start=2, starvation=0.0), mine.x
    seen, rate, wait, expected = None, None, torch.zeros(2, mine.tokens, dtype=torch.int64), None
    for step in range(6):
        active = torch.ones_like(wait, dtype=torch.bool) if step < 2 else mine.active(handle)
        if step >= 2:
            assert mine.active(handle).nonzero().tolist() == expected
        velocity = mine.forward(x, 900.0 - 100 * step)
        now = mine.by_token(velocity)
        if seen is None:
            rate = torch.ones(2, mine.tokens)
        else:
            moved = (now - seen).norm(dim=-1).mean(-1) / (wait + 1)
            rate = torch.where(active, moved, rate)
        wait, seen = torch.where(active, 0, wait + 1), now
        score = rate * (wait + 1)
        keep = [sorted(row.topk(36).indices.tolist()) for row in score]
        expected = [[row, token] for row in range(2) for token in keep[row]]
        x = mine.step(velocity, x)
    assert len(rate.unique()) == rate.numel()  # no ties, which go by index
