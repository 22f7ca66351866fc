"""A zoo of small chat templates, each with one trait of those that models are shipped with."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""As Qwen's pre-tokenizer: several line breaks are one token, also across the end of a prompt."""
CORPUS = ["What is 3 + 5?\n\nThe sum is 8.\n\n<think>\n\nI add.\n\n"] * 4
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = TURNS + BEGIN


@dataclass(frozen=True)
class Animal:
    """A template, its control tokens, and the sentences with which it refuses some conversations (by name)."""

    template: str
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    eos: str = "<|im_end|>"
    names: dict[str, str] = field(default_factory=dict[str, str])
    refuses: dict[str, str] = field(default_factory=dict[str, str])
    many: tuple[str, ...] = ()  # conversations that become one row for each turn
    opens: str = ""
    stops: tuple[str, ...] = ("<|im_end|>",)


DROPPED, UNOPENED = "leaves out '.*' of assistant message", "opens each reply with '<think>.*', but assistant message"
_LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_SPLIT = "{% set text = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}"
ZOO = {
    "chatml": Animal(CHATML),
    "dated": Animal(
        "{{ bos_token }}{{ '<|h|>system<|/h|>Today is ' + strftime_now('%d %b %Y') + '<|eot|>' }}"
        "{% for m in messages %}{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}",
        ("<|begin|>", "<|h|>", "<|/h|>", "<|eot|>", "<|end|>"), "<|end|>", {"bos_token": "<|begin|>"},
        stops=("<|eot|>", "<|end|>"),
    ),
    "opens a thought": Animal(
        TURNS + BEGIN.replace("assistant\n", "assistant\n<think>\n"), opens="<think>\n",
        refuses={"plain": UNOPENED, "two": UNOPENED, "system": UNOPENED, "break": UNOPENED},
    ),
    "opens and drops thoughts": Animal(
        "{% for m in messages %}" + _SPLIT + "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        + BEGIN.replace("assistant\n", "assistant\n<think>\n"), opens="<think>\n", many=("thoughts",),
        refuses={"plain": UNOPENED, "two": UNOPENED, "system": UNOPENED, "break": UNOPENED},
    ),
    "drops every thought": Animal(
        "{% for m in messages %}" + _SPLIT + "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        + BEGIN, refuses={"thought": DROPPED, "thoughts": DROPPED},
    ),
    "thinks in the last turn": Animal(
        _LAST + "{% for m in messages %}" + _SPLIT + "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}{% set thought = m.reasoning_content or ("
        "m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '') %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' + text }}{% else %}{{ text }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}", many=("two", "thoughts"),
    ),
    "closes an empty thought": Animal(
        TURNS + BEGIN.replace("assistant\n", "assistant\n<think></think>"), many=("two", "thoughts")
    ),
    "ends again at the end": Animal(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), "<|endoftext|>",
        stops=("<|end|>", "<|endoftext|>"),
    ),
    "headers": Animal(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
        "{% set f = m.tool_calls[0].function %}{{ '<|start|>assistant to=' + f.name }}"
        "{{ '<|channel|>commentary<|message|>' + f.arguments | tojson + '<|call|>' }}"
        "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>", "<|return|>"), "<|return|>",
        many=("two", "thoughts"), stops=("<|call|>", "<|return|>"),
    ),
    "moves the system message": Animal(
        "{% set words = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (words + '\n\n' if words and loop.last else '')"
        " + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}"
        "{% endfor %}", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", {"bos_token": "<s>"}, stops=("</s>",),
    ),
    "refuses a system message": Animal(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TURNS.removeprefix("{% for m in messages %}") + BEGIN, refuses={"system": "no system role"},
    ),
    "ignores the system message": Animal(
        "{% for m in messages if m.role != 'system' %}" + TURNS.removeprefix("{% for m in messages %}") + BEGIN,
        refuses={"system": "leaves out the system message 'Be brief.'"},
    ),
    "takes parts": Animal(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{{ part.text }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + BEGIN,
    ),
}  # fmt: skip


SPACES = {
    "byte-level": "as GPT-2, Llama 3 and Qwen: a space is a letter of the word after it",
    "replaced": "as Gemma: a space is the letter ▁",
    "metaspace": "as SentencePiece: the same, and one more before the first word of a text",
    "prepended": "as Llama 2 and the first Mistral: the same, and one more after each control token, too",
}
"""Tokenizers by what they do with spaces."""


def tokenizer_of(
    animal: Animal, visible: Sequence[str] = ("<think>", "</think>"), spaces: str = "byte-level"
) -> PreTrainedTokenizerFast:
    """A tokenizer with the template and its control tokens; `spaces` is one of SPACES."""
    raw: Any = Tokenizer.from_str(_byte_level(tuple(animal.special)) if spaces == "byte-level"
                                  else _sentence_pieces(tuple(animal.special), spaces))  # fmt: skip
    raw.add_tokens([AddedToken(text, special=False, normalized=False) for text in visible])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        clean_up_tokenization_spaces=False,
        eos_token=animal.eos,
        pad_token="<pad>",
        **animal.names,
    )
    tokenizer.chat_template = animal.template  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def save(animal: Animal, folder: Path) -> Path:
    """Writes a random two-layer Llama with the tokenizer."""
    tokenizer = tokenizer_of(animal)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
                         bos_token_id=None, pad_token_id=0, **shape)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@functools.cache
def _byte_level(special: tuple[str, ...]) -> str:
    raw: Any = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<pad>", *special], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return raw.to_str()


@functools.cache
def _sentence_pieces(special: tuple[str, ...], spaces: str) -> str:
    """BPE over whole texts, which merges across words and line breaks; what it does not know is written in bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    raw: Any = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replaced: Any = normalizers.Replace(" ", "▁")
    raw.normalizer = replaced
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<unk>", *special, *bytes_], show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    made = json.loads(raw.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in bytes_]
    raw = Tokenizer.from_str(json.dumps(made))
    decoder: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces == "prepended":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
    if spaces == "metaspace":
        raw.normalizer = None
        raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    raw.decoder = decoders.Sequence([*decoder, *([] if spaces == "replaced" else [decoders.Strip(" ", 1, 0)])])
    return raw.to_str()
