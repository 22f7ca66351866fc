"""Checks a model on this machine as far as that is possible without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from posttrain.config import ModelConfig
from posttrain.models import weights
from posttrain.models.adapters import is_adapter
from posttrain.models.load import check_tokenizer, stop_ids_of
from posttrain.types import ConfigError, PosttrainError


def refusal(cfg: ModelConfig) -> str:
    """Why training would refuse the model of `cfg.path`, in a sentence; empty if nothing speaks against it.

    Reads the configuration, the headers of the weights and the tokenizer, of an adapter and of its base model. A hub id
    is not looked up. What only the weights show (their names, NaN, the forward passes) is checked when training starts.
    """
    try:
        _check(cfg)
    except PosttrainError as error:
        return str(error)
    return ""


def _check(cfg: ModelConfig) -> None:
    place = Path(weights.resolve_path(cfg.path))
    if (base := weights.built_on(cfg)) is not None:
        try:
            return _check(base)
        except ConfigError as error:
            raise (weights.no_base(cfg, error) if is_adapter(place) else error) from None
    weights.require_safetensors(str(place), cfg.path)
    if not place.is_dir():
        return
    for file in sorted(place.glob("*.safetensors")):
        weights.require_whole(file)
    try:
        about = transformers.AutoConfig.from_pretrained(str(place), trust_remote_code=False)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(about)
    except Exception as error:  # a damaged or foreign folder may raise anything
        raise weights.cannot_load(cfg.path, error) from None
    tokenizer = weights.load_tokenizer(str(place), cfg.path)
    stop_ids_of(model, tokenizer, cfg.path)
    check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
