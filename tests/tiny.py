"""A random two-layer Llama and its tokenizer in a folder, so that the model tests run in a bare clone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import posttrain as pt
from posttrain.config import ModelConfig
from posttrain.models.load import Policy, load_policy

VOCAB, STOP = 64, 2


TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _config(vocab: int, kv_heads: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=STOP,
        tie_word_embeddings=True,
        **more,
    )


def make(folder: Path, kv_heads: int = 2) -> Path:
    """Writes the model: 4 heads over `kv_heads` key-value heads, weights large enough that logits differ by units."""
    torch.manual_seed(0)
    LlamaForCausalLM(_config(VOCAB, kv_heads)).save_pretrained(folder)
    words = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return folder


def chatty(folder: Path) -> Path:
    """Writes a model with a character tokenizer and a chat template, for whole runs."""
    special = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=special[3:], chat_template=TEMPLATE, **names
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(_config(len(vocab), 2, pad_token_id=0)).save_pretrained(folder)
    return folder


def two_steps(models: Path, folder: Path) -> Path:
    """A finished GRPO run of two steps of a `chatty` model, written to `models`, whose answers score 0, 0.5 or 1."""
    small: dict[str, Any] = {
        "rollout__max_tokens": 6, "rollout__slots": 32, "prompts": 3, "group_size": 4, "problems": 4, "count": 32,
    }  # fmt: skip

    def reward(completion: str, answer: str, **task: Any) -> float:
        return len(completion) % 3 / 2

    return pt.grpo(str(chatty(models)), "sums", reward, folder, steps=2, threads=1, **small).folder


def stopping(folder: Path) -> Path:
    """Makes a `chatty` model stop at any token but a printable ASCII character, so that its answers are short texts."""
    ends = [*range(2, 6), *range(100, 262)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def load(folder: Path, **settings: Any) -> Policy:
    return load_policy(ModelConfig(path=str(folder), **settings))


def prompts(policy: Policy, count: int, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    """Random prompts of 1 … `longest` tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(3, policy.vocab, draw.integers(1, longest + 1)) for _ in range(count)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
