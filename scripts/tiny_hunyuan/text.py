"""The tokenizer and the text stage: captions inside the pipeline's template, read by a Llama.

`HunyuanVideoPipeline` puts a prompt into a template of instructions and cuts away the first 95 tokens of what Llama
says. Here too the template is that long: each of its words is one token, and tokens of beginning fill up what is left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tiny_models.reading import TextPace, train_reading
from tiny_models.shards import load_shards
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import BatchEncoding, LlamaModel, PreTrainedTokenizerFast

from dit_accel.quality.scenes import BACKGROUNDS, COLOURS, MOTION_WORDS, RADII, SHAPES, sample_scene

from .models import CLIP_TOKENS, SKIPPED, make_llama

CROP = DEFAULT_PROMPT_TEMPLATE["crop_start"]
_TEMPLATE = DEFAULT_PROMPT_TEMPLATE["template"]
_BEFORE, _AFTER = _TEMPLATE.split("{}")
_PAD, _END, _BEGIN = "<pad>", "<|eot_id|>", "<|begin_of_text|>"
_SPECIAL = (_PAD, _END, "<unk>", _BEGIN, "<|start_header_id|>", "<|end_header_id|>")
_LONGEST = 512  # tokens of prompt and template


def _train_bpe() -> Tokenizer:
    """A byte-level BPE in which every word of captions and template is one token, and any other text still tokenises.

    It is made from lists of words, not from drawn captions: every machine makes the same one. The two line feeds before
    a prompt are one token whatever follows, or the template's length would depend on it.
    """
    captions = " ".join(
        [
            *COLOURS,
            *SHAPES,
            *MOTION_WORDS.values(),
            *RADII,
            *BACKGROUNDS,
            "a and, over background with panning",
        ]
    )
    instructions = [part.strip() for part in re.split(r"<\|\w+\|>", _BEFORE) if part.strip()]
    model = Tokenizer(BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([captions, *instructions], trainer)
    model.add_tokens([AddedToken("\n\n", normalized=False)])
    return model


def make_tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Llama's, for templates with a prompt inside, and CLIP's, for the prompt alone. They have one vocabulary."""
    llama = _train_bpe()
    clip = Tokenizer.from_str(llama.to_str())
    begins = CROP - len(llama.encode(_BEFORE).ids)
    assert begins > 0, "the template has more tokens than the pipeline cuts away"
    ids = [(token, llama.token_to_id(token)) for token in (_BEGIN, _END)]
    llama.post_processor = processors.TemplateProcessing(
        single=" ".join([*[_BEGIN] * begins, "$A"]), special_tokens=ids
    )
    clip.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=ids)
    return _wrap(llama, _LONGEST), _wrap(clip, CLIP_TOKENS)


def _wrap(model: Tokenizer, longest: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_PAD,
        unk_token="<unk>",
        model_max_length=longest,
        padding_side="right",
    )


class CaptionTokenizer:
    """Tokenises captions as the pipeline does, less the template's `CROP` tokens; `before` holds those, `[1, CROP]`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.before = tokenizer([_TEMPLATE.format("")], return_tensors="pt").input_ids[:, :CROP]

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, captions: Sequence[str], *, max_length: int, **options) -> BatchEncoding:
        """As the tokenizer; places of characters count from the caption's start."""
        told = self.tokenizer(
            [_TEMPLATE.format(caption) for caption in captions], max_length=CROP + max_length, **options
        )
        cut = {name: value[:, CROP:] for name, value in told.items()}
        if "offset_mapping" in cut:
            cut["offset_mapping"] = (cut["offset_mapping"] - len(_BEFORE)).clamp(min=0)
        return BatchEncoding(cut)


class Reader:
    """Reads captions with a Llama as the pipeline does. Called as `reading.train_reading` wants it."""

    def __init__(self, before: Tensor):
        self.before = before

    def __call__(self, llama: LlamaModel, ids: Tensor, mask: Tensor) -> Tensor:
        """What the pipeline gives the transformer, `[B, L, width]`, of ids and mask without the template's."""
        self.before = self.before.to(ids.device)  # once: a step that is captured must not copy from the host
        before = self.before.expand(len(ids), -1)
        states = llama(
            torch.cat([before, ids], 1),
            attention_mask=torch.cat([torch.ones_like(before), mask], 1),
            output_hidden_states=True,
        ).hidden_states
        return states[-(SKIPPED + 1)][:, CROP:]


def load_llama(folder: Path | None, vocabulary: int) -> LlamaModel:
    """The encoder (fp32) of a run's shards; without a folder a fresh one."""
    llama = make_llama(vocabulary)
    if folder is not None:
        llama.load_state_dict(load_shards(folder, "text"))
    return llama


def train_text(out: Path, text_from: Path | None, pace: TextPace) -> None:
    """Train until the time is up; writes `text-*` and `words-*` (the reader) and `text.json`.

    The loss ends at 4.3, not at 0: Llama sees no later words, so that "a" and "red" cannot tell what is red, and the
    reader is asked at every word. At the last word of an object it knows all of it.
    """
    tokenizer = CaptionTokenizer(make_tokenizers()[0])
    llama = load_llama(text_from, len(tokenizer))
    train_reading(
        llama,
        Reader(tokenizer.before),
        sample_scene,
        tokenizer,
        out,
        pace,
        stay=text_from is not None,
        trim=True,
    )
