"""Reads the model that a path names: a hub id, a model folder, a PEFT adapter, a run or one of its checkpoints.

Nothing is left out silently: every tensor of the checkpoint is in the model, and every parameter of the model was in
the checkpoint, or the path is refused. An adapter is merged into its base model, so that what trains, evaluates and
serves as the reference is the same model; with `model.continue_adapter` it is trained further instead.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open

from posttrain import config
from posttrain.config import ModelConfig, Recipe
from posttrain.models import lora
from posttrain.models.adapters import ADAPTER, base_name, is_adapter, read_adapter, read_json
from posttrain.models.check import first_line
from posttrain.store import checkpoint
from posttrain.store.checkpoint import Checkpoint
from posttrain.store.listing import run_of
from posttrain.store.run import Run
from posttrain.types import ConfigError, JsonView, ResumeError

ABACUS = Path(__file__).parent / "abacus"
SINGLE, SHARDED = "model.safetensors", "model.safetensors.index.json"
OTHER_PARTS = re.compile(
    r"(^|\.)(vision\w*|visual|image\w*|audio\w*|speech\w*|video\w*|multi_modal\w*|mm_projector|mtp)\."
)
"""Names of tensors that a language model in a larger checkpoint does not need: other modalities, extra heads."""
SHOWN = 3
"""Models that an error names."""
_loading = threading.Lock()  # transformers changes process-wide settings while it builds a model


@dataclass(frozen=True)
class Weights:
    """A model with its tokenizer, on the CPU, and notes about what was loaded."""

    model: Any  # PreTrainedModel, or PeftModel where an adapter is trained further
    tokenizer: Any
    notes: list[str] = field(default_factory=list[str])


def resolve_path(path: str) -> str:
    """Resolves `abacus` to the model in the package; anything else is a folder or a hub id."""
    return str(ABACUS) if path == "abacus" else path


def read(cfg: ModelConfig) -> Weights:
    """Loads the model of `cfg.path` in `cfg.dtype`, without new adapters. Raises ConfigError for anything else."""
    place = Path(resolve_path(cfg.path))
    if is_adapter(place):
        return _with_adapter(cfg, place)
    _require_no_continuing(cfg)
    return _whole(cfg, str(place)) if (run := run_of(place)) is None else _of_run(cfg, run, place)


def built_on(cfg: ModelConfig) -> ModelConfig | None:
    """The model that `cfg.path` is built on: the base of an adapter, or the model of a run; None for a folder or hub
    id. Raises ConfigError or ResumeError for what can be refused without loading weights."""
    place = Path(resolve_path(cfg.path))
    if is_adapter(place):
        return _base_of_adapter(cfg, place)
    _require_no_continuing(cfg)
    return None if (run := run_of(place)) is None else _start_of_run(cfg, run, place)[1]


def _require_no_continuing(cfg: ModelConfig) -> None:
    if cfg.continue_adapter:
        raise ConfigError(
            f"model.continue_adapter is set, but {cfg.path!r} is not a PEFT adapter: it has no {ADAPTER}."
        )


def base_of(path: str) -> str:
    """The folder or hub id that has the config.json of the model that `path` names; for a plain model, `path`."""
    place = Path(resolve_path(path))
    if is_adapter(place):
        return base_of(base_name(place, read_adapter(place)))
    if (run := run_of(place)) is not None:
        return str(run / "model") if (run / "model").is_dir() else base_of(recipe_of(run).model.path)
    return str(place) if path == "abacus" else path


def content_files(path: str) -> list[Path]:
    """The files on this machine that determine the weights and tokenizer of `path`, in order; none for a hub id."""
    place = Path(resolve_path(path))
    if not place.is_dir():
        return []
    if (run := run_of(place)) is not None:
        saved = chosen(run, place)
        if saved is None:
            return content_files(str(run / "model"))
        return [*content_files(recipe_of(run).model.path), saved.path / "MANIFEST.json"]
    own = sorted([*place.glob("*.safetensors"), *place.glob("tokenizer*.json")])
    if is_adapter(place):
        return [*content_files(base_name(place, read_adapter(place))), place / ADAPTER, *own]
    return own


def chosen(run: Path, place: Path) -> Checkpoint | None:
    """The checkpoint that stands for a run: the folder `place` if it is one of the run's, else the best if the run kept
    one (`run.keep_best`) and has finished, else the newest; None if there is none."""
    if place != run:
        found = [(step, path) for step, path in checkpoint.folders(run) if path.name == place.name]
        if found:
            return Checkpoint(found[0][0], place)
        steps = ", ".join(str(step) for step, _ in checkpoint.folders(run)) or "none"
        what = "is not a checkpoint" if place.is_dir() else "does not exist"
        raise ResumeError(f"{place} {what}; {run} has checkpoints of the steps {steps}.")
    with Run.read(run) as store:
        best = (store.summary() or {}).get("best")
    found = [path for step, path in checkpoint.folders(run) if best and step == best["step"]]
    return Checkpoint(best["step"], found[0]) if best and found else checkpoint.latest(run)


def load_checkpoint(saved: Checkpoint) -> dict[str, torch.Tensor]:
    """The model tensors of a checkpoint, verified, by trainable name."""
    return checkpoint.load(saved.path, only=["model"])[0]["model"]


def _whole(cfg: ModelConfig, source: str) -> Weights:
    """Loads a model folder or hub id and checks that all of it was loaded."""
    require_safetensors(source, cfg.path)
    if (settings := Path(source) / "generation_config.json").is_file():
        read_json(settings)  # transformers would leave out one that is damaged, and with it the stop tokens
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    try:
        with _loading:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with the other faults
                trust_remote_code=False,  # left out, transformers asks on a terminal
            )
    except Exception as error:  # a damaged or foreign folder may raise anything
        raise cannot_load(cfg.path, error) from None
    notes = [*check_loaded(model, info, cfg.path), *check_files(model, Path(source))]
    return Weights(model, load_tokenizer(source, cfg.path), notes)


def load_tokenizer(source: str, name: str) -> Any:
    """The tokenizer of a folder or hub id, which the user calls `name`. Raises ConfigError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign file may raise anything
        here = Path(source)
        if here.is_dir() and not any(here.glob("*token*")) and not any(here.glob("vocab*")):
            raise ConfigError(
                f"model folder {name!r} has no tokenizer. Copy tokenizer.json and the like to it."
            ) from None
        raise ConfigError(f"the tokenizer of model {name!r} cannot be loaded: {first_line(error)}") from None


