"""The tokenizer and the text encoder that the small models have in common."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel.quality.scenes import sample_scene, write_caption

from .shards import load_shards

TEXT_DIM = 128
CAPTION_TOKENS = 48


def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on captions: every caption word is one token, any other text still tokenises.

    Captions of stills have the same words, less those for motion.
    """
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
        model_max_length=max_length,
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


def load_encoder(folder: Path | None, vocabulary: int) -> UMT5EncoderModel:
    """The encoder (fp32) of a run's shards or of a tiny-wan pipeline folder; without a folder a fresh one."""
    encoder = make_text_encoder(vocabulary)
    if folder is None:
        return encoder
    if (folder / "text_encoder").is_dir():
        shipped = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        encoder.load_state_dict(shipped.state_dict())
    else:
        encoder.load_state_dict(load_shards(folder, "text"))
    return encoder
