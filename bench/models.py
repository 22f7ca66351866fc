"""The models that are measured: Llamas of a given shape with random weights, and a tokenizer of whole words.

What a step costs depends on shapes alone, so random weights cost what trained ones do. Every text is made of words that
are one token each, so both sides read the same ids.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SPECIAL = ("<unk>", "<pad>", "</s>")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = True

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=1,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    "5M": Shape(layers=6, width=256, heads=4, kv_heads=4, ffn=688, vocab=2048),
    "150k words": Shape(layers=4, width=256, heads=4, kv_heads=4, ffn=688, vocab=150_000),
    "SmolLM2-135M": Shape(layers=30, width=576, heads=9, kv_heads=3, ffn=1536, vocab=49_152),
}


def model_folder(shape: Shape, root: Path) -> Path:
    """The folder with a model of this shape, made once: weights of seed 0 in fp32, words w3 … as vocabulary."""
    folder = root / "-".join(str(value) for value in asdict(shape).values())
    if (folder / "done").exists():
        return folder
    torch.manual_seed(0)
    logging.disable_progress_bar()
    LlamaForCausalLM(shape.config()).save_pretrained(folder)
    names = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), shape.vocab))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIAL[0], pad_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    fast.save_pretrained(folder)
    (folder / "done").touch()
    return folder


def words(folder: Path) -> list[str]:
    """Words of a model's vocabulary that are one token each when spaces stand between them."""
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    spaced = [name[1:] for name in vocabulary if name[0] == "Ġ" and name[1:].isascii() and name[1:].isalpha()]
    return sorted(spaced or (name for name in vocabulary if name not in SPECIAL))


def texts(folder: Path, lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Random texts of about these many tokens."""
    draw, known = random.Random(seed), words(folder)
    return [" ".join(draw.choices(known, k=length)) for length in lengths]


def parameters(config: Any) -> tuple[int, int]:
    """(weights in matrices that a token goes through, all weights) of a Llama's config; the head counts, tied or not.

    Looking up an embedding multiplies nothing.
    """
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head
    layer = width * (2 * width + 2 * kv) + 3 * width * config.intermediate_size
    table = config.vocab_size * width
    norms = width * (2 * config.num_hidden_layers + 1)
    matrices = config.num_hidden_layers * layer + table
    return matrices, matrices + norms + (0 if config.tie_word_embeddings else table)