def check_loaded(model: Any, info: JsonView, name: str) -> list[str]:
    """Checks transformers' loading info: every parameter was in the checkpoint, and every tensor of it is in the model.

    Tensors of other parts of a larger checkpoint (OTHER_PARTS) are counted in a note. Raises ConfigError otherwise.
    """
    shapes = {key: f"{key} is {tuple(have)}, expected {tuple(want)}" for key, have, want in info["mismatched_keys"]}
    missing = sorted(set(info["missing_keys"]) - shapes.keys())
    unused = sorted(set(info["unexpected_keys"]) - shapes.keys())
    other = [key for key in unused if OTHER_PARTS.search(key)]
    strange = [key for key in unused if key not in other]
    faults: list[str] = []
    if missing:
        count = len(list(model.named_parameters(remove_duplicate=False)))
        faults.append(
            f"{len(missing)} of its {count} parameters are not in the checkpoint and would be random (the first is "
            f"{missing[0]!r})"
        )
    if shapes:
        faults.append(
            f"{len(shapes)} tensors have another shape than its config.json says ({next(iter(shapes.values()))})"
        )
    if strange:
        faults.append(f"{len(strange)} tensors of the checkpoint are not used (the first is {strange[0]!r})")
    if faults:
        raise ConfigError(
            f"model {name!r} is not loaded completely as {type(model).__name__}: {', and '.join(faults)}. Save it "
            "again with transformers' save_pretrained, or correct config.json."
        )
    return [f"{len(other)} tensors of {name} are not used; the first is {other[0]}."] if other else []


