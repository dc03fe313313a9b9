"""What is counted, against the real models at tiny sizes: operations, parameters, tokens and noise levels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("diffusers")
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.estimate.architectures import PUBLISHED, find_architecture
from dit_accel.estimate.count import Work, count_forward
from dit_accel.estimate.full_size import CASES
from dit_accel.estimate.memory import activation_bytes, weight_bytes
from dit_accel.estimate.steps import layer_keeps, noise_levels
from dit_accel.layout import build_layout
from dit_accel.options import SparseOptions
from dit_accel.testing import peak_bytes

NAMES = ["wan-1.3b-480p", "hunyuanvideo-720p", "flux-1024", "sd3.5-large-1024"]
TEXT = 16


class Counting(TorchDispatchMode):
    """Floating-point operations of matrix products and of attention, by torch's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in ("mm", "bmm", "addmm"):
            self.flops["products"] += 2 * out.numel() * given[-2].shape[-1]
        elif name == "convolution":
            self.flops["products"] += 2 * out.numel() * given[1][0].numel()
        elif "scaled_dot_product" in name:
            self.flops["attention"] += 4 * given[0].numel() * given[1].shape[-2]
        return out


def counted(name: str, grid: tuple[int, int, int]) -> Work:
    case = CASES[name].made_tiny()
    return count_forward(replace(PUBLISHED[case.model], config=case.config, text=TEXT), grid, batch=case.batch)


