"""Region sampling where text attends with the image: SD3 and FLUX.1. Nothing changes from one step to the next here, so
that a part of the tokens must give what all of them gave; and where the text or the image changes, what a part gives is
checked against a stock forward whose other tokens' keys are written over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.testing import tiny_flux_pipeline, tiny_flux_transformer, tiny_sd3_pipeline

TEXT, TOKENS = 7, 5 * 6
REGION = {"sample_ratio": 0.5, "bucket": 3, "start": 2, "error_reset": (4,)}
KINDS = {
    "sd3": {},
    "sd35": {"qk_norm": "rms_norm"},
    "sd35-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "flux": None,
}


def make(kind: str) -> Any:
    return tiny_flux_pipeline() if kind == "flux" else tiny_sd3_pipeline(transformer=KINDS[kind])


def embeds(kind: str, batch: int, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width, pooled = (32, 24) if kind == "flux" else (24, 20)
    found = {
        "prompt_embeds": torch.randn(batch, TEXT, width, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, pooled, generator=generator),
    }
    return found if kind == "flux" else {**found, **{f"negative_{name}": -x for name, x in found.items()}}


def sample(pipe: Any, kind: str, batch: int = 1, steps: int = 7, **call: Any) -> Tensor:
    given = {"height": 10, "width": 12, "guidance_scale": 4.0, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(**embeds(kind, batch), generator=torch.Generator().manual_seed(0), **{**given, **call}).images


def forward(pipe: Any, kind: str, x: Tensor, text: dict[str, Tensor], time: float) -> Tensor:
    given = {"encoder_hidden_states": text["prompt_embeds"], "pooled_projections": text["pooled_prompt_embeds"]}
    if kind == "flux":
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(6.0))
        given |= {"img_ids": places, "txt_ids": torch.zeros(TEXT, 3)}
    scale = 1000 if kind == "flux" else 1
    with torch.no_grad():
        time = torch.full((len(x),), time / scale)
        return pipe.transformer(hidden_states=x, timestep=time, **given, return_dict=False)[0]


def noise(kind: str, batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (TOKENS, 16) if kind == "flux" else (4, 10, 12)
    return torch.randn(batch, *shape, generator=generator)


def by_token(kind: str, x: Tensor) -> Tensor:
    if kind == "flux":
        return x
    places = [x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(1) for r in range(5) for c in range(6)]
    return torch.stack(places, dim=1)


def step(pipe: Any, velocity: Tensor, x: Tensor) -> Tensor:
    index = pipe.scheduler.step_index or 0
    return pipe.scheduler.step(velocity, pipe.scheduler.timesteps[index], x, return_dict=False)[0]


@pytest.mark.parametrize("order", [None, "raster", "tiles"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_part_gives_what_all_gave(kind, order):
    pipe, batch = make(kind), 1 if kind == "flux" else 2
    text, x = embeds(kind, batch), noise(kind, batch)
    pipe.scheduler.set_timesteps(6)
    sparse = {} if order is None else dict(method="pooled", keep=1.0, order=order, block=8, min_tokens=0)
    handle = dit_accel.accelerate(pipe, region={**REGION, "start": 1}, **sparse)
    first = forward(pipe, kind, x, text, 500.0)
    step(pipe, first, x)
    index = handle._sampler.chosen()
    second = forward(pipe, kind, x, text, 500.0)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    left_out = torch.ones(batch, TOKENS, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(by_token(kind, second)[left_out], by_token(kind, first)[left_out])
    assert handle.report().regions == {"30 of 30 tokens": 1, "15 of 30 tokens": 1}


@pytest.mark.parametrize("order", ["raster", "gilbert"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_blocks_give_what_all_gave_and_attend_sparsely(kind, order):
    """Text beside the image: it has blocks of its own, which are always computed."""
    pipe, batch = make(kind), 1 if kind == "flux" else 2
    text, x = embeds(kind, batch), noise(kind, batch)
    pipe.scheduler.set_timesteps(6)
    sparse = dict(method="pooled", keep=0.6, order=order, block=8, min_tokens=0)
    handle = dit_accel.accelerate(pipe, region={**REGION, "start": 1, "unit": "block"}, **sparse)
    first = forward(pipe, kind, x, text, 500.0)
    step(pipe, first, x)
    index = handle._sampler.chosen()
    second = forward(pipe, kind, x, text, 500.0)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    left_out = torch.ones(batch, TOKENS, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(by_token(kind, second)[left_out], by_token(kind, first)[left_out])
    report = handle.report()
    assert report.regions == {"30 of 30 tokens": 1, "14 of 30 tokens": 1}  # 8 and the short block of 6
    assert report.dense_calls == 0 and report.sparse_calls > 0 and report.keep_achieved < 0.95


class Oracle:
    """Keys and values of a stock transformer's image tokens, recorded and written over; its text is always new.

    FLUX.1's single blocks project text and image in one: the text stands first.
    """

    def __init__(self, transformer: Any) -> None:
        self.kept: dict[Any, Tensor] = {}
        self.active: Tensor | None = None
        for name, module in transformer.named_modules():
            if name.endswith(("attn.to_k", "attn.to_v", "attn2.to_k", "attn2.to_v")):
                module.register_forward_hook(self.record)

    def record(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        image = output[:, -TOKENS:]
        if self.active is not None:
            image = torch.where(self.active[..., None], image, self.kept[module])
        self.kept[module] = image
        return torch.cat([output[:, :-TOKENS], image], dim=1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_active_tokens_and_text_read_what_is_kept(kind):
    """Three steps of a part, with another image and another noise level at each."""
    mine, theirs, batch = make(kind), make(kind), 1 if kind == "flux" else 2
    mine.scheduler.set_timesteps(6)
    handle, oracle = dit_accel.accelerate(mine, region={**REGION, "start": 1}), Oracle(theirs.transformer)
    text, x, before = embeds(kind, batch), noise(kind, batch), None
    for number in range(4):
        out = by_token(kind, mine_out := forward(mine, kind, x, text, 900.0 - 100 * number))
        if number:
            oracle.active = torch.zeros(batch, TOKENS, dtype=torch.bool).scatter(1, handle._sampler.chosen(), True)
        expected = by_token(kind, forward(theirs, kind, x, text, 900.0 - 100 * number))
        if number:
            active = oracle.active
            torch.testing.assert_close(out[active], expected[active], rtol=1e-4, atol=1e-5)
            assert torch.equal(out[~active], before[~active])
        before, x = out, step(mine, mine_out, x)


@pytest.mark.parametrize("kind", list(KINDS))
def test_runs(kind):
    pipe = make(kind)
    dense = sample(pipe, kind)
    with dit_accel.accelerate(pipe, region={**REGION, "sample_ratio": 1.0}):
        assert torch.equal(sample(pipe, kind), dense)
    handle = dit_accel.accelerate(pipe, region=REGION)
    part, held = handle._engines[0].region, set()

    def look(pipe: Any, number: int, time: Any, kwargs: dict) -> dict:
        held.add(part.bytes_held())
        return kwargs

    first = sample(pipe, kind, callback_on_step_end=look)
    rows = 1 if kind == "flux" else 2
    assert held == {0, part.declare(rows, TOKENS, TEXT, 4)}
    assert not torch.equal(first, dense)
    sample(pipe, kind, batch=2)
    sample(pipe, kind, steps=5)
    assert torch.equal(sample(pipe, kind), first)
    handle.remove()
    assert torch.equal(sample(pipe, kind), dense) and "step" not in vars(pipe.scheduler)


def test_sd3_rows_choose_for_themselves():
    pipe = make("sd35")
    handle = dit_accel.accelerate(pipe, region={**REGION, "error_reset": ()})
    chosen = []

    def look(pipe: Any, number: int, time: Any, kwargs: dict) -> dict:
        if handle._sampler._index is not None:
            chosen.append(handle._sampler.chosen())
        return kwargs

    sample(pipe, "sd35", batch=2, callback_on_step_end=look)
    assert len(chosen) == 4 and any(not torch.equal(*index) for index in chosen)


def test_flux_takes_one_picture_at_a_time():
    pipe = make("flux")
    dense = sample(pipe, "flux", batch=2)
    handle = dit_accel.accelerate(pipe, region=REGION)
    assert torch.equal(sample(pipe, "flux", batch=2), dense)
    assert list(handle.report().whole_reasons) == [
        "a batch has one rotary table for all its rows, which would have to share their tokens"
    ]


def test_flux_with_references_computes_everything():
    pipe = tiny_flux_pipeline("FluxKontextPipeline")
    image = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(4))
    call = {"image": image, "_auto_resize": False, "max_area": 120}
    dense = sample(pipe, "flux", **call)
    handle = dit_accel.accelerate(pipe, region=REGION)
    assert torch.equal(sample(pipe, "flux", **call), dense)
    assert "no tokens were chosen" in handle.report().whole_reasons


def test_flux_with_packed_latents_measures_channels():
    from dit_accel.adapters import flux

    latents = torch.randn(1, 4, 10, 12)  # as FluxPipeline packs them
    packed = latents.view(1, 4, 5, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 30, 16)
    cells = flux.patch_velocity(tiny_flux_transformer(), packed, (1, 5, 6))
    assert cells.shape == (1, 30, 4, 4)
    for token, (row, column) in enumerate((r, c) for r in range(5) for c in range(6)):
        place = latents[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1).T  # [P, C]
        assert torch.equal(cells[0, token], place)
