"""Loading any Hugging Face causal LM for reinforcement learning, with the checks that catch a wrong one at once.

Weights are read from safetensors only and remote code is never run. After loading, the model's packed forward pass is
held against transformers' own on a few tokens, so an architecture this package cannot drive exactly is refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import LlamaConfig

from posttrain.config import ModelConfig
from posttrain.models import decoder, lora
from posttrain.models.attention import NAME, Layout
from posttrain.models.packing import Packed
from posttrain.models.shapes import ModelShape
from posttrain.types import ConfigError, TemplateError

ABACUS = Path(__file__).parent / "abacus"
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}  # on logits; a wrong mask or position is off by whole units
_loading = threading.Lock()  # transformers builds a model under settings of the whole process, so one at a time


@dataclass
class Policy:
    """A model, its tokenizer and what generation must know about them."""

    model: Any  # PreTrainedModel or PeftModel
    tokenizer: Any
    source: str
    stop_ids: tuple[int, ...]
    scalar: nn.Linear | None = None  # width → scores or values, for reward models and critics (models/heads.py)

    @property
    def body(self) -> nn.Module:
        """The decoder without its output layer."""
        return lora.unwrap(self.model).get_decoder()

    @property
    def head(self) -> nn.Linear:
        """The output layer."""
        return lora.unwrap(self.model).get_output_embeddings()

    @property
    def config(self) -> Any:
        return lora.unwrap(self.model).config

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def vocab(self) -> int:
        return self.head.weight.shape[0]


def hidden_states(policy: Policy, tokens: torch.Tensor, positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One pass through the decoder: tokens and positions (b, t) int64 → last hidden states (b, t, width)."""
    if decoder.fits(policy.body):
        return decoder.forward(policy.body, tokens, positions, layout)
    out = policy.body(input_ids=tokens, position_ids=positions, use_cache=False, layout=layout)
    return out.last_hidden_state


def resolve_path(path: str) -> str:
    """`abacus` is the model in the package; anything else is a folder or a hub id."""
    return str(ABACUS) if path == "abacus" else path


def load_policy(cfg: ModelConfig, device: torch.device | str = "cpu") -> Policy:
    """Loads weights and tokenizer, attaches LoRA if asked, and checks that they fit each other and this package."""
    source = resolve_path(cfg.path)
    _require_safetensors(source, cfg.path)
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        with _loading:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, attn_implementation="sdpa"
            )
    except (OSError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model {cfg.path!r} cannot be loaded: {first}") from None
    policy = Policy(cast(nn.Module, model).to(device), tokenizer, cfg.path, _stop_ids(model, tokenizer, cfg.path))
    check_tokenizer(tokenizer, policy.vocab)
    check_forward(policy)
    if cfg.lora_rank:
        policy.model = lora.attach(policy.model, cfg.lora_rank, cfg.lora_alpha)
    if cfg.gradient_checkpointing:
        inner = lora.unwrap(policy.model)
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        inner.enable_input_require_grads()
    return policy


def llama_config(shape: ModelShape, **more: Any) -> LlamaConfig:
    """transformers' configuration of a Llama of this shape, for models with random weights."""
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
    own = trainable(policy)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ConfigError(f"weights do not fit the model: {len(odd)} names differ, first {odd[0]!r}.")
    take_weights(policy, tensors)


@torch.no_grad()
def take_weights(policy: Policy, tensors: Mapping[str, torch.Tensor]) -> None:
    """The same where tensors may share the model's memory, which are not copied, and more may be given than learn."""
    for name, parameter in trainable(policy).items():
        if parameter.data_ptr() != tensors[name].data_ptr():
            parameter.copy_(tensors[name])


def weight_views(policy: Policy) -> dict[str, torch.Tensor]:
    """The weights of `trainable(policy)` without their gradients: views, not copies."""
    return {name: parameter.detach() for name, parameter in trainable(policy).items()}


def trainable(policy: Policy) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; tied weights appear once. A scalar head's are named `scalar.…`."""
    own = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    if policy.scalar is not None:
        own |= {f"scalar.{name}": p for name, p in policy.scalar.named_parameters()}
    return own


def save_pretrained(policy: Policy, folder: Path) -> None:
    """Writes a plain Hugging Face folder (LoRA merged) that transformers, vLLM and this package load."""
    model = lora.merged(policy.model)
    model.save_pretrained(folder, safe_serialization=True)
    policy.tokenizer.save_pretrained(folder)


def _require_safetensors(source: str, name: str) -> None:
    folder = Path(source)
    if not folder.exists():
        if os.sep in name and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise ConfigError(f"model folder {name!r} does not exist.")
        return  # a hub id: from_pretrained(use_safetensors=True) refuses other formats
    if not folder.is_dir():
        raise ConfigError(f"model {name!r} is a file; give the folder that holds config.json and model.safetensors.")
    if not list(folder.glob("*.safetensors")):
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
        found = f"it holds {pickles[0]}, a pickle that could run code" if pickles else "none is there"
        raise ConfigError(f"model folder {name!r} has no *.safetensors file ({found}). Convert the weights first.")


def _stop_ids(model: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    ids: list[int] = []
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ids.extend(value if isinstance(value, list) else [value] if value is not None else [])
    if not ids:
        raise TemplateError(f"model {name!r} names no end-of-sequence token, so no answer could end. Set eos_token.")
    return tuple(dict.fromkeys(ids))


def check_tokenizer(tokenizer: Any, rows: int) -> None:
    """Raises TemplateError where the tokenizer can make an id that has no embedding row."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise TemplateError(
            f"the tokenizer makes ids up to {largest}, but the model has {rows} embedding rows. "
            "Use the tokenizer that belongs to the model."
        )


def short_rows(policy: Policy) -> list[torch.Tensor]:
    """Ids, (7,) and (3,), on which another way to compute the model is held against the packed pass."""
    return [torch.arange(5, 5 + n, device=policy.device) % policy.vocab for n in (7, 3)]


def packed_logits(policy: Policy, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits (M, vocabulary) of rows of M tokens in all, which lie end to end in one pass."""
    layout = Packed(torch.tensor([len(row) for row in rows], device=policy.device))
    return policy.head(hidden_states(policy, torch.cat([*rows]).unsqueeze(0), layout.positions, layout))[0]


@torch.no_grad()
def check_forward(policy: Policy) -> float:
    """Compares our packed pass with transformers' own on two short rows; switches the model to ours.

    Returns the largest logit difference; raises ConfigError above the tolerance.
    """
    model = lora.unwrap(policy.model)
    model.eval()
    rows = short_rows(policy)
    theirs = torch.cat([model(input_ids=row.unsqueeze(0), use_cache=False).logits[0] for row in rows])
    model.set_attn_implementation(NAME)
    ours = packed_logits(policy, rows)
    difference = float((ours.float() - theirs.float()).abs().max())
    limit = TOLERANCE[policy.head.weight.dtype] * max(1.0, float(theirs.float().abs().max()) / 10)
    if not difference <= limit:
        raise ConfigError(
            f"{type(model).__name__} gives logits that differ by {difference:.2g} between transformers' forward pass "
            f"and the packed one (allowed {limit:.2g}); this architecture is not supported."
        )
    return difference