@pytest.mark.parametrize("grid", [(2, 6, 5), (1, 8, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_the_model(building: ModuleType, name: str, grid: tuple[int, int, int]) -> None:
    case = replace(CASES[name].made_tiny(), text=TEXT)
    if case.temporal == 1:
        grid = (1, *grid[1:])
    device, dtype = torch.device("cpu"), torch.float32
    model = building.build_transformer(case, device, dtype, whole=True)
    given = building.at_noise(case, building.make_inputs(case, grid, device, dtype), 0.5)
    with torch.no_grad(), Counting() as counting:
        model(**given)
    work = counted(name, grid)
    assert work.product_flops == counting.flops["products"] > 0
    assert work.cross_flops + work.attention_flops * work.layers == counting.flops["attention"] > 0
    assert sum(work.by_part().values()) == sum(counting.flops.values())


ALIVE = {
    "wan, wide feed-forward": ("wan-1.3b-480p", dict(attention_head_dim=128, ffn_dim=1536)),
    "wan, narrow feed-forward": ("wan-1.3b-480p", dict(attention_head_dim=128, ffn_dim=512)),
    "hunyuan": ("hunyuanvideo-720p", dict(attention_head_dim=128, rope_axes_dim=(16, 56, 56))),
    "flux": ("flux-1024", dict(attention_head_dim=128, axes_dims_rope=(16, 56, 56))),
    "sd3": ("sd3.5-large-1024", dict(attention_head_dim=64, num_attention_heads=4, caption_projection_dim=256)),
}


@pytest.mark.parametrize("name", ALIVE)
def test_the_peak_of_memory_is_that_of_the_model(building: ModuleType, name: str) -> None:
    base, config = ALIVE[name]
    case = CASES[base].made_tiny()
    case = replace(case, config={**case.config, **config}, text=64)
    grid = (1, 32, 32) if case.temporal == 1 else (4, 16, 16)
    device, dtype = torch.device("cpu"), torch.bfloat16
    model = building.build_transformer(case, device, dtype, whole=True)
    given = building.at_noise(case, building.make_inputs(case, grid, device, dtype), 0.5)
    with torch.no_grad():
        peak, _ = peak_bytes(lambda: model(**given))
    published = replace(PUBLISHED[case.model], config=case.config, text=64)
    told = activation_bytes(published, count_forward(published, grid, batch=case.batch))
    print(f"{name}: {told / peak - 1:+.1%}")
    assert told == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("model", PUBLISHED)
def test_weights_are_those_of_the_model_within_1_percent(model: str) -> None:
    import diffusers

    published = PUBLISHED[model]
    with torch.device("meta"):
        built = getattr(diffusers, published.transformer)(**published.config)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert weight_bytes(count_forward(published, (1, 8, 8))) == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.parametrize(
    ("model", "text"), [("tiny-wan", 512), ("tiny-hunyuan", 256), ("tiny-flux", 64), ("tiny-sd3", 96)]
)
def test_a_shipped_model_is_read_from_its_own_files(model: str, text: int) -> None:
    found = find_architecture(model)
    assert found.transformers == 1 and model in found.origin
    assert found.text == text and found.guided == (model != "tiny-hunyuan"), "its guidance is built in"
    assert found.layers == {"tiny-wan": 8, "tiny-hunyuan": 6, "tiny-flux": 10, "tiny-sd3": 5}[model]
    assert found.flow_shift == {"tiny-wan": 5.0, "tiny-hunyuan": 5.0}.get(model, 3.0)


def test_two_attentions_in_a_block_are_refused() -> None:
    medium = replace(
        PUBLISHED["stabilityai/stable-diffusion-3.5-large"],
        config={**PUBLISHED["stabilityai/stable-diffusion-3.5-large"].config, "dual_attention_layers": (0, 1)},
    )
    with pytest.raises(ValueError, match="not counted"):
        count_forward(medium, (1, 8, 8))


def test_noise_levels_are_the_schedulers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    wan, sd3 = PUBLISHED["Wan-AI/Wan2.1-T2V-14B-Diffusers"], PUBLISHED["stabilityai/stable-diffusion-3.5-large"]
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    unipc.set_timesteps(50)
    mine = noise_levels(wan, 50, 5.0, 75600)
    assert mine == pytest.approx((unipc.timesteps / 1000).tolist(), abs=1e-6)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(28)
    assert noise_levels(sd3, 28, None, 4096) == pytest.approx((euler.timesteps / 1000).tolist(), abs=1e-5)
    hunyuan = PUBLISHED["hunyuanvideo-community/HunyuanVideo"]
    euler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    euler.set_timesteps(sigmas=np.linspace(1.0, 0.0, 51)[:-1])  # as HunyuanVideoPipeline
    assert noise_levels(hunyuan, 50, None, 118800) == pytest.approx((euler.timesteps / 1000).tolist(), abs=1e-5)


def test_noise_levels_of_flux_go_by_the_image() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    flux = PUBLISHED["black-forest-labs/FLUX.1-dev"]
    for tokens in (1024, 4096, 16384):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=calculate_shift(tokens))
        assert noise_levels(flux, 28, None, tokens) == pytest.approx((scheduler.timesteps / 1000).tolist(), abs=1e-3)


def test_layers_are_dense_where_the_engine_has_them_dense() -> None:
    rule = {"above": 0.8, "layers": [1], "keep": 0.5}
    options = SparseOptions.from_mapping(
        {"keep": 0.25, "dense_above": 0.9, "dense_below": 0.1, "dense_layers": [0, -1], "rules": [rule]}
    )
    assert layer_keeps(options, 0.95, 4) is None and layer_keeps(options, 0.05, 4) is None
    assert layer_keeps(options, 0.85, 4) == [None, 0.5, 0.25, None]
    assert layer_keeps(options, 0.5, 4) == [None, 0.25, 0.25, None]
    options = SparseOptions(keep=0.25, dense_first=0.1)
    sparse = [layer_keeps(options, 0.5, 1, step=step, steps=28) is not None for step in range(28)]
    assert sparse == [False] * 3 + [True] * 25


@pytest.mark.parametrize("order", ["packed", "tiles"])
def test_blocks_are_those_of_the_layout(order: str) -> None:
    from dit_accel.estimate.keeping import sparse_call

    options = SparseOptions(keep=0.3, order=order)
    for grid in ((21, 30, 52), (1, 64, 64), (5, 9, 7)):
        call, _ = sparse_call(options, 0.3, grid, 0)
        assert call.blocks == build_layout(grid, order, 128, torch.device("cpu")).n_blocks
