"""The text encoder of the image models: a T5 that starts from tiny-wan's UMT5, and its text stage.

The pipelines of FLUX and SD3 name T5EncoderModel and log a complaint about anything else. A T5 is an UMT5 whose layers
share the first one's table of relative positions; what it loses with the others' comes back in a minute of training.
The pipelines give it no mask: padding is read and heard like words.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from tiny_models.reading import TextPace, train_reading
from tiny_models.shards import load_shards
from tiny_models.text import CAPTION_TOKENS, TEXT_DIM
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dit_accel.presets import model_path
from dit_accel.quality.scenes import sample_still


def load_tokenizer(tokens: int = CAPTION_TOKENS) -> PreTrainedTokenizerFast:
    """tiny-wan's, which pads to so many tokens: captions fill `CAPTION_TOKENS` of them at most."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(model_path("tiny-wan") / "tokenizer" / "tokenizer.json")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=tokens,
    )


def make_encoder(vocabulary: int) -> T5EncoderModel:
    """A T5 of the size of tiny-wan's UMT5 (`tiny_models.text.make_text_encoder`)."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def load_encoder(folder: Path | None, vocabulary: int) -> T5EncoderModel:
    """An encoder (fp32) from `text-*` shards or a pipeline's folder, tiny-wan's or an image model's; or a fresh one."""
    encoder = make_encoder(vocabulary)
    if folder is None:
        return encoder
    encoders = sorted(folder.glob("text_encoder*"))  # an image model's T5 is the last, behind its CLIPs
    if encoders:
        given = load_file(encoders[-1] / "model.safetensors")
    else:
        given = load_shards(folder, "text")
    wanted = encoder.state_dict()
    for name, tensor in wanted.items():
        # Tied weights are stored once.
        stored = "shared.weight" if name == "encoder.embed_tokens.weight" else name
        tensor.copy_(given[stored])
    return encoder


def encode(encoder: T5EncoderModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What both pipelines give the transformer: the last hidden state, padding and all, `[B, L, width]`."""
    return encoder(ids).last_hidden_state


def train_text(out: Path, text_from: Path | None, pace: TextPace) -> None:
    """Train until the time is up; writes `text-*` and `words-*` (the reader) and `text.json`."""
    tokenizer = load_tokenizer()
    encoder = load_encoder(text_from, len(tokenizer))
    train_reading(encoder, encode, sample_still, tokenizer, out, pace, stay=False, trim=False)
