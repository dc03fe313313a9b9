"""What is run under context parallelism: by one process alone, and by two that share the work.

Each case makes a tiny model, splits it if it is told to, runs it and returns what came out and what was counted. Run as
a script (rank, folder), this module is one of two processes; it runs every case and writes what each returned, or how
it ended, into the folder.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ContextParallelConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dit_accel
from dit_accel import SparseProcessor
from dit_accel.adapters import parallel as exchange
from dit_accel.errors import DitAccelError
from dit_accel.kernels import block_sparse as kernels
from dit_accel.methods import load_method, sla
from dit_accel.methods.parts.budget import choose_blocks
from dit_accel.methods.parts.plans import plan_of
from dit_accel.methods.parts.score import block_means, mean_scores
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.trained import Trained
from dit_accel.sla.weights import LayerWeights, SlaWeights
from dit_accel.testing import (
    tiny_flux_inputs,
    tiny_flux_pipeline,
    tiny_flux_transformer,
    tiny_wan_inputs,
    tiny_wan_pipeline,
    tiny_wan_transformer,
)

GRID = (3, 6, 8)  # 144 tokens, 72 for each of two processes: the cut goes through a block of 16
ORDERS = ("raster", "tiles")
FIRST = ("split", "processor")  # what is installed first
WORLD = 2
SECONDS = 60  # after which a process that waits for the other gives up

ULYSSES = {"ulysses_degree": WORLD}
ANYTHING = {"ulysses_degree": WORLD, "ulysses_anything": True}
RING = {"ring_degree": WORLD}


@dataclass(frozen=True)
class Remember:
    """A method with memory: half of each score is that of the step before."""

    keep: float

    def init_state(self, query: torch.Tensor, layout: Any) -> dict[str, Any]:
        return {"scores": None}

    def predict(self, query: torch.Tensor, key: torch.Tensor, layout: Any, call: Any, state: Any) -> Any:
        scores = mean_scores(query, block_means(key, layout), layout)
        if state["scores"] is not None:
            scores = (scores + state["scores"]) / 2
        state["scores"] = scores
        return plan_of(*choose_blocks(scores, None, self.keep), layout)


@dataclass(frozen=True)
class LinearFirst(sla.Method):
    """SLA with random projections, whose first layer is linear attention alone."""

    def weights_for(self, transformer: nn.Module, layers: Any, arrangement: Any, role: str) -> Trained:
        generator, shape = torch.Generator().manual_seed(0), attention_shape(transformer)
        size = shape.head_size
        spec = SlaSpec(len(shape.layers), size, keep=self.keep, linear_layers=(0,))
        shapes = (size, size), (size,)
        made = {n: LayerWeights(*(torch.randn(shape, generator=generator) for shape in shapes)) for n in layers}
        return Trained(SlaWeights(spec, made), transformer, layers, "linear")


def split(transformer: nn.Module, degrees: dict[str, Any] = ULYSSES, plan: Any = None) -> None:
    """`enable_parallelism` on CPUs, where diffusers finds no device and divides by how many there are."""
    config = ContextParallelConfig(**degrees)
    config.mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    with patch("torch.accelerator.device_count", return_value=1):
        transformer.enable_parallelism(config=config, cp_plan=plan)


def sparse(transformer: nn.Module, method: Any = "pooled", **options: Any) -> SparseProcessor:
    """Set a strict SparseProcessor with small blocks."""
    options = {"block": 16, "min_tokens": 0, "strict": True, **options}
    processor = SparseProcessor(transformer, method, **options)
    transformer.set_attn_processor(processor)
    return processor


def forward(transformer: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = transformer(**inputs, return_dict=False)[0]
    return out.clone()  # FLUX ends with a gather that nothing has waited for; any operation does


def wan() -> tuple[nn.Module, dict[str, Any]]:
    transformer = tiny_wan_transformer()
    return transformer, tiny_wan_inputs(transformer, GRID, batch=2)


def wan_i2v() -> tuple[nn.Module, dict[str, Any]]:
    transformer = tiny_wan_transformer(i2v=True)
    return transformer, tiny_wan_inputs(transformer, GRID)


def wan_per_token() -> tuple[nn.Module, dict[str, Any]]:
    """A timestep for each token, as Wan 2.2's 5B model has."""
    transformer, inputs = wan()
    inputs["timestep"] = torch.randint(0, 1000, (2, 144), generator=torch.Generator().manual_seed(0))
    return transformer, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    transformer = tiny_flux_transformer()
    return transformer, tiny_flux_inputs(transformer, (8, 8), text=16)


