"""Load a stock pipeline of diffusers: device, dtype, schedule, LoRAs, offloading. Shared by all recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.pipelines.weights import check_safetensors, left_out

OFFLOADS = ("none", "model", "group")
DTYPES = ("float32", "bfloat16", "float16")


def load_stock(
    folder: Path,
    pipeline: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    vae_dtype: str | None = None,
    offload: str = "none",
    flow_shift: float | None = None,
    loras: Sequence[str] = (),
) -> Any:
    """A stock pipeline from a folder that was found to be whole.

    Args:
        pipeline: its class in diffusers.
        device: a torch device, or "auto": the first GPU, else the CPU.
        dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 on a GPU; float32 on a CPU, where
            bfloat16 is about three times slower.
        vae_dtype: what the autoencoder runs in where all else is 16-bit (float16 on a GPU only); None: as all else.
        offload: "none", "model" (whole components wait in main memory) or "group" (layers do).
        flow_shift: shift of the noise schedule; None leaves the model's own.
        loras: LoRA files or folders, each with an optional strength: `style.safetensors=0.8`.

    Raises:
        EnvironmentProblem: device or dependency missing, weights that do not fit.
        UsageError: an option that cannot be.
    """
    try:
        import diffusers
        import torch
        import transformers  # noqa: F401  (a pipeline's text encoders)

        cls = getattr(diffusers, pipeline)
    except (ImportError, AttributeError) as error:
        raise EnvironmentProblem(f"{error}: pip install 'dit-accel[diffusers]'") from error
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    if offload not in OFFLOADS:
        raise UsageError(f"offload {offload!r}: one of {', '.join(OFFLOADS)}")
    if offload != "none" and where.type == "cpu":
        raise UsageError(
            f"offload {offload!r} moves weights between a GPU and main memory; on the CPU use 'none'"
        )
    if vae_dtype == "float16" and where.type == "cpu":
        vae_dtype = "float32"  # few of torch's CPU operations know float16
    vae = kind if vae_dtype is None or kind == torch.float32 else getattr(torch, vae_dtype)
    try:
        pipe = cls.from_pretrained(
            str(folder),
            dtype={"default": kind, "vae": vae},
            use_safetensors=True,
            local_files_only=True,
            # diffusers wants to be told that a component which it can do without is left out
            **dict.fromkeys(left_out(folder)),
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


def pick_dtype(dtype: str, device: Any) -> Any:
    import torch

    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: one of auto, {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _set_flow_shift(pipe: Any, shift: float | None) -> None:
    if shift is None:
        return
    if pipe.scheduler.config.get("use_dynamic_shifting"):
        raise UsageError(
            f"flow_shift={shift}: this model's schedule is shifted by the size of the picture; leave it out"
        )
    names = [name for name in ("flow_shift", "shift") if name in pipe.scheduler.config]
    if not names:
        raise UsageError(f"flow_shift={shift}: {type(pipe.scheduler).__name__} has no shift; leave it out")
    if pipe.scheduler.config[names[0]] != shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{names[0]: shift})


def _load_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Load every LoRA, then switch all of them on, each at its strength.

    A Wan 2.2 model has two experts: `high:FILE` and `low:FILE` go to one of them, a plain FILE to both.
    """
    strengths: dict[str, dict[str, float]] = {"high": {}, "low": {}}
    for n, lora in enumerate(loras):
        expert, file, strength = _parse_lora(lora)
        if expert and _second(pipe) is None:
            raise UsageError(f"--lora {lora}: this model has one transformer; leave out {expert!r}:")
        experts = ("high", "low") if _second(pipe) is not None else ("high",)
        for target in (expert,) if expert else experts:
            name = f"{target}_{n}"
            _load_lora(pipe, file, name, second=target == "low")
            strengths[target][name] = strength
    for target, module in (("high", pipe.transformer), ("low", _second(pipe))):
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


def _load_lora(pipe: Any, file: Path, name: str, *, second: bool) -> None:
    try:
        pipe.load_lora_weights(
            str(file.parent),
            weight_name=file.name,
            adapter_name=name,
            use_safetensors=True,
            **({"load_into_transformer_2": True} if second else {}),
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


def place(pipe: Any, device: Any, offload: str) -> None:
    """Put a pipeline on a device, or let its weights wait in main memory and come when they are needed."""
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        # Streams overlap the copy of the next layer with the work of this one; a CPU has none.
        stream = device.type == "cuda"
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=stream)


def _second(pipe: Any) -> Any:
    """The expert for low noise, where there is one."""
    return getattr(pipe, "transformer_2", None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
