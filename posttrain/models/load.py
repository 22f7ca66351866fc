"""Loads Hugging Face causal LMs for training and checks them.

Weights are read from safetensors only, and remote code is never run. After loading, the forward passes of training are
compared with transformers' own (models/check.py), which chooses how the model is computed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import nn
from transformers import LlamaConfig

from posttrain.config import ModelConfig
from posttrain.data.chat import ChatFormat
from posttrain.models import lora
from posttrain.models.check import check_forward, check_runs, first_line
from posttrain.models.policy import Policy, checkpoint_layers
from posttrain.models.shapes import ModelShape
from posttrain.types import ConfigError, TemplateError

ABACUS = Path(__file__).parent / "abacus"
_loading = threading.Lock()  # transformers changes process-wide settings while it builds a model


def resolve_path(path: str) -> str:
    """Resolves `abacus` to the model in the package; anything else is a folder or a hub id."""
    return str(ABACUS) if path == "abacus" else path


def load_policy(cfg: ModelConfig, device: torch.device | str = "cpu") -> Policy:
    """Loads weights and tokenizer, checks that they match and are supported, and attaches LoRA if requested."""
    source = resolve_path(cfg.path)
    _require_safetensors(source, cfg.path)
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        with _loading:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except Exception as error:  # also of packages that a checkpoint's format needs
        raise ConfigError(f"model {cfg.path!r} cannot be loaded: {first_line(error)}") from None
    policy = Policy(cast(nn.Module, model).to(device), tokenizer, cfg.path, _stop_ids(model, tokenizer, cfg.path))
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


def _require_safetensors(source: str, name: str) -> None:
    folder = Path(source)
    if not folder.exists():
        if os.sep in name and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise ConfigError(f"model folder {name!r} does not exist.")
        return  # a hub id: from_pretrained(use_safetensors=True) rejects other formats
    if not folder.is_dir():
        raise ConfigError(f"model {name!r} is a file. Give the folder that holds config.json and model.safetensors.")
    if not list(folder.glob("*.safetensors")):
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
        found = f" (only {pickles[0]}, a pickle file that could run code)" if pickles else ""
        raise ConfigError(f"model folder {name!r} has no *.safetensors file{found}. Convert the weights first.")


def _stop_ids(model: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    ids: list[int] = []
    text = model.config.get_text_config(decoder=True)
    generation = getattr(model.generation_config, "eos_token_id", None)
    for value in (generation, getattr(text, "eos_token_id", None), tokenizer.eos_token_id):
        ids.extend(value if isinstance(value, list) else [value] if value is not None else [])
    if not ids:
        raise TemplateError(
            f"model {name!r} has no end-of-sequence token, so no completion could end. Set eos_token in its tokenizer."
        )
    return tuple(dict.fromkeys(ids))


def check_tokenizer(tokenizer: Any, rows: int) -> None:
    """Raises TemplateError if the tokenizer has an id without an embedding row."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise TemplateError(
            f"the tokenizer has ids up to {largest}, but the model has only {rows} embedding rows. "
            "Use the tokenizer that belongs to the model."
        )


def with_chat_format(policy: Policy, form: Literal["chat", "plain"]) -> ChatFormat:
    """The chat format of the policy's tokenizer; its end-of-turn tokens are added to the policy's stop tokens."""
    chat = ChatFormat(policy.tokenizer, form)
    add_stop_ids(policy, chat.stop_ids)
    return chat


def add_stop_ids(policy: Policy, ids: Sequence[int]) -> None:
    """Adds stop tokens to those of the model."""
    policy.stop_ids = tuple(dict.fromkeys([*policy.stop_ids, *ids]))