def check_files(model: Any, folder: Path) -> list[str]:
    """Notes the safetensors files of a model folder that transformers does not read; nothing for a hub id.

    Raises ConfigError if weights are stored as integers or the like without a `quantization_config`: their scale is
    unknown, and transformers would take the integers themselves.
    """
    if not folder.is_dir():
        return []
    index = folder / SHARDED
    read = [folder / SINGLE]
    if not read[0].is_file():
        read = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    names = {name for name, _ in model.named_parameters()}
    for file in read if getattr(model.config, "quantization_config", None) is None else []:
        with safe_open(file, "pt") as stored:
            kinds = {key: stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118 (no mapping)
        odd = [key for key, kind in kinds.items() if not re.match("B?F", kind) and (key in names or "weight" in key)]
        if odd:
            raise ConfigError(
                f"{file} holds {len(odd)} weights that are not floating-point numbers (the first is {odd[0]!r}, "
                f"{kinds[odd[0]]}), and its config.json has no quantization_config. Save it in bfloat16 or float32."
            )
    unread = sorted(file.name for file in folder.glob("*.safetensors") if file not in read)
    if not unread:
        return []
    return [f"{len(unread)} safetensors files of {folder} are not read; the first is {unread[0]}."]


def _base_of_adapter(cfg: ModelConfig, folder: Path) -> ModelConfig:
    about = read_adapter(folder)
    base = base_name(folder, about)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"adapter {cfg.path!r} has no adapter_model.safetensors. Save it again with a current PEFT.")
    if cfg.continue_adapter:
        lora.check_continuable(about, cfg.path)
    return replace(cfg, path=base, continue_adapter=False)


def no_base(cfg: ModelConfig, error: ConfigError) -> ConfigError:
    """The error for a model whose base model is refused."""
    return ConfigError(f"the base model of adapter {cfg.path!r} cannot be loaded: {error}")


def _with_adapter(cfg: ModelConfig, folder: Path) -> Weights:
    """Loads the base model of a PEFT adapter and the adapter, merged unless `continue_adapter`."""
    on = _base_of_adapter(cfg, folder)
    try:
        base = read(on)
    except ConfigError as error:
        raise no_base(cfg, error) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys, which are checked below, and of PEFT's own deprecations
            model = PeftModel.from_pretrained(base.model, str(folder), is_trainable=cfg.continue_adapter)
            result = model.load_adapter(str(folder), "default", is_trainable=cfg.continue_adapter)
    except Exception as error:
        raise cannot_load(cfg.path, error, "adapter") from None
    tokenizer = load_tokenizer(str(folder), cfg.path) if (folder / "tokenizer.json").is_file() else base.tokenizer
    for keys, what in ((result.missing_keys, "have no tensor in it"), (result.unexpected_keys, "have no place in it")):
        if keys:
            raise ConfigError(
                f"adapter {cfg.path!r} does not fit its base model {on.path!r}: {len(keys)} adapter weights {what} "
                f"(the first is {sorted(keys)[0]!r})."
            )
    if cfg.continue_adapter:
        return Weights(lora.continued(model), tokenizer, base.notes)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ConfigError(
            f"adapter {cfg.path!r} is of type {read_adapter(folder)['peft_type']}, which cannot be merged. Use LoRA."
        )
    note = f"{cfg.path} is a PEFT adapter; it was merged into its base model {on.path}."
    return Weights(_merged(model), tokenizer, [*base.notes, note])


def _start_of_run(cfg: ModelConfig, run: Path, place: Path) -> tuple[Checkpoint | None, ModelConfig]:
    """The checkpoint that `place` names, and the model that it belongs to; without one, the run's export."""
    saved, recipe = chosen(run, place), recipe_of(run)
    if saved is not None:
        return saved, replace(recipe.model, dtype=cfg.dtype)
    if not (run / "model").is_dir():
        raise ResumeError(f"{run} has no checkpoint yet; resume it, or use its base model {recipe.model.path!r}.")
    return None, replace(cfg, path=str(run / "model"))