MODELS = (wan, wan_i2v, wan_per_token, flux)


def run_stock(parallel: bool, *, model: Callable) -> dict[str, Any]:
    """diffusers alone."""
    transformer, inputs = model()
    if parallel:
        split(transformer)
    return {"out": forward(transformer, inputs)}


def run_whole(parallel: bool, *, model: Callable, order: str, first: str) -> dict[str, Any]:
    """Everything is read, through the sparse kernel; then the processor is removed."""
    transformer, inputs = model()
    stock = dict(transformer.attn_processors)
    if parallel and first == "split":
        split(transformer)
    processor = sparse(transformer, keep=1.0, order=order)
    if parallel and first == "processor":
        split(transformer)
    out, report = forward(transformer, inputs), processor.report.to_dict()
    processor.remove()
    assert dict(transformer.attn_processors) == stock
    return {"out": out, "removed": forward(transformer, inputs), "report": report}


def run_sampled(
    parallel: bool,
    *,
    method: Callable[[], Any],
    first: str = "processor",
    degrees: dict[str, Any] = ULYSSES,
    heads: int = 2,
    size: tuple[int, int] = (96, 128),
    **options: Any,
) -> dict[str, Any]:
    """A pipeline's guided run of three steps: both branches, and a share of the blocks."""
    pipe = tiny_wan_pipeline(transformer={"num_attention_heads": heads})
    if parallel and first == "split":
        split(pipe.transformer, degrees)
    processor = sparse(pipe.transformer, method(), **options)
    if parallel and first == "processor":
        split(pipe.transformer, degrees)
    out = pipe(
        "a red star", "blurry", *size, num_frames=9, num_inference_steps=3, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    return {"out": out, "report": processor.report.to_dict()}


def run_dense(
    parallel: bool, *, model: Callable, degrees: dict[str, Any] = ULYSSES, own_plan: bool = False
) -> dict[str, Any]:
    """A split under which sparse attention is not exact: with strict=False, then with strict=True."""
    transformer, inputs = model()
    # a user's own plan, which leaves the timesteps whole
    plan = {name: part for name, part in transformer._cp_plan.items() if name} if own_plan else None
    if parallel:
        split(transformer, degrees, plan)
    processor = sparse(transformer, keep=0.5, strict=False)
    result: dict[str, Any] = {}
    try:
        result["out"] = forward(transformer, inputs)
    except (
        ValueError
    ) as error:  # torch's own attention is diffusers' only one on a CPU, and gives no lse for a ring
        result["host_error"] = str(error)
    result["report"] = processor.report.to_dict()
    sparse(transformer, keep=0.5, strict=True)
    return result | _error_of(transformer, inputs)


REGION = {"sample_ratio": 0.5, "bucket": 8, "start": 2, "error_reset": ()}
REGION_STEPS = 6  # of which the first two and the last compute every token


def run_region(
    parallel: bool,
    *,
    region: dict[str, Any],
    per_token: bool = False,
    experts: bool = False,
    aborted: bool = False,
    **sparse: Any,
) -> dict[str, Any]:
    """A pipeline's guided run under region sampling; perhaps behind one that broke off."""
    pipe = tiny_wan_pipeline(two_experts=experts)
    pipe.register_to_config(expand_timesteps=per_token)
    handle = dit_accel.accelerate(pipe, region={**REGION, **region}, **sparse)
    if parallel:
        split(pipe.transformer)
        if experts:
            split(pipe.transformer_2)
    chosen: list[torch.Tensor] = []

    def look(pipe: Any, step: int, time: Any, given: dict) -> dict:
        if handle._sampler._index is not None:
            chosen.append(handle._sampler.chosen().clone())
        return given

    def stop(pipe: Any, step: int, time: Any, given: dict) -> dict:
        if step == 2:
            raise KeyboardInterrupt
        return given

    def run(seed: int, call: Callable) -> torch.Tensor:
        return pipe(
            "a red star", "blurry", 96, 128, num_frames=9, num_inference_steps=REGION_STEPS, output_type="latent",
            generator=torch.Generator().manual_seed(seed), callback_on_step_end=call,
        ).frames  # fmt: skip

    if aborted:
        try:
            run(1, stop)
        except KeyboardInterrupt:
            handle.report(clear=True)
    out, declared = run(0, look), handle._engines[0].region.declare(1, 144, 0, 4)
    return {"out": out, "chosen": chosen, "report": handle.report().to_dict(), "declared": declared}


def run_region_with_text(parallel: bool) -> dict[str, Any]:
    """FLUX, whose self-attention sees text: under a split every token is computed."""
    pipe = tiny_flux_pipeline()
    handle = dit_accel.accelerate(pipe, region={**REGION, "sample_ratio": 1.0 if not parallel else 0.5})
    if parallel:
        split(pipe.transformer)
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    text = torch.randn(1, 16, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
    out = pipe(
        prompt_embeds=text, pooled_prompt_embeds=pooled, height=16, width=16, num_inference_steps=4,
        output_type="latent", generator=generator,
    ).images  # fmt: skip
    return {"out": out, "report": handle.report().to_dict()}


def run_faulty(parallel: bool) -> dict[str, Any]:
    """All is read, and the last process's kernel gives no numbers in its first call; two forwards of one run."""
    transformer, inputs = wan()
    rank = WORLD - 1
    if parallel:
        split(transformer)
        rank = torch.distributed.get_rank()
    processor, execute, left = sparse(transformer, keep=1.0, strict=False), kernels.block_sparse, [rank]

    def spoil(*args: Any, **known: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = execute(*args, **known)
        if left[0]:
            left[0] = 0
            out[..., 0] = torch.nan
        return out, lse

    with patch.object(kernels, "block_sparse", spoil):
        outs = [forward(transformer, inputs) for _ in range(2)]
    return {"outs": outs, "fallbacks": processor.report.fallbacks, "sparse": processor.report.sparse_calls}


def run_agreed(parallel: bool) -> dict[str, Any]:
    """What processes say that differ."""
    transformer, _ = wan()
    rank = 0
    if parallel:
        split(transformer)
        rank = torch.distributed.get_rank()
    chosen = exchange.as_first(transformer, torch.tensor([[3, 5]]) + rank)
    return {"chosen": chosen, "least": exchange.least(transformer, 7 - rank, torch.device("cpu"))}


def run_set_anew(parallel: bool) -> dict[str, Any]:
    """Processors that were set after the split know nothing of it."""
    transformer, inputs = wan()
    if parallel:
        split(transformer)
    transformer.set_attn_processor(WanAttnProcessor())
    sparse(transformer, keep=1.0)
    return _error_of(transformer, inputs)


def _error_of(transformer: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    try:
        forward(transformer, inputs)
    except DitAccelError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


REMEMBER = partial(Remember, 0.3)
# A budget of its own for each head, orders of its own, learnt from the kernel, drawn by lot.
METHODS: dict[str, Callable[[], Any]] = {
    "sparge": partial(load_method, "sparge", keep=0.3),
    "svg2": partial(load_method, "svg2", keep=0.3),
    "lite": partial(load_method, "lite", threshold=0.0, neighbours=None),
    "random": partial(load_method, "random", keep=0.3),
}
WHOLE = {
    **{f"whole {order}, {first} first": (wan, order, first) for order in ORDERS for first in FIRST},
    "whole, image to video": (wan_i2v, "tiles", "split"),
    "whole, timestep per token, raster": (wan_per_token, "raster", "split"),
    "whole, timestep per token, tiles": (wan_per_token, "tiles", "processor"),
}
DENSE = {
    "ring": (partial(run_dense, model=wan, degrees=RING), "context parallelism by ring attention"),
    "text": (partial(run_dense, model=flux), "context parallelism mixes text and video"),
    "own plan": (
        partial(run_dense, model=wan, own_plan=True),
        "context parallelism by another plan than the model's own",
    ),
}

BY_BLOCKS = {"method": "pooled", "keep": 0.5, "order": "packed", "block": 16, "min_tokens": 0}
REGIONS: dict[str, dict[str, Any]] = {
    "tokens": {"region": {}},
    "tokens behind a run that broke off": {"region": {}, "aborted": True},
    "tokens, those left out dropped": {"region": {"keys": "drop"}},
    "tokens, the last layer's keys": {"region": {"layers": 1, "selector": "change", "sample_ratio": 0.25}},
    "tokens, a timestep each": {"region": {"selector": "random"}, "per_token": True},
    "tokens, two experts": {"region": {"start": 1, "transformer": {"sample_ratio": 0.25}}, "experts": True},
    "tokens beside sparse attention": {"region": {}, **BY_BLOCKS},
    "tokens, kernels of our own": {"region": {}, **BY_BLOCKS, "dense_above": 0.0, "dense": "fastest"},
    "blocks": {"region": {"unit": "block"}, **BY_BLOCKS, "share_plans": True},
    "blocks by lot": {"region": {"unit": "block"}, **BY_BLOCKS, "method": "random"},
}
UNEVEN = {"sample_ratio": 71 / 144, "bucket": 1}  # 71 tokens

Case = Callable[[bool], dict[str, Any]]
CASES: dict[str, Case] = {
    **{f"stock {model.__name__}": partial(run_stock, model=model) for model in MODELS},
    **{
        name: partial(run_whole, model=model, order=order, first=first)
        for name, (model, order, first) in WHOLE.items()
    },
    **{
        f"sampled {order}, {first} first": partial(
            run_sampled, method=REMEMBER, order=order, first=first, heads=4
        )
        for order in ORDERS
        for first in FIRST
    },
    **{f"sampled by {name}": partial(run_sampled, method=method) for name, method in METHODS.items()},
    "sampled, plans carried over": partial(run_sampled, method=REMEMBER, predict_every=2),
    # Three heads cannot be shared out evenly. Nor could an odd number of tokens, but gloo gathers equal parts only.
    "sampled, three heads": partial(run_sampled, method=METHODS["random"], degrees=ANYTHING, heads=3),
    "linear layers": partial(run_sampled, method=partial(LinearFirst, 0.3), heads=4),
    **{f"dense by {name}": case for name, (case, _) in DENSE.items()},
    **{f"region by {name}": partial(run_region, **given) for name, given in REGIONS.items()},
    "region, tokens that two cannot share": partial(run_region, region=UNEVEN),
    "region, text among the tokens": run_region_with_text,
    "one is faulty": run_faulty,
    "agreed": run_agreed,
    "processors set anew": run_set_anew,
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=SECONDS),
    )
    for name, case in CASES.items():
        try:
            result = case(True)
        except Exception:
            (folder / f"crash {rank}").write_text(f"in case {name!r}: {traceback.format_exc()}")
            break  # the other process may wait for this one, and is told so by its end
        torch.save(result, folder / f"{name} {rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
