"""LoRA adapters through PEFT: attach, disable (for the frozen reference), merge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer


def attach(model: Any, rank: int, alpha: int) -> Any:
    """Adds adapters to every linear layer but the output layer. Only they train; initially they change no output."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # PEFT uses a deprecated transformers name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def unwrap(model: Any) -> Any:
    """The underlying transformers model; its layers include the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Disables the adapters within the block, which gives the reference model without a second copy of the weights."""
    if not isinstance(model, PeftModel):
        raise TypeError("only a model with adapters can be its own reference.")
    with model.disable_adapter():
        yield


def merged(model: Any) -> Any:
    """A copy of the model with the adapters merged into its weights; the model itself if it has no adapters."""
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model


def merged_weight(module: Any) -> torch.Tensor:
    """A linear module's effective weight (out, in), including enabled adapters; without adapters it is not a copy."""
    weight = module.weight.detach()
    if isinstance(module, LoraLayer) and not module.disable_adapters:
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter).detach()  # type: ignore[operator]
    return weight


def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every weight with its name in a model folder, adapters merged; a tied weight appears under each name."""
    inner = unwrap(model)
    adapted: dict[str, Any] = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        at = name.partition(".base_layer.")[0]
        if at not in adapted:
            if not any(name.startswith(f"{layer}.lora_") for layer in adapted):
                yield name, parameter.detach()
            continue
        weight = merged_weight(adapted[at]) if name.endswith(".weight") else parameter.detach()
        yield name.replace(".base_layer.", "."), weight