def _of_run(cfg: ModelConfig, run: Path, place: Path) -> Weights:
    """Loads the model of a run's checkpoint, with its adapters merged."""
    saved, on = _start_of_run(cfg, run, place)
    recipe, base = recipe_of(run), read(on)
    if saved is None:
        return base
    model = base.model
    if recipe.model.lora_rank:
        model = lora.attach(model, recipe.model.lora_rank, recipe.model.lora_alpha)
    tensors = {name: t for name, t in load_checkpoint(saved).items() if not name.startswith("scalar.")}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(tensors.keys() - parameters.keys())
    if recipe.facts().trains != "scorer":  # which leaves out the frozen output layer
        odd = sorted(tensors.keys() ^ parameters.keys())
    if odd:
        raise ResumeError(
            f"{saved.path} does not fit {recipe.model.path!r}: {len(odd)} names differ, first {odd[0]!r}."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    note = f"{cfg.path} is a run; training starts from its checkpoint of step {saved.step}."
    return Weights(_merged(model), base.tokenizer, [*base.notes, note])


def _merged(model: Any) -> Any:
    """The model with its adapters merged, all of which trains again: PEFT freezes what it adapts."""
    return lora.merge(model).requires_grad_(True)


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run."""
    with Run.read(run) as store:
        return config.stored(store.header["algorithm"], store.header["recipe"])


def cannot_load(name: str, error: Exception, kind: str = "model") -> ConfigError:
    """The error for a model or adapter that transformers or PEFT cannot load."""
    if isinstance(error, ConfigError):
        return error
    place = Path(name)
    for file in sorted(place.glob("*.safetensors")):
        require_whole(file)
    kind_of, custom = _unknown_type(place)
    if custom:
        return ConfigError(
            f"{kind} {name!r} cannot be loaded: its model_type={kind_of!r} is custom code (auto_map), which posttrain "
            "does not run. Use a model whose type transformers knows."
        )
    if kind_of:
        return ConfigError(
            f"{kind} {name!r} cannot be loaded: its config.json has model_type={kind_of!r}, which transformers "
            f"{transformers.__version__} does not know. Use a version of transformers that does, or another model."
        )
    where = "" if place.exists() else "there is no such folder, and for the hub id "
    return ConfigError(f"{kind} {name!r} cannot be loaded: {where}{first_line(error)}")


def _unknown_type(folder: Path) -> tuple[str, bool]:
    """A folder's model type if transformers does not know it, else empty; and whether it is code in the folder."""
    try:
        about = read_json(folder / "config.json")
    except ConfigError:  # another fault, which the caller's error names
        return "", False
    kind = str(about.get("model_type") or "")
    return ("", False) if kind in transformers.CONFIG_MAPPING else (kind, bool(about.get("auto_map")))


def require_whole(file: Path) -> None:
    """Raises ConfigError if the header of a safetensors file does not fit its size."""
    try:
        with safe_open(file, "pt"):
            return
    except Exception as error:  # of safetensors, or of the file system
        raise ConfigError(f"{file} is damaged or cut short ({first_line(error)}). Download or copy it again.") from None


def require_safetensors(source: str, name: str) -> None:
    """Raises ConfigError if a path is neither a folder with safetensors files nor a hub id."""
    folder = Path(source)
    if not folder.exists():
        if os.sep in name and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise ConfigError(f"model folder {name!r} does not exist.")
        return  # a hub id: from_pretrained(use_safetensors=True) rejects other formats
    if not folder.is_dir():
        raise ConfigError(f"model {name!r} is a file. Give the folder that holds config.json and model.safetensors.")
    if list(folder.glob("*.safetensors")):
        return
    if inside := models_in(folder):
        more = f" ({len(inside) - SHOWN} more)" if len(inside) > SHOWN else ""
        kind = "the checkpoints of a run" if folder.name == "ckpt" else "models"
        raise ConfigError(
            f"model folder {name!r} is not a model, but holds {kind}: give {' or '.join(inside[:SHOWN])}{more}."
        )
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
    found = f" (only {pickles[0]}, a pickle file that could run code)" if pickles else ""
    raise ConfigError(f"model folder {name!r} has no *.safetensors file{found}. Convert the weights first.")


def models_in(folder: Path) -> list[str]:
    """The runs, checkpoints and model folders directly in a folder, checkpoints from the newest."""
    if folder.name == "ckpt":
        return [str(path) for _, path in checkpoint.folders(folder.parent)]
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    return [str(p) for p in inside if run_of(p) or is_adapter(p) or any(p.glob("*.safetensors"))]
