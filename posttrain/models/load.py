"""Loads Hugging Face causal LMs for training and checks them.

Weights are read from safetensors only, all of them are used (models/weights.py), and remote code is never run. After
loading, the forward passes of training are compared with transformers' own (models/check.py), which chooses how the
model is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import LlamaConfig

from posttrain.config import ModelConfig
from posttrain.data.chat import ChatFormat
from posttrain.models import lora, weights
from posttrain.models.check import check_forward, check_runs, first_line
from posttrain.models.policy import Policy, checkpoint_layers
from posttrain.models.shapes import ModelShape
from posttrain.store.listing import stop_settings, template_settings
from posttrain.types import ConfigError, JsonView, TemplateError


def load_policy(cfg: ModelConfig, device: torch.device | str = "cpu") -> Policy:
    """Loads weights and tokenizer, checks that they match and are supported, and attaches LoRA if requested."""
    read = weights.read(cfg)
    model, tokenizer = cast(nn.Module, read.model), read.tokenizer
    stop_ids, strange = stop_ids_of(lora.unwrap(model), tokenizer, cfg.path)
    policy = Policy(model.to(device), tokenizer, cfg.path, stop_ids, notes=[*read.notes, *strange])
    check_tokenizer(tokenizer, policy.vocab)
    check_forward(policy)
    if cfg.lora_rank:
        try:
            policy.model = lora.attach(policy.model, cfg.lora_rank, cfg.lora_alpha)
            check_runs(policy)
        except Exception as error:  # PEFT has no adapters for some layers
            raise ConfigError(
                f"model {cfg.path!r} cannot have LoRA adapters: {first_line(error)} Set model.lora_rank = 0."
            ) from None
        if frozen := lora.not_adapted(policy.model):
            policy.notes.append(
                f"LoRA leaves {len(frozen)} of {len(lora.matrices(policy.model))} weight matrices without an adapter; "
                f"the first is {frozen[0]}."
            )
    if cfg.gradient_checkpointing:
        checkpoint_layers(policy)
    return policy


def llama_config(shape: ModelShape, **more: Any) -> LlamaConfig:
    """The transformers configuration of a Llama with this shape, for models with random weights."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        **more,
    )


def load_weights(policy: Policy, tensors: dict[str, torch.Tensor]) -> None:
    """Copies tensors named as in `trainable(policy)` into the model, in place."""
    parameters = trainable(policy)
    if parameters.keys() != tensors.keys():
        differing = sorted(parameters.keys() ^ tensors.keys())
        raise ConfigError(
            f"weights do not match the model: {len(differing)} names differ, the first is {differing[0]!r}."
        )
    take_weights(policy, tensors)


@torch.no_grad()
def take_weights(policy: Policy, tensors: Mapping[str, torch.Tensor]) -> None:
    """Like `load_weights`, but skips tensors that share the model's memory and ignores names that are not trainable."""
    for name, parameter in trainable(policy).items():
        if parameter.data_ptr() != tensors[name].data_ptr():
            parameter.copy_(tensors[name])


def weight_views(policy: Policy) -> dict[str, torch.Tensor]:
    """The weights of `trainable(policy)`, detached: views, not copies."""
    return {name: parameter.detach() for name, parameter in trainable(policy).items()}


def trainable(policy: Policy) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; tied weights appear once. Those of a scalar head are named `scalar.…`."""
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    if policy.scalar is not None:
        parameters |= {f"scalar.{name}": p for name, p in policy.scalar.named_parameters()}
    return parameters


def save_pretrained(policy: Policy, folder: Path) -> None:
    """Writes a standard Hugging Face folder (LoRA merged) that transformers, vLLM and this package can load."""
    model = lora.merged(policy.model)
    model.save_pretrained(folder, safe_serialization=True)
    policy.tokenizer.save_pretrained(folder)


def stop_ids_of(model: Any, tokenizer: Any, name: str) -> tuple[tuple[int, ...], list[str]]:
    """The end-of-sequence ids of the generation config, the config and the tokenizer; and notes on ids no token has.

    Raises TemplateError if there are none.
    """
    given: list[Any] = []
    text = model.config.get_text_config(decoder=True)
    generation = getattr(model.generation_config, "eos_token_id", None)
    for value in (generation, getattr(text, "eos_token_id", None), tokenizer.eos_token_id):
        given.extend(value if isinstance(value, list) else [value] if value is not None else [])
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [value for value in given if type(value) is int and 0 <= value < rows]
    if not ids:
        raise TemplateError(
            f"model {name!r} has no end-of-sequence token, so no completion could end. Set eos_token in its tokenizer."
        )
    strange = [value for value in dict.fromkeys(given) if value not in ids]
    shown = ", ".join(map(repr, strange))
    notes = [f"eos_token_id {shown} of {name} is not used: the model has no such token."] if strange else []
    return tuple(dict.fromkeys(ids)), notes


def check_tokenizer(tokenizer: Any, rows: int) -> None:
    """Raises TemplateError if the tokenizer has an id without an embedding row."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise TemplateError(
            f"the tokenizer has ids up to {largest}, but the model has only {rows} embedding rows. "
            "Use the tokenizer that belongs to the model."
        )


def with_chat_format(
    policy: Policy, form: Literal["chat", "plain"], arguments: JsonView | None = None, day: date | None = None
) -> ChatFormat:
    """The chat format of the policy's tokenizer; its end-of-turn tokens are added to the policy's stop tokens.

    `arguments` and `day` are the chat template's (`data.template_kwargs`, and the date it reads; by default today).
    """
    chat = ChatFormat(policy.tokenizer, form, arguments, day)
    add_stop_ids(policy, chat.stop_ids)
    return chat


def chat_format_of(
    policy: Policy, model: str | Path, form: Literal["chat", "plain"], arguments: JsonView | None = None
) -> ChatFormat:
    """`with_chat_format` with the template's arguments and date of the run that `model` belongs to, if any.

    `arguments` are used instead of the run's if there are any.
    """
    found, day = template_settings(model)
    return with_chat_format(policy, form, arguments or (found if form == "chat" else {}), day)


def stops_of(policy: Policy, model: str | Path) -> tuple[str, ...]:
    """The stop strings of the run that `model` belongs to; adds the run's stop tokens to the policy's."""
    strings, ids = stop_settings(model)
    add_stop_ids(policy, ids)
    return strings


def add_stop_ids(policy: Policy, ids: Sequence[int]) -> None:
    """Adds stop tokens to those of the model."""
    policy.stop_ids = tuple(dict.fromkeys([*policy.stop_ids, *ids]))
