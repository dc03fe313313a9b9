"""Wan 2.1 and 2.2 text-to-video: load, schedule, run. The denoising loop is diffusers' own WanPipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_accel.errors import DitAccelError, EnvironmentProblem, UsageError
from dit_accel.pipelines.weights import SizeRule, check_safetensors, expect, locate, read_json

if TYPE_CHECKING:
    from diffusers import WanPipeline

    from dit_accel.preset import GenerateOptions

OFFLOADS = ("none", "model", "group")
DTYPES = ("float32", "bfloat16", "float16")
# AutoencoderKLWan's own defaults, for a config written before they were config values.
_SPATIAL, _TEMPORAL = 8, 4
# WanPipeline refuses sides that 16 does not divide, whatever the model.
_PIPELINE_STEP = 16


def find(model: str, *, download: bool = True) -> Path:
    """The local folder of a Wan text-to-video model, its files judged. Imports no torch.

    Raises:
        EnvironmentProblem: not found, incomplete or corrupt.
        UnknownModelError: a pipeline or transformer that this recipe does not drive.
    """
    folder = locate(model, download=download)
    expect(folder, "wan", ("WanPipeline",), ("WanTransformer3DModel",))
    return folder


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    vae = read_json(folder / "vae" / "config.json", "the size rule")
    dit = read_json(folder / "transformer" / "config.json", "the size rule")
    spatial, temporal = vae.get("scale_factor_spatial", _SPATIAL), vae.get("scale_factor_temporal", _TEMPORAL)
    return _rule(spatial, temporal, dit.get("patch_size", (1, 2, 2)))


def size_rule_of(pipe: WanPipeline) -> SizeRule:
    """What a loaded pipeline can make."""
    transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
    return _rule(pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal, transformer.config.patch_size)


def _rule(spatial: int, temporal: int, patch: Sequence[int]) -> SizeRule:
    return SizeRule(
        width_step=math.lcm(_PIPELINE_STEP, spatial * patch[2]),
        height_step=math.lcm(_PIPELINE_STEP, spatial * patch[1]),
        frame_step=math.lcm(temporal, temporal * patch[0]),
    )


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    flow_shift: float | None = None,
    loras: Sequence[str] = (),
) -> WanPipeline:
    """Load a stock WanPipeline, ready to run.

    Args:
        model: shipped name, folder or hub id.
        device: a torch device, or "auto": the first GPU, else the CPU.
        dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 on a GPU; float32 on a CPU, where
            bfloat16 is about three times slower. The VAE always runs in float32, as Wan's documentation asks.
        offload: "none", "model" (whole components wait in main memory) or "group" (layers do).
        flow_shift: shift of the noise schedule; None leaves the model's own.
        loras: LoRA files or folders, each with an optional strength: `style.safetensors=0.8`.

    Raises:
        EnvironmentProblem: model, device or dependency missing, weights corrupt.
        UsageError: an option that cannot be.
    """
    folder = find(str(model))
    try:
        import torch
        from diffusers import WanPipeline
    except ImportError as error:
        raise EnvironmentProblem(f"{error}: pip install 'dit-accel[diffusers]'") from error
    where = pick_device(device)
    kind = _pick_dtype(dtype, where)
    if offload not in OFFLOADS:
        raise UsageError(f"offload {offload!r}: one of {', '.join(OFFLOADS)}")
    if offload != "none" and where.type == "cpu":
        raise UsageError(
            f"offload {offload!r} moves weights between a GPU and main memory; on the CPU use 'none'"
        )
    try:
        pipe = WanPipeline.from_pretrained(
            str(folder),
            dtype={"default": kind, "vae": torch.float32},
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise EnvironmentProblem(f"cannot load {folder}: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    _set_flow_shift(pipe, flow_shift)
    _load_loras(pipe, loras)
    place(pipe, where, offload)
    return pipe


def pick_device(device: str) -> Any:
    """The torch device for a name; "auto" takes the first GPU, else the CPU."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r}: write cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"device {device!r}: torch {torch.__version__} sees no GPU here; use --device cpu"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"device {device!r}: there are {torch.cuda.device_count()} GPUs, counted from 0"
        )
    return chosen


def _pick_dtype(dtype: str, device: Any) -> Any:
    import torch

    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: one of auto, {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _set_flow_shift(pipe: WanPipeline, shift: float | None) -> None:
    if shift is None:
        return
    names = [name for name in ("flow_shift", "shift") if name in pipe.scheduler.config]
    if not names:
        raise UsageError(f"flow_shift={shift}: {type(pipe.scheduler).__name__} has no shift; leave it out")
    if pipe.scheduler.config[names[0]] != shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{names[0]: shift})


