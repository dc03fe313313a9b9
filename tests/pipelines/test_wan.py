"""The Wan recipe on random weights: stock pipeline, stock result, and an aborted run that leaves no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.pipelines import wan
from dit_accel.preset import GenerateOptions

SMALL = GenerateOptions(width=64, height=64, frames=5, steps=2, guidance=3.0, negative_prompt="grey")
SPARSE = dict(method="pooled", keep=0.5, block=16, min_tokens=0)


def processors(pipe: object) -> list[int]:
    return [id(p) for t in (pipe.transformer, pipe.transformer_2) if t for p in t.attn_processors.values()]


@pytest.mark.parametrize("which", ["wan21_folder", "wan22_folder"])
def test_the_result_is_the_stock_pipelines(which: str, request: pytest.FixtureRequest) -> None:
    from diffusers import WanPipeline

    folder = request.getfixturevalue(which)
    frames = wan.generate(wan.load(folder), SMALL, "a red star", seed=3)
    assert frames.dtype == np.uint8 and frames.shape == (5, 64, 64, 3)
    stock = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    video = stock(
        prompt="a red star",
        negative_prompt="grey",
        width=64,
        height=64,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
    ).frames[0]
    assert np.array_equal(frames, np.rint(video * 255).astype(np.uint8))


def test_dtype_and_device_follow_the_machine(wan21_folder: Path) -> None:
    assert wan.load(wan21_folder, device="cpu").transformer.dtype == torch.float32
    pipe = wan.load(wan21_folder, device="cpu", dtype="bfloat16")
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert pipe.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert wan.generate(pipe, SMALL, "x", seed=0).shape == (5, 64, 64, 3)


def test_flow_shift_reaches_the_scheduler(wan21_folder: Path) -> None:
    pipe = wan.load(wan21_folder, flow_shift=7.0)
    assert pipe.scheduler.config.flow_shift == 7.0
    pipe.scheduler.set_timesteps(10)
    sigma = 0.5 * 7 / (1 + 0.5 * 6)
    assert min(abs(float(s) - sigma) for s in pipe.scheduler.sigmas) < 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(dtype="float8"), UsageError, "one of auto, float32"),
        (dict(device="gpu"), UsageError, "write cpu, cuda"),
        (dict(offload="disk"), UsageError, "one of none, model, group"),
        (dict(offload="model", device="cpu"), UsageError, "on the CPU use 'none'"),
        (dict(loras=["none.safetensors"]), EnvironmentProblem, "no LoRA at none"),
        (dict(loras=["x=strong"]), UsageError, "is no strength"),
        (dict(loras=["high:x.safetensors"]), EnvironmentProblem, "no LoRA at x"),
    ],
)
def test_options_that_cannot_be(wan21_folder: Path, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        wan.load(wan21_folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_gpu_that_is_not_there(wan21_folder: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="sees no GPU here; use --device cpu"):
        wan.load(wan21_folder, device="cuda")


def test_illegal_sizes_are_refused_by_generate_too(wan21_folder: Path) -> None:
    pipe = wan.load(wan21_folder)
    with pytest.raises(UsageError, match="nearest is 64x64"):
        wan.generate(pipe, GenerateOptions(width=65, height=64, frames=5, steps=1), "x", seed=0)
    with pytest.raises(UsageError, match="one transformer"):
        wan.generate(
            pipe, GenerateOptions(width=64, height=64, frames=5, steps=1, guidance_2=2.0), "x", seed=0
        )


@pytest.mark.parametrize("which", ["wan21_folder", "wan22_folder"])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_run_after_an_aborted_one_equals_a_fresh_one(
    which: str, stop_at: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    fresh = wan.load(folder)
    with dit_accel.accelerate(fresh, None, **SPARSE):
        expected = wan.generate(fresh, SMALL, "a red star", seed=3)
    pipe = wan.load(folder)
    before = processors(pipe)

    def stop(done: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with dit_accel.accelerate(pipe, None, **SPARSE) as handle:
        with pytest.raises(KeyboardInterrupt):
            wan.generate(pipe, SMALL, "another prompt", seed=9, callback=stop)
        assert np.array_equal(wan.generate(pipe, SMALL, "a red star", seed=3), expected)
        assert handle.report().sparse_calls > 0
    assert processors(pipe) == before
    with pytest.raises(KeyboardInterrupt), dit_accel.accelerate(pipe, None, **SPARSE):
        wan.generate(pipe, SMALL, "another prompt", seed=9, callback=stop)
    assert processors(pipe) == before


def test_group_offload_gives_the_same_clip(wan21_folder: Path) -> None:
    """On a CPU the layers go from main memory to main memory: slow and useless, but the same hooks."""
    plain = wan.generate(wan.load(wan21_folder), SMALL, "a red star", seed=3)
    pipe = wan.load(wan21_folder)
    wan.place(pipe, torch.device("cpu"), "group")
    assert np.array_equal(wan.generate(pipe, SMALL, "a red star", seed=3), plain)
    with dit_accel.accelerate(pipe, None, **SPARSE) as handle:
        wan.generate(pipe, SMALL, "a red star", seed=3)
        assert handle.report().sparse_calls > 0


def make_lora(folder: Path, pipe: object, *, scale: float = 3.0) -> Path:
    """A LoRA of rank 4 on the query and value projections, saved as diffusers saves it."""
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return next(folder.glob("*.safetensors"))


def test_loras_change_the_result_by_their_strength(
    wan21_folder: Path, wan22_folder: Path, tmp_path: Path
) -> None:
    file = make_lora(tmp_path / "style", wan.load(wan21_folder))
    clips = {
        loras: wan.generate(wan.load(wan21_folder, loras=loras), SMALL, "x", seed=3).astype(int)
        for loras in ((), (f"{file}=0",), (f"{file}=0.5",), (str(file),), (str(file.parent), f"{file}=0"))
    }
    plain, none, half, full, two = clips.values()
    assert np.array_equal(plain, none)
    assert not np.array_equal(plain, half) and not np.array_equal(half, full)
    assert np.array_equal(two, full)
    with pytest.raises(UsageError, match="one transformer"):
        wan.load(wan21_folder, loras=[f"low:{file}"])
    for lora, active in (
        (str(file), (True, True)),
        (f"high:{file}", (True, False)),
        (f"low:{file}", (False, True)),
    ):
        pipe = wan.load(wan22_folder, loras=[lora])
        assert (
            tuple(bool(getattr(t, "peft_config", {})) for t in (pipe.transformer, pipe.transformer_2))
            == active
        )


def test_a_lora_that_does_not_fit(wan21_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"transformer.nothing.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "odd.safetensors")
    with pytest.raises(EnvironmentProblem, match="LoRA .*odd.safetensors"):
        wan.load(wan21_folder, loras=[str(tmp_path / "odd.safetensors")])
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(EnvironmentProblem, match="corrupt weights"):
        wan.load(wan21_folder, loras=[str(tmp_path / "bad.safetensors")])
    (tmp_path / "bad.bin").write_bytes(b"nonsense")
    with pytest.raises(EnvironmentProblem, match=r"not a \.safetensors file"):
        wan.load(wan21_folder, loras=[str(tmp_path / "bad.bin")])
