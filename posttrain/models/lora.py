"""LoRA adapters through PEFT: attach, continue, disable (for the frozen reference), merge."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from posttrain.types import ConfigError, Json

TRAINED = "default"
REFERENCE = "reference"
"""Names of the adapter that trains, and of its frozen copy where an existing adapter is trained further."""
RENAMED = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""Last names of layers that PEFT takes for an older transformers' experts in a mixture of experts. Beside experts, such
a layer is adapted by the name of its weight instead, or it would get no adapter."""
BIAS = re.compile(r"(^|[._])bias(es)?$")
"""Names of biases."""
NOT_CONTINUED = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication")
"""Options of an adapter that change more than the low-rank products of its layers."""


def attach(model: Any, rank: int, alpha: int) -> Any:
    """Adds adapters to every linear layer but the output layer, and to every expert of a mixture of experts.

    Only they train; initially they change no output. Experts that are stored as one 3-D parameter get one adapter of
    the same rank per expert (PEFT's `target_parameters`). `not_adapted` names what is left out.
    """
    experts = expert_parameters(model)
    layers = _linear_layers(model) if experts else []
    renamed = [name for name in layers if name.rpartition(".")[2] in RENAMED]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[name for name in layers if name not in renamed] if experts else "all-linear",
        target_parameters=[*experts, *(f"{name}.weight" for name in renamed)] or None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT uses a deprecated transformers name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def expert_parameters(model: Any) -> list[str]:
    """Names of 3-D parameters (experts, in, out) of the model, other than those of convolutions."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, convolutions)}
    owned = {name: module.named_parameters(prefix=name, recurse=False) for name, module in modules.items()}
    return [name for parameters in owned.values() for name, p in parameters if p.dim() == 3]


def _linear_layers(model: Any) -> list[str]:
    """Names of all linear layers but the output layer. PEFT's "all-linear" misses some beside experts."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def not_adapted(model: Any) -> list[str]:
    """Names of the weight matrices that have no adapter: those of `matrices` that LoRA could have adapted."""
    adapted = _adapted(unwrap(model))
    return [name for name in matrices(model) if name not in adapted]


def matrices(model: Any) -> list[str]:
    """Names, without adapters, of the weights of two or more dimensions but embeddings, output layer and biases.

    The biases of experts that are stored as one parameter (GPT-OSS) are two-dimensional: one row per expert.
    """
    inner = unwrap(model)
    embeddings = [m for m in inner.modules() if isinstance(m, nn.Embedding)]
    apart = {id(p) for module in [*embeddings, inner.get_output_embeddings()] for p in module.parameters()}
    named = {_plain(name): p for name, p in inner.named_parameters() if not _of_adapter(name)}
    return [name for name, p in named.items() if p.dim() >= 2 and id(p) not in apart and not BIAS.search(name)]


def continued(model: PeftModel) -> PeftModel:
    """Prepares a loaded adapter for further training: without dropout, and with a frozen copy as the reference."""
    settings = copy.deepcopy(model.peft_config[TRAINED])
    settings.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a second adapter is what we want
        model.add_adapter(REFERENCE, settings)
    copies = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in copies.items():
            if f".{REFERENCE}." in name:
                parameter.copy_(copies[name.replace(f".{REFERENCE}.", f".{TRAINED}.")])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:  # sampler and learner must compute the same policy
                module.lora_dropout[name] = nn.Identity()
    model.set_adapter(TRAINED)
    return model


def check_continuable(about: Json, name: str) -> None:
    """Raises ConfigError if an adapter's configuration has something that training does not support."""
    used = [option for option in NOT_CONTINUED if about.get(option)]
    if about.get("peft_type") != "LORA" or about.get("bias", "none") != "none" or used:
        what = f"of type {about.get('peft_type')}" if about.get("peft_type") != "LORA" else f"with {used or 'bias'}"
        raise ConfigError(
            f"adapter {name!r} is {what}, which cannot be trained further. Leave model.continue_adapter off: the "
            "adapter is then merged into its base model, and model.lora_rank adds a new one."
        )


def unwrap(model: Any) -> Any:
    """The underlying transformers model; its layers include the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Switches to the starting model within the block, which gives a reference without a second copy of the weights.

    New adapters are disabled; an adapter that is trained further is replaced with its frozen copy.
    """
    if not isinstance(model, PeftModel):
        raise TypeError("only a model with adapters can be its own reference.")
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def merged(model: Any) -> Any:
    """A copy of the model with the adapters merged into its weights; the model itself if it has no adapters."""
    return merge(copy.deepcopy(model)) if isinstance(model, PeftModel) else model


def merge(model: Any) -> Any:
    """Merges the adapters into the weights, in place, and returns the plain transformers model."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def merged_weight(module: Any) -> torch.Tensor:
    """A linear module's effective weight (out, in), including enabled adapters; without adapters it is not a copy."""
    return _effective(module, module.weight.detach())


def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every weight with its name in a model folder, adapters merged; a tied weight appears under each name."""
    inner = unwrap(model)
    adapted = _adapted(inner)
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if not _of_adapter(name):
            plain = _plain(name)
            yield plain, _effective(adapted.get(plain), parameter.detach())


def _effective(module: Any, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(module, LoraLayer) and not module.disable_adapters:
        for adapter in module.active_adapters:
            if adapter in module.scaling:
                weight = weight + module.get_delta_weight(adapter).detach()  # type: ignore[operator]
    return weight


def _adapted(inner: Any) -> dict[str, Any]:
    """The adapter layer of each adapted weight, by the weight's plain name."""
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    return {f"{_plain(name)}.{getattr(m, 'parameter_name', 'weight')}": m for name, m in layers.items()}


def _plain(name: str) -> str:
    """The name that a weight or module has without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))