def _load_loras(pipe: WanPipeline, loras: Sequence[str]) -> None:
    """Load every LoRA, then switch all of them on, each at its strength.

    A Wan 2.2 model has two experts: `high:FILE` and `low:FILE` go to one of them, a plain FILE to both.
    """
    strengths: dict[str, dict[str, float]] = {"high": {}, "low": {}}
    for n, lora in enumerate(loras):
        expert, file, strength = _parse_lora(lora)
        if expert and pipe.transformer_2 is None:
            raise UsageError(f"--lora {lora}: this model has one transformer; leave out {expert!r}:")
        experts = ("high", "low") if pipe.transformer_2 is not None else ("high",)
        for target in (expert,) if expert else experts:
            name = f"{target}_{n}"
            _load_lora(pipe, file, name, second=target == "low")
            strengths[target][name] = strength
    for target, module in (("high", pipe.transformer), ("low", pipe.transformer_2)):
        if strengths[target]:
            module.set_adapters(list(strengths[target]), list(strengths[target].values()))


def _parse_lora(lora: str) -> tuple[str | None, Path, float]:
    """`[high:|low:]FILE[=STRENGTH]` -> (expert, an existing safetensors file, strength)."""
    path, equals, strength = lora.rpartition("=")
    path, strength = (path, strength) if equals else (lora, "1")
    expert = next((name for name in ("high", "low") if path.startswith(f"{name}:")), None)
    path = path.removeprefix(f"{expert}:")
    try:
        scale = float(strength)
    except ValueError:
        raise UsageError(f"--lora {lora}: {strength!r} is no strength; write FILE=0.8") from None
    file = Path(path).expanduser()
    if not file.exists():
        raise EnvironmentProblem(f"no LoRA at {path}: give a .safetensors file or the folder that holds one")
    if file.is_dir():
        files = sorted(file.glob("*.safetensors"))
        if len(files) != 1:
            raise EnvironmentProblem(
                f"LoRA folder {path} holds {len(files)} .safetensors files; name the one to use"
            )
        file = files[0]
    if file.suffix != ".safetensors":
        raise EnvironmentProblem(
            f"LoRA {path} is not a .safetensors file; other formats can run code when opened"
        )
    check_safetensors(file)
    return expert, file, scale


def _load_lora(pipe: WanPipeline, file: Path, name: str, *, second: bool) -> None:
    try:
        pipe.load_lora_weights(
            str(file.parent),
            weight_name=file.name,
            adapter_name=name,
            use_safetensors=True,
            load_into_transformer_2=second,
        )
    except Exception as error:  # a foreign file can trip the loader anywhere, up to an IndexError
        if "PEFT" in str(error).upper():
            raise EnvironmentProblem(f"--lora needs peft: pip install peft ({_first_line(error)})") from error
        raise EnvironmentProblem(f"LoRA {file} does not fit this model: {_first_line(error)}") from error
    module = pipe.transformer_2 if second else pipe.transformer
    if name not in getattr(module, "peft_config", {}):
        raise EnvironmentProblem(
            f"LoRA {file} has no weights for this model's transformer; nothing was applied"
        )


def place(pipe: WanPipeline, device: Any, offload: str) -> None:
    """Put a pipeline on a device, or let its weights wait in main memory and come when they are needed."""
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        # Streams overlap the copy of the next layer with the work of this one; a CPU has none.
        stream = device.type == "cuda"
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=stream)


def generate(
    pipe: WanPipeline,
    options: GenerateOptions,
    prompt: str,
    *,
    seed: int,
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Run the pipeline once.

    Args:
        options: size, steps, guidance and the like; `fps` and `flow_shift` are not looked at here.
        seed: seeds a CPU generator, so that the same seed starts from the same noise on every device.
        callback: called after each step with the number of steps done. What it raises ends the run.

    Returns:
        uint8 `[F, H, W, 3]`, RGB.

    Raises:
        UsageError: a size or frame count that the model cannot make; the message names the nearest.
        DitAccelError: the run produced values that are not finite.
    """
    import torch

    size_rule_of(pipe).check(options.width, options.height, options.frames)
    if options.guidance_2 is not None and pipe.config.boundary_ratio is None:
        raise UsageError(
            f"guidance_2={options.guidance_2}: this model has one transformer; guidance alone applies"
        )

    def after_step(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if callback is not None:
            callback(step + 1)
        return kwargs

    try:
        (video,) = pipe(
            prompt=prompt,
            negative_prompt=options.negative_prompt,
            width=options.width,
            height=options.height,
            num_frames=options.frames,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            guidance_scale_2=options.guidance_2,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            callback_on_step_end=after_step,
            return_dict=False,
        )
    except BaseException:
        # An aborted run leaves offloaded components on the GPU; the pipeline clears up only at a good end.
        pipe.maybe_free_model_hooks()
        raise
    frames = np.asarray(video[0])  # [F, H, W, 3], 0..1
    if not np.isfinite(frames).all():
        raise DitAccelError("the run produced values that are not finite; try --dtype bfloat16 or float32")
    return np.rint(frames * 255).astype(np.uint8)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
