"""The parts of tiny-wan as stock diffusers and transformers classes, and how they are saved."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel.quality.scenes import sample_scene, write_caption

LATENT_CHANNELS = 16
TEXT_DIM = 128
PROMPT_LENGTH = 512  # what WanPipeline pads prompt embeddings to by default
FLOW_SHIFT = 5.0
SHARD_BYTES = 12 * 2**20


def make_vae(
    base_dim: int = 24, latents_mean: list[float] | None = None, latents_std: list[float] | None = None
):
    """A Wan VAE with 4x spatial and 2x temporal compression; both factors are config values that nothing derives."""
    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
    )


def make_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on captions: every caption word is one token, any other text still tokenises."""
    rng = random.Random(0)
    captions = [write_caption(sample_scene(rng), rng) for _ in range(4000)]
    model = Tokenizer(BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(captions, trainer)
    model.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", model.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=PROMPT_LENGTH,
    )


def make_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def make_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    )


def make_pipeline(tokenizer, text_encoder, transformer, vae) -> WanPipeline:
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=make_scheduler(),
    )


def save_shards(tensors: dict[str, torch.Tensor], folder: Path, stem: str) -> list[Path]:
    """Write `stem-1.safetensors`, `stem-2.safetensors`, ... each under `SHARD_BYTES`; old shards are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().clone().contiguous()  # tied weights may not share memory
        size += tensor.nbytes
    paths = []
    for number, shard in zip(itertools.count(1), shards, strict=False):
        path = folder / f"{stem}-{number}.safetensors"
        draft = path.with_suffix(".partial")
        save_file(shard, draft)
        draft.replace(path)
        paths.append(path)
    return paths


def load_shards(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    paths = sorted(folder.glob(f"{stem}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no {stem}-*.safetensors in {folder}; train that stage first")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE of a run (`vae.json` and shards), or of a pipeline folder; fp32, frozen."""
    if (folder / "vae").is_dir():
        shipped = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)
        # A fresh one: what was loaded remembers the path it came from, and would ship that in its config.
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder / "vae"))
        vae.load_state_dict(shipped.state_dict())
    else:
        record = json.loads((folder / "vae.json").read_text())
        vae = make_vae(record["base_dim"], record["latents_mean"], record["latents_std"])
        vae.load_state_dict(load_shards(folder, "vae"))
    return vae.eval().requires_grad_(False)
