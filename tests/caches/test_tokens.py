"""The token cache against a reference that computes every row and keeps what it may, on small real models."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.caches.parts.measures import relative_l1, worst
from dit_accel.caches.parts.rows import chance_of, put_rows, take_rows
from dit_accel.caches.tokens import Cache
from dit_accel.errors import UsageError
from dit_accel.testing import (
    tiny_flux2_transformer,
    tiny_flux_inputs,
    tiny_flux_transformer,
    tiny_framepack_transformer,
    tiny_hunyuan_video15_transformer,
    tiny_hunyuan_video_transformer,
    tiny_ltx_transformer,
    tiny_minimax_h3_transformer,
    tiny_qwen_image_transformer,
    tiny_sd3_inputs,
    tiny_sd3_transformer,
    tiny_wan_inputs,
    tiny_wan_transformer,
)

TOKENS, TEXT = 30, 7  # of image or video, and of text where it is among them


@dataclass(frozen=True)
class Model:
    """A transformer and how to call it at a time from 1000 to 0."""

    make: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    scale: float = 1.0  # of its timesteps

    def step(self, transformer: nn.Module, inputs: dict[str, Any], time: float, branch: str = "cond") -> Tensor:
        given = {**inputs, "hidden_states": inputs["hidden_states"] * (0.5 + time / 2000)}
        given["timestep"] = torch.full((len(given["hidden_states"]),), time * self.scale)
        # SD3's class has no such context: its branches are told by their text
        context = transformer.cache_context(branch) if hasattr(transformer, "cache_context") else nullcontext()
        with torch.no_grad(), context:
            return transformer(**given, return_dict=False)[0]


def _wan(batch: int, **config: Any) -> dict[str, Any]:
    return tiny_wan_inputs(tiny_wan_transformer(**config), (2, 3, 5), batch=batch)


MODELS = {
    "wan": Model(tiny_wan_transformer, _wan),
    "wan-i2v": Model(lambda: tiny_wan_transformer(i2v=True), lambda batch: _wan(batch, i2v=True)),
    "wan-vace": Model(
        lambda: tiny_wan_transformer(vace_layers=[0], vace_in_channels=16),
        lambda batch: _wan(batch, vace_layers=[0], vace_in_channels=16),
    ),
    "flux": Model(
        tiny_flux_transformer,
        lambda batch: tiny_flux_inputs(tiny_flux_transformer(), (5, 6), text=TEXT, batch=batch),
        0.001,
    ),
    "sd3": Model(
        lambda: tiny_sd3_transformer(dual_attention_layers=(0,)),
        lambda batch: tiny_sd3_inputs(tiny_sd3_transformer(), (5, 6), text=TEXT, batch=batch),
    ),
}
CHOICES = [
    {"mlp_ratio": 0.3, "selector": "norm"},
    {"mlp_ratio": 0.3},
    {"mlp_ratio": 0.3, "selector": "staleness"},
    {"mlp_ratio": 0.0},
    {"mlp_ratio": 0.1, "selector": "norm", "max_stale": 2},
]
BLOCKS = ("blocks", "transformer_blocks", "single_transformer_blocks")


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    return [block for name in BLOCKS for block in getattr(transformer, name, ())]


def accelerate(transformer: nn.Module, **options: Any) -> dit_accel.Handle:
    return dit_accel.accelerate(transformer, cache={"name": "tokens", "min_steps": 0, **options})


@dataclass
class Masked:
    """The same by masks: every module of a plain transformer runs on all rows, then kept ones take their place."""

    cache: Cache
    transformer: nn.Module
    reuse: bool = False
    now: int = 0  # the step
    kept: dict[str, Any] = field(default_factory=dict)
    age: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, block in enumerate(blocks_of(self.transformer)):
            single = hasattr(block, "proj_mlp")
            last = "proj_out" if single else "ffn" if hasattr(block, "ffn") else "ff"
            wan = hasattr(block, "ffn")
            for name in ("attn1", "attn", *(() if wan else ("attn2",))):
                if getattr(block, name, None) is not None:
                    getattr(block, name).register_forward_hook(self._holding(f"{layer} {name}"))
            for name in ("attn2", last) if wan else (last,):
                hook = self._mixing(layer, name, f"{layer} {last}", TEXT if single else 0)
                getattr(block, name).register_forward_hook(hook)

    def step(self, model: Model, inputs: dict[str, Any], time: float, reuse: bool) -> Tensor:
        self.reuse, self.rows = reuse, {}
        if not reuse:
            self.age = {}
        output = model.step(self.transformer, inputs, time)
        self.now += 1
        return output

    def _holding(self, key: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if self.reuse:
                return self.kept[key]
            self.kept[key] = output
            return None

        return hook

    def _mixing(self, layer: int, name: str, judge: str, text: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Any:
            key = f"{layer} {name}"
            if self.reuse:
                computed = torch.zeros(output.shape[:2], dtype=torch.bool)
                computed[:, text:].scatter_(1, self._rows(layer, self.kept[judge][:, text:]), True)
                computed[:, :text] = True
                output = torch.where(computed[..., None], output, self.kept[key])
            self.kept[key] = output
            return output

        return hook

    def _rows(self, layer: int, kept: Tensor) -> Tensor:
        if layer not in self.rows:
            age = self.age.get(layer, torch.zeros(kept.shape[:2], dtype=torch.int16)) + 1
            rows = self.rows[layer] = self.cache.choose(kept, age if self.cache.counts_age else None, self.now, layer)
            self.age[layer] = age.scatter(1, rows, 0)
        return self.rows[layer]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_reused_steps_are_those_of_masks(name, choice):
    model, times, schedule = MODELS[name], (900.0, 800.0, 700.0, 600.0, 500.0), "11001"
    inputs = model.inputs(2)
    masked = Masked(Cache(**choice), model.make())
    transformer = model.make()
    handle = accelerate(transformer, schedule=schedule, **choice)
    stock = [model.step(model.make(), inputs, time) for time in times]
    for time, decided, dense in zip(times, schedule, stock, strict=True):
        expected = masked.step(model, inputs, time, decided == "0")
        out = model.step(transformer, inputs, time)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(out, dense) == (decided == "1")
    assert handle.report().forwards == {"computed": 3, "reused": 2}


# Inner layers, and how many rows they see at a reused step that computes 9 of 30 tokens; None: they do not run.
SEEN = {
    "wan": {"blocks.1.attn1.to_q": None, "blocks.1.attn2.to_q": 9, "blocks.1.ffn.net.2": 9},
    "wan-vace": {"blocks.1.attn1.to_q": None, "blocks.1.ffn.net.2": 9, "vace_blocks.0.ffn.net.2": TOKENS},
    "flux": {
        "transformer_blocks.0.attn.to_q": None,
        "transformer_blocks.0.ff.net.2": 9,
        "transformer_blocks.0.ff_context.net.2": TEXT,
        "single_transformer_blocks.1.attn.to_q": None,
        "single_transformer_blocks.1.act_mlp": TEXT + 9,
        "single_transformer_blocks.1.proj_out": TEXT + 9,
    },
    "sd3": {
        "transformer_blocks.0.attn.to_q": None,
        "transformer_blocks.0.attn2.to_q": None,
        "transformer_blocks.0.ff.net.2": 9,
        "transformer_blocks.0.ff_context.net.2": TEXT,
    },
}


@pytest.mark.parametrize("name", SEEN)
def test_modules_see_fewer_rows(name):
    model = MODELS[name]
    transformer, inputs = model.make(), model.inputs(1)
    accelerate(transformer, schedule="10", mlp_ratio=0.3)
    model.step(transformer, inputs, 900)
    seen = dict.fromkeys(SEEN[name])
    for path in seen:
        hook = lambda module, args, path=path: seen.update({path: args[0].shape[1]})  # noqa: E731
        transformer.get_submodule(path).register_forward_pre_hook(hook)
    model.step(transformer, inputs, 800)
    assert seen == SEEN[name]


def test_without_any_row_no_mlp_runs():
    model = MODELS["wan"]
    transformer, inputs = model.make(), model.inputs(1)
    accelerate(transformer, schedule="10", mlp_ratio=0)
    model.step(transformer, inputs, 900)
    for block in transformer.blocks:
        for module in (block.attn1.to_q, block.attn2.to_q, block.ffn.net[0]):
            module.register_forward_pre_hook(lambda module, args: pytest.fail("it ran"))
    model.step(transformer, inputs, 800)


@pytest.mark.parametrize("selector", ["norm", "random", "staleness"])
@pytest.mark.parametrize(("ratio", "bound"), [(0.0, 1), (0.1, 2), (0.1, 3), (0.5, 4)])
def test_no_row_is_older_than_the_bound(selector, ratio, bound):
    """Also where one part of the picture always scores highest."""
    cache = Cache(mlp_ratio=ratio, selector=selector, max_stale=bound)
    kept = torch.linspace(1, 2, 31).view(1, 31, 1).repeat(2, 1, 4)
    age, oldest = torch.zeros(2, 31, dtype=torch.int16), 0
    for step in range(1, 40):
        rows = cache.choose(kept, age + 1, step, 0)
        assert rows.shape == (2, max(math.ceil(ratio * 31), math.ceil(31 / (bound + 1))))
        assert (rows.diff(dim=1) > 0).all()
        age = (age + 1).scatter(1, rows, 0)
        oldest = max(oldest, int(age.max()))
    assert oldest <= bound
    free = Cache(mlp_ratio=0.1, selector="norm")  # without it the lowest rows would stay out for ever
    assert int(free.choose(kept, None, 1, 0).min()) == 31 - 4


def test_the_bound_holds_in_a_run():
    model = MODELS["flux"]
    transformer, inputs = model.make(), model.inputs(2)
    handle = accelerate(transformer, schedule="1" + "0" * 9, mlp_ratio=0.1, max_stale=3)
    ages = []
    for step in range(10):
        model.step(transformer, inputs, 900 - 50 * step)
        memory = handle._caches[0].memory.entry("cond", handle._caches[0].memory._entries["cond"].signature).memory
        ages.append(max((int(age.max()) for age in memory["ages"].values()), default=0))
    assert ages == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3]


def test_the_norm_takes_the_largest():
    kept = torch.tensor([[[3.0, 4], [1, 0], [0, 6], [2, 2]], [[0, 1], [7, 0], [1, 1], [0, 2]]])
    assert Cache(mlp_ratio=0.5, selector="norm").choose(kept, None, 1, 0).tolist() == [[0, 2], [1, 3]]


def test_chance_is_the_same_in_every_run_and_another_at_each_step_and_layer():
    before = torch.get_rng_state()
    cache, kept = Cache(mlp_ratio=0.2, selector="random"), torch.randn(2, 50, 4, generator=torch.Generator())
    one = cache.choose(kept, None, 3, 1)
    assert torch.equal(one, cache.choose(-kept, None, 3, 1)) and torch.equal(one[0], one[1])
    assert not torch.equal(one, cache.choose(kept, None, 4, 1))
    assert not torch.equal(one, cache.choose(kept, None, 3, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert abs(float(chance_of(4000, 1, 1, kept.device).mean()) - 0.5) < 0.02


def test_rows_are_taken_and_put_back():
    x, rows = torch.arange(24.0).view(2, 4, 3), torch.tensor([[0, 2], [1, 3]])
    some = take_rows(x, rows)
    assert torch.equal(some, torch.stack([x[0, [0, 2]], x[1, [1, 3]]]))
    changed = put_rows(x, rows, -some)
    assert torch.equal(changed[0], torch.stack([-x[0, 0], x[0, 1], -x[0, 2], x[0, 3]]))
    assert torch.equal(take_rows(changed, rows), -some) and float(x.min()) == 0


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("name", ["wan", "flux", "sd3"])
def test_batch_rows_come_out_as_alone(name, choice):
    model = MODELS[name]
    inputs = model.inputs(2)

    def run(given: dict[str, Any]) -> list[Tensor]:
        transformer = model.make()
        accelerate(transformer, schedule="1001", **choice)
        return [model.step(transformer, given, time) for time in (900.0, 800.0, 700.0, 600.0)]

    both = run(inputs)
    for row in range(2):
        alone = run({key: x if "_ids" in key else x[row : row + 1] for key, x in inputs.items()})
        for one, two in zip(alone, both, strict=True):
            torch.testing.assert_close(one[0], two[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", [{}, {"max_stale": 2}], ids=str)
@pytest.mark.parametrize("name", ["wan", "flux", "sd3"])
def test_memory_is_what_was_declared(name, choice):
    model = MODELS[name]
    transformer, inputs = model.make(), model.inputs(2)
    handle = accelerate(transformer, schedule="110101", **choice)
    engine, held = handle._caches[0], []
    other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    for step in range(6):
        for branch, given in (("cond", inputs), ("uncond", other)):
            out = model.step(transformer, given, 900 - 100 * step, branch)
        held.append(handle.report().bytes_held)
    joint = 0 if name == "wan" else 2 * TEXT
    assert max(held) == 2 * engine.declare(tuple(out.shape), 2 * TOKENS, joint, 4)
    tensors = {"wan": 2 * 3, "flux": 1 * 2 + 2 * 2, "sd3": 3 + 2}[name]
    assert max(held) >= 2 * tensors * 2 * TOKENS * 4 * {"wan": 24, "flux": 32, "sd3": 32}[name]
    handle.remove()
    assert engine.bytes_held() == 0


def test_a_dry_run_knows_the_true_error():
    model = MODELS["flux"]
    inputs, times = model.inputs(1), (900.0, 800.0, 700.0)
    stock = [model.step(model.make(), inputs, time) for time in times]
    transformer = model.make()
    accelerate(transformer, schedule="110", mlp_ratio=0.3)
    made = [model.step(transformer, inputs, time) for time in times][-1]
    dry = model.make()
    handle = accelerate(dry, dry_run=True, warmup=2, mlp_ratio=0.3)
    assert all(torch.equal(model.step(dry, inputs, time), x) for time, x in zip(times, stock, strict=True))
    assert handle.trials()[-1].error == pytest.approx(worst(relative_l1(made, stock[-1])), rel=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_run_broken_off_inside_a_layer_leaves_nothing(at):
    model, times = MODELS["wan"], (900.0, 800.0, 700.0, 600.0)
    inputs, transformer = model.inputs(1), model.make()
    handle = accelerate(transformer, schedule="1001", mlp_ratio=0.3, max_stale=2)
    fresh = [model.step(transformer, inputs, time) for time in times]
    calls = [0]

    def stop(module: nn.Module, args: tuple) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise Stop

    hook = transformer.blocks[at % 2].ffn.net[2].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        for time in (*times, *times):
            model.step(transformer, inputs, time)
    hook.remove()
    assert handle.report().bytes_held == 0
    assert all(torch.equal(model.step(transformer, inputs, time), x) for time, x in zip(times, fresh, strict=True))


def test_modules_that_take_anothers_place_are_followed():
    """As where a LoRA is loaded: the projection within it must not be asked for single rows."""
    model = MODELS["flux"]
    inputs, transformer = model.inputs(1), model.make()
    handle = accelerate(transformer, schedule="100000", mlp_ratio=0.3)
    model.step(transformer, inputs, 900), model.step(transformer, inputs, 800)
    former = [block.proj_out for block in transformer.single_transformer_blocks]
    for block in transformer.single_transformer_blocks:
        inner, low = block.proj_out, nn.Linear(block.proj_out.in_features, 32, bias=False)
        block.proj_out = _Sum(inner, low)
    out = model.step(transformer, inputs, 700)
    assert handle.report().computed_reasons == {"the branch's first step": 2}
    reused = model.step(transformer, inputs, 600)
    handle.remove()
    assert torch.equal(out, model.step(transformer, inputs, 700))
    assert not torch.equal(reused, model.step(transformer, inputs, 600))
    for module in (*former, *transformer.modules()):
        assert "forward" not in module.__dict__


def test_a_block_that_was_left_out_is_computed():
    model = MODELS["wan"]
    inputs, transformer = model.inputs(1), model.make()
    accelerate(transformer, schedule="100")
    blocks, ran = list(transformer.blocks), []
    for layer, block in enumerate(blocks):
        block.attn1.to_q.register_forward_hook(lambda module, args, output, layer=layer: ran.append(layer))
    transformer.blocks = nn.ModuleList(blocks[:1])
    model.step(transformer, inputs, 900)
    transformer.blocks = nn.ModuleList(blocks)
    model.step(transformer, inputs, 800), model.step(transformer, inputs, 700)
    assert ran == [0, 1]


def test_skip_layer_guidance_is_a_branch_of_its_own():
    """It leaves out blocks at every step, so that the same are kept and reused."""
    model = MODELS["sd3"]
    inputs = {**model.inputs(1), "skip_layers": [0]}
    masked, transformer = Masked(Cache(mlp_ratio=0.3), model.make()), model.make()
    handle = accelerate(transformer, schedule="100", mlp_ratio=0.3)
    for time, reuse in ((900.0, False), (800.0, True), (700.0, True)):
        expected = masked.step(model, inputs, time, reuse)
        torch.testing.assert_close(model.step(transformer, inputs, time), expected, rtol=1e-5, atol=1e-5)
    assert handle.report().forwards == {"computed": 1, "reused": 2}


def test_what_a_controlnet_adds_is_added_once():
    model = MODELS["flux"]
    inputs = model.inputs(1)
    for time, name in enumerate(("controlnet_block_samples", "controlnet_single_block_samples")):
        control = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(time))
        inputs[name] = [control, -control] if "single" in name else [control]
    masked, transformer = Masked(Cache(mlp_ratio=0.3), model.make()), model.make()
    handle = accelerate(transformer, schedule="10", mlp_ratio=0.3)
    for time, reuse in ((900.0, False), (800.0, True)):
        expected = masked.step(model, inputs, time, reuse)
        torch.testing.assert_close(model.step(transformer, inputs, time), expected, rtol=1e-5, atol=1e-5)
    assert handle.report().forwards == {"computed": 1, "reused": 1}


def test_compiled_blocks_give_the_same():
    model, times = MODELS["wan"], (900.0, 800.0)
    inputs, outs = model.inputs(1), []
    for compiled in (False, True):
        transformer = tiny_wan_transformer(num_layers=1)
        accelerate(transformer, schedule="10", mlp_ratio=0.3)
        if compiled:
            torch._dynamo.reset()
            transformer.compile_repeated_blocks(backend="eager")
        outs.append([model.step(transformer, inputs, time) for time in times])
    torch._dynamo.reset()
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


class _Sum(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


def test_mlps_in_chunks_are_computed():
    model = MODELS["sd3"]
    inputs, transformer = model.inputs(2), model.make()
    handle = accelerate(transformer, mlp_ratio=0.3, interval=9, warmup=1)
    transformer.enable_forward_chunking(1, 0)
    for time in (900, 800):
        model.step(transformer, inputs, time)
    assert handle.report().computed_reasons == {"MLPs run in chunks: their tokens are not seen at once": 2}
    transformer.disable_forward_chunking()


@pytest.mark.parametrize(
    "make",
    [
        tiny_flux2_transformer, tiny_framepack_transformer, tiny_hunyuan_video_transformer,
        tiny_hunyuan_video15_transformer, tiny_ltx_transformer, tiny_minimax_h3_transformer,
        tiny_qwen_image_transformer,
    ],
)  # fmt: skip
def test_other_families_say_what_serves_them(make):
    transformer = make()
    with pytest.raises(UsageError, match="easy or latent"):
        dit_accel.accelerate(transformer, cache="tokens")
    assert not any("_diffusers_hook" in module.__dict__ for module in transformer.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_ratio": 1.5}, "mlp_ratio=1.5 is out of range: a share from 0 to 1"),
        ({"selector": "attention"}, "selector='attention' is out of range: 'random', 'norm', 'staleness'"),
        ({"max_stale": 0}, "max_stale=0 is out of range"),
        ({"interval": 0}, "interval=0 is out of range"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        Cache(**options)
