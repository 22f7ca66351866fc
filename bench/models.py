"""Models for the benchmarks: Llamas of a given shape with random weights and a word-level tokenizer.

The cost of a step depends only on shapes, so random weights cost the same as trained ones. Every text consists of
words that are one token each, so both sides read the same ids.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from posttrain.models import shapes
from posttrain.models.load import llama_config
from posttrain.models.shapes import ModelShape

SPECIAL = ("<unk>", "<pad>", "</s>")

SHAPES = {
    "5M": ModelShape(layers=6, width=256, heads=4, kv_heads=4, head_dim=64, ffn=688, vocab=2048, tied=True),
    "150k words": ModelShape(layers=4, width=256, heads=4, kv_heads=4, head_dim=64, ffn=688, vocab=150_000, tied=True),
    "SmolLM2-135M": shapes.SHAPES["smollm2-135m"],
}


def model_folder(shape: ModelShape, root: Path) -> Path:
    """Folder with a model of this shape, created once: fp32 weights from seed 0, vocabulary of words w3 …"""
    folder = root / "-".join(str(value) for value in asdict(shape).values())
    if (folder / "done").exists():
        return folder
    torch.manual_seed(0)
    logging.disable_progress_bar()
    ids: Any = {"bos_token_id": None, "pad_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(llama_config(shape, max_position_embeddings=2048, **ids)).save_pretrained(folder)
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
    """Words of a model's vocabulary that are one token each when separated by spaces."""
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    spaced = [name[1:] for name in vocabulary if name[0] == "Ġ" and name[1:].isascii() and name[1:].isalpha()]
    return sorted(spaced or (name for name in vocabulary if name not in SPECIAL))


def texts(folder: Path, lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Random texts of about the given numbers of tokens."""
    draw, known = random.Random(seed), words(folder)
    return [" ".join(draw.choices(known, k=length)) for length in lengths]
