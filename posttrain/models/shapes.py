"""Sizes of Llama-like decoders, from a model folder or by the name of a well-known model; standard library only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from posttrain.types import ConfigError, JsonView


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder: `width` is the hidden size, `ffn` the intermediate size, `vocab` the embedding
    rows."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool

    @property
    def attention(self) -> int:
        """Total width of the query heads."""
        return self.heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Number of weights in the layers' matrices, without embedding and output layer."""
        keys = self.kv_heads * self.head_dim
        return self.layers * self.width * (2 * self.attention + 2 * keys + 3 * self.ffn)

    @property
    def head(self) -> int:
        """Number of weights in the output layer."""
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        """Number of all weights: matrices, norms, embedding, and the output layer unless it is tied."""
        return self.matrices + (2 * self.layers + 1) * self.width + self.head * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """Number of weights in LoRA adapters on all matrices of the layers (posttrain/models/lora.py)."""
        keys = self.kv_heads * self.head_dim
        ends = 2 * (self.width + self.attention) + 2 * (self.width + keys) + 3 * (self.width + self.ffn)
        return self.layers * rank * ends


SHAPES = {
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49152, True),
    "smollm2-360m": ModelShape(32, 960, 15, 5, 64, 2560, 49152, True),
    "smollm2-1.7b": ModelShape(24, 2048, 32, 32, 64, 8192, 49152, True),
    "qwen2.5-0.5b": ModelShape(24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen2.5-1.5b": ModelShape(28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-7b": ModelShape(28, 3584, 28, 4, 128, 18944, 152064, False),
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 128, 3072, 151936, True),
    "llama-3.2-1b": ModelShape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False),
    "llama-2-13b": ModelShape(40, 5120, 40, 40, 128, 13824, 32000, False),
    "llama-3.1-70b": ModelShape(80, 8192, 64, 8, 128, 28672, 128256, False),
}
"""Shapes of well-known models that need not be on this machine, keyed by the last part of the hub id."""


def shape_of(source: str | Path) -> ModelShape:
    """The shape from a model folder's config.json, or that of a well-known model. Raises ConfigError."""
    file = Path(source) / "config.json"
    if not file.is_file():
        name = str(source).rpartition("/")[2].lower()
        for known in (name, name.removesuffix("-instruct"), name.removesuffix("-base")):
            if known in SHAPES:
                return SHAPES[known]
        raise ConfigError(
            f"the shape of model {str(source)!r} is unknown: there is no folder of that name with a config.json. "
            f"Give a model folder, or one of {', '.join(SHAPES)}."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        raw = raw.get("text_config", raw)
        width, heads = _size(raw, "width"), _size(raw, "heads")
        shape = ModelShape(
            layers=_size(raw, "layers"),
            width=width,
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or width // heads),
            ffn=_size(raw, "ffn", 4 * width if "n_embd" in raw else None),
            vocab=int(raw["vocab_size"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} does not describe a Llama-like model: {type(error).__name__} {error}.") from None
    if others := sorted(key for key, value in raw.items() if value and re.fullmatch(OTHERS, key)):
        raise ConfigError(
            f"{file} does not describe a Llama-like model: it sets {others[0]}, and only plain attention and one "
            "feed-forward network in each layer are counted. Measure memory with a run of one step instead."
        )
    return shape


NAMES = {
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
}
"""What models call their sizes in config.json."""
OTHERS = r"(num|n|moe)_.*experts|num_experts|kv_lora_rank|.*mamba.*|.*ssm.*|linear_num_.*|state_size"
"""Settings of layers that are not those of a Llama."""


def _size(raw: JsonView, of: str, default: int | None = None) -> int:
    """A size by any of its names. Raises KeyError if it has none and there is no default."""
    found = next((raw[name] for name in NAMES[of] if raw.get(name)), default)
    if found is None:
        raise KeyError(NAMES[of][0])
    return int(found)
