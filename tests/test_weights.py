"""Every tensor of a checkpoint is loaded, every parameter was in it, and a path means one model in every command."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import posttrain as pt
from posttrain import api
from posttrain.config import ModelConfig
from posttrain.models import lora
from posttrain.models.adapters import adapter_rank
from posttrain.models.load import load_policy, save_pretrained, trainable
from posttrain.models.policy import Policy, states
from posttrain.models.preflight import refusal
from posttrain.models.weights import base_of, check_loaded, chosen, content_files
from posttrain.store.run import Run
from posttrain.train.reference import frozen_reference
from posttrain.types import ConfigError, ResumeError, Sample, TemplateError
from tests import tiny
from tests.lower_bounds import ROOT, lower_bounds

SMALL: dict[str, Any] = {"rollout__max_tokens": 6, "rollout__slots": 32, "prompts": 2, "group_size": 4, "problems": 2,
                         "count": 16, "threads": 1}  # fmt: skip
TENSORS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def odd(completion: str, answer: str, **task: Any) -> float:
    return float(len(completion) % 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as PEFT and the trainers built on it leave it: its weights, and its base model's path."""
    out = tmp_path_factory.mktemp("models") / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # PEFT uses a deprecated transformers name
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(str(out))
    return out


def logits(policy: Policy) -> torch.Tensor:
    policy.model.eval()
    with torch.no_grad():
        tokens, lengths = torch.cat([torch.arange(5, 25), torch.arange(30, 40)]), torch.tensor([20, 10])
        return policy.logits(states(policy, tokens, lengths, (), torch.arange(30)))


# --- conservation ----------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {f"base_model.model.{k}": v for k, v in t.items()}, r"21 of its 21 .* random .* and 20 tensors"),
        (without(NORM), rf"1 of its 21 parameters .*the first is '{NORM}'"),
        (lambda t: t | {"v_head.summary.weight": torch.ones(3)}, r"1 tensors of the checkpoint are not used .*v_head"),
        (
            lambda t: t | {NORM: torch.ones(7)},
            rf"1 tensors have another shape .*\({NORM} is \(7,\), expected \(32,\)\)",
        ),
    ],
)
def test_a_checkpoint_that_is_not_the_model_is_refused_with_a_count_and_a_name(
    folder: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], says: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / TENSORS
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=says):
        load_policy(ModelConfig(path=str(tmp_path / "model")))


def _cut(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:1000])


def _no_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("*token*"), *folder.glob("vocab*")]:
        file.unlink()


def _bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def _nan(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _nan_in_a_row_of_no_text(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["model.embed_tokens.weight"][-1] = float("nan")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _integers(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors[NORM] = (100 * tensors[NORM]).to(torch.int8)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2,')


def _no_end(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": None}))
    for file in (folder / "config.json", folder / "generation_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [-1, 9999]}))


def _wrong_type(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "num_hidden_layers": "two"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    {
        "cut": (_cut, r"model/model.safetensors is damaged or cut short \(.+\)\. Download or copy it again\."),
        "no tokenizer": (_no_tokenizer, r"model folder '.*' has no tokenizer\. "),
        "bad tokenizer": (_bad_tokenizer, r"the tokenizer of model '.*' cannot be loaded: \w+: \w+"),
        "not finite": (_nan, r"is damaged: 1 of its parameters hold NaN or infinity \(.*'model.norm.weight'\)"),
        "not finite where no row looks": (_nan_in_a_row_of_no_text, "hold NaN .*'model.embed_tokens.weight'"),
        "integers": (
            _integers,
            rf"1 weights that are not floating-point .*'{NORM}', I8\).* quantization_config",
        ),
        "bad generation config": (_bad_generation_config, r"generation_config.json cannot be read: "),
        "no end": (_no_end, r"has no end-of-sequence token, so no completion could end"),
        "wrong type": (_wrong_type, r"cannot be loaded: .*'num_hidden_layers': .*expected int"),
        "absent": (shutil.rmtree, r"model folder '.*' does not exist"),
    }.values(),
)
def test_a_damaged_folder_is_refused_in_a_sentence_that_names_what_is_wrong(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises((ConfigError, TemplateError), match=says):
        load_policy(ModelConfig(path=str(tmp_path / "model")))


def test_what_a_folder_says_and_is_not_used_is_noted(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    shutil.copy(model / TENSORS, model / "consolidated.safetensors")
    about = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**about, "eos_token_id": [2, 5, 9999, -1]}))
    policy = load_policy(ModelConfig(path=str(model)))
    assert policy.stop_ids[:2] == (2, 5) and not {9999, -1} & {*policy.stop_ids}
    assert policy.notes == [
        f"1 safetensors files of {model} are not read; the first is consolidated.safetensors.",
        f"eos_token_id 9999, -1 of {model} is not used: the model has no such token.",
    ]


def test_remote_code_is_refused_without_asking(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    about = {**json.loads((model / "config.json").read_text()), "model_type": "theirs"}
    about["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run remote code"))
    with pytest.raises(ConfigError, match="cannot be loaded: .*custom code"):
        load_policy(ModelConfig(path=str(model)))


def test_a_missing_base_model_is_named_with_its_adapter(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    about = tmp_path / "adapter" / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(
        ConfigError, match="base model of adapter .*/adapter' cannot be loaded: .*'/gone/base' does not"
    ):
        load_policy(ModelConfig(path=str(tmp_path / "adapter")))


def test_tied_weights_are_in_the_checkpoint_once_and_other_modalities_are_counted(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / TENSORS)
    policy = load_policy(ModelConfig(path=str(folder)))
    assert policy.notes == []
    info = {"missing_keys": set[str](), "mismatched_keys": set[str]()}
    info["unexpected_keys"] = {"model.vision_tower.a.weight", "mtp.layers.0.weight"}
    (note,) = check_loaded(policy.model, info, "m")
    assert note == "2 tensors of m are not used; the first is model.vision_tower.a.weight."


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ResumeError, match="step_0000009 does not exist; .* has checkpoints of the steps none"):
        chosen(tmp_path, tmp_path / "ckpt" / "step_0000009")


@pytest.mark.parametrize("inside", ["ckpt", ""])
def test_a_folder_of_checkpoints_or_models_is_refused_with_those_in_it(
    folder: Path, tmp_path: Path, inside: str
) -> None:
    place = tmp_path / "run" / inside
    for name in ("step_0000001", "step_0000002"):
        shutil.copytree(folder, place / name)
    with pytest.raises(ConfigError) as refused:
        load_policy(ModelConfig(path=str(place)))
    newest = "step_0000002 or" if inside else "step_0000001 or"
    assert f"{place} is not a model, but holds".replace(str(place), f"'{place}'") in str(refused.value)
    assert f"give {place}/{newest} {place}/step_" in str(refused.value)
    assert refusal(ModelConfig(path=str(place))) == str(refused.value)


def test_a_folder_beside_the_checkpoints_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "ckpt" / "old").mkdir(parents=True)
    with pytest.raises(ResumeError, match="old is not a checkpoint; .* has checkpoints of the steps none"):
        chosen(tmp_path, tmp_path / "ckpt" / "old")
    for inside in ("ckpt", "ckpt/old"):
        with pytest.raises(ResumeError, match=f"{inside} holds no run: .* belongs to the run {tmp_path}: give that"):
            Run.read(tmp_path / inside)


# --- the same model in every command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every kind of path that names a model."""
    root = tmp_path_factory.mktemp("runs")
    whole = pt.grpo(str(folder), "sums", odd, root / "whole", steps=2, lr=1e-2, checkpoint_every=1, **SMALL).folder
    light = pt.grpo(str(folder), "sums", odd, root / "light", steps=2, lr=1e-2, lora_rank=2, **SMALL).folder
    on_adapter = pt.grpo(str(adapter), "sums", odd, root / "on", steps=1, lr=1e-2, lora_rank=2, **SMALL).folder
    further = pt.grpo(
        str(adapter), "sums", odd, root / "further", steps=1, lr=1e-2, continue_adapter=True, kl_coef=0.1, **SMALL
    ).folder
    return {
        "model folder": str(folder),
        "adapter": str(adapter),
        "run": str(whole),
        "checkpoint": str(whole / "ckpt" / "step_0000001"),
        "LoRA run": str(light),
        "export of a LoRA run": str(light / "model"),
        "LoRA run on an adapter": str(on_adapter),
        "run that trained an adapter further": str(further),
    }


KINDS = ["model folder", "adapter", "run", "checkpoint", "LoRA run", "export of a LoRA run", "LoRA run on an adapter",
         "run that trained an adapter further"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_model_that_eval_reads(folders: dict[str, str], kind: str) -> None:
    path = folders[kind]
    read = logits(api.open_policy(path))
    settings = [{}, {"lora_rank": 2}] + [{"continue_adapter": True}] * (kind == "adapter")
    for more in settings:
        started = load_policy(ModelConfig(path=path, **more))
        torch.testing.assert_close(logits(started), read, rtol=0, atol=2e-5)
        assert trainable(started)
    assert content_files(path) and (Path(base_of(path)) / "config.json").is_file()


def test_what_was_loaded_is_noted_once_in_the_run(folders: dict[str, str]) -> None:
    with Run.read(Path(folders["LoRA run on an adapter"])) as run:
        notes = [event.message for event in run.events()]
    assert sum("is a PEFT adapter; it was merged" in note for note in notes) == 1 and len(notes) == len({*notes})


def test_notes_on_the_other_models_of_a_run_are_in_it_with_their_role(
    folder: Path, adapter: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {key: value for key, value in SMALL.items() if key != "group_size"}
    runs: dict[str, tuple[str, str, dict[str, Any]]] = {
        "teacher": ("distill", "sums", {**small, "teacher": str(adapter)}),
        "reference": ("dpo", str(pairs), {"reference": str(adapter), "threads": 1}),
    }
    for role, (algorithm, tasks, settings) in runs.items():
        done = api.train(algorithm, str(folder), tasks, out=tmp_path / role, steps=1, **settings)
        with Run.read(done.folder) as run:
            notes = [event.message for event in run.events() if event.step == 0]
        assert sum(note.startswith(f"{role}: {adapter} is a PEFT adapter") for note in notes) == 1, notes


def test_runs_and_adapters_are_other_models_than_their_base(folders: dict[str, str]) -> None:
    found = {kind: logits(api.open_policy(path)) for kind, path in folders.items()}
    same = ("LoRA run", "export of a LoRA run")
    for one in KINDS:
        for other in KINDS:
            if one < other and {one, other} != set(same):
                assert not torch.allclose(found[one], found[other], rtol=0, atol=1e-4), (one, other)
    torch.testing.assert_close(found[same[0]], found[same[1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}, {"continue_adapter": True}])
def test_the_reference_is_the_starting_model_whatever_has_been_trained_since(
    adapter: Path, more: dict[str, Any]
) -> None:
    cfg = ModelConfig(path=str(adapter), **more)
    policy = load_policy(cfg)
    tokens = np.arange(5, 25)
    row = Sample(tokens, np.arange(20) > 3, np.zeros(20, np.float32), np.zeros(20, np.float32))
    start = logits(policy)
    first = frozen_reference(cfg, policy, 100, 1.0)([row])[0]
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter.add_(0.05)
    assert not torch.allclose(logits(policy), start, atol=1e-3)
    names = set(trainable(policy))
    assert np.array_equal(frozen_reference(cfg, policy, 100, 1.0)([row])[0], first)
    assert set(trainable(policy)) == names, "the switch to the reference and back changed what trains"
    expected = torch.log_softmax(start[:20], -1)[3:-1].gather(1, torch.from_numpy(tokens[4:, None]))[:, 0]
    np.testing.assert_allclose(first[4:], expected, atol=2e-5)


def test_an_adapter_that_is_trained_further_keeps_its_names_and_is_merged_in_the_export(
    adapter: Path, tmp_path: Path
) -> None:
    policy = load_policy(ModelConfig(path=str(adapter), continue_adapter=True))
    assert all(".default." in name for name in trainable(policy))
    assert not any(isinstance(module, torch.nn.Dropout) for module in policy.model.modules())
    save_pretrained(policy, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(api.open_policy(str(tmp_path / "out"))), logits(policy), rtol=0, atol=2e-5)


def test_a_run_that_trains_an_adapter_further_resumes_bit_exactly(
    adapter: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    settings = {"steps": 2, "lr": 1e-2, "kl_coef": 0.1, "continue_adapter": True, "checkpoint_every": 1, **SMALL}
    whole = pt.grpo(str(adapter), "sums", odd, tmp_path / "whole", **settings)

    class Killed(Exception):
        pass

    def kill(step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        pt.grpo(str(adapter), "sums", odd, tmp_path / "cut", on_step=kill, **settings)
    again = pt.resume(tmp_path / "cut", reward=odd)
    assert whole.summary and again.summary and whole.summary["weights"] == again.summary["weights"]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({"base_model_name_or_path": None}, "names no base model"),
    "itself": ({"base_model_name_or_path": "HERE"}, "names itself"),
    "nowhere": ({"base_model_name_or_path": "./nowhere"}, "model folder './nowhere' does not exist"),
    "other layers": ({"target_modules": ["q_proj"]}, "adapter weights have no place in it"),
    **{
        f"r={r!r}": ({"r": r}, rf"has r={re.escape(repr(r))}, expected a whole number of at least 1")
        for r in (0, -4, "8", 2.5, True, None, [4])
    },
    **{
        f"alpha={a!r}": ({"lora_alpha": a}, r"has lora_alpha=.*, expected a number other than 0")
        for a in (0, "16", None, float("nan"))
    },
    "bias": ({"bias": "some"}, "has bias='some', expected none, all or lora_only"),
    "ranks": ({"rank_pattern": {"q_proj": 0}}, "has rank_pattern=.*, expected a table"),
    "modules": ({"target_modules": [1]}, "has target_modules=.*, expected a name or a list of names"),
    "lower case": ({"peft_type": "lora"}, "has peft_type='lora', which PEFT .* does not know"),
    "no type": ({"peft_type": None}, "has peft_type=None, .* most adapters are of type LORA"),
    "a list as type": ({"peft_type": ["LORA"]}, "has peft_type=.*, which PEFT .* does not know"),
    "of other rank": ({"r": 8}, "adapter '.*' cannot be loaded: .*size mismatch"),
    "a prompt": ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "cannot be|does not fit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_cannot_be_merged_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    change, says = BROKEN[name]
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    text = json.dumps(json.loads(file.read_text()) | change)
    file.write_text(text.replace("HERE", str(tmp_path / "adapter")))
    for further in (False, True):
        cfg = ModelConfig(path=str(tmp_path / "adapter"), continue_adapter=further)
        with pytest.raises(ConfigError, match=f"{says}|cannot be trained further" if further else says) as refused:
            load_policy(cfg)
        if name not in ("other layers", "a prompt", "of other rank"):  # these take the weights to notice
            assert refusal(cfg) == str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    {
        "cut": ("{", "adapter_config.json cannot be read: "),
        "empty": ("", "adapter_config.json cannot be read: "),
        "a list": ("[]", "holds a list, expected an object"),
        "nothing in it": ("{}", "has peft_type=None"),
        "only its type": ('{"peft_type": "LORA"}', "has no r, expected a whole number"),
        "no alpha": ('{"peft_type": "LORA", "r": 4}', "has no lora_alpha, expected a number"),
    }.values(),
)
def test_a_damaged_configuration_of_an_adapter_is_refused(adapter: Path, tmp_path: Path, text: str, says: str) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    for read in (lambda path: load_policy(ModelConfig(path=path)), content_files, base_of, adapter_rank):
        with pytest.raises(ConfigError, match=says):
            read(str(tmp_path / "adapter"))


def test_settings_of_an_adapter_that_do_not_apply_are_refused(folder: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a PEFT adapter"):
        load_policy(ModelConfig(path=str(folder), continue_adapter=True))
    with pytest.raises(ConfigError, match="with its own rank"):
        pt.grpo(str(adapter), "sums", odd, tmp_path / "run", steps=1, continue_adapter=True, lora_rank=2)
    shutil.copytree(adapter, tmp_path / "dora")
    file = tmp_path / "dora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(ConfigError, match=r"with \['use_dora'\], which cannot be trained further"):
        load_policy(ModelConfig(path=str(tmp_path / "dora"), continue_adapter=True))


# --- LoRA on a mixture of experts ------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
HEAD: dict[str, Any] = {"head_dim": 8}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(**SHAPE, **MOE, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SHAPE, **MOE, **HEAD, num_experts=4),
    "granite-moe": lambda: transformers.GraniteMoeConfig(**SHAPE, num_experts_per_tok=2, num_local_experts=4),
    "glm4-moe": lambda: transformers.Glm4MoeConfig(
        **SHAPE, **MOE, **HEAD, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}


MATRICES = {"llama": (2 * 7, 0), "mixtral": (2 * 7, 2), "qwen2-moe": (2 * 11, 2), "qwen3-moe": (2 * 7, 2),
            "granite-moe": (2 * 7, 2), "glm4-moe": (7 + 10, 1), "gpt-oss": (2 * 7, 2)}  # fmt: skip
"""Weight matrices of the layers, counted by hand (four of attention, the MLP's or the experts', routers), and how many
of them are left out: the routers. The biases of GPT-OSS's experts are two-dimensional, but no matrices."""


def test_the_note_on_lora_counts_matrices_and_not_the_biases_of_experts(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    transformers.AutoModelForCausalLM.from_config(MODELS["gpt-oss"]()).save_pretrained(tmp_path)
    notes = load_policy(ModelConfig(path=str(tmp_path), lora_rank=2)).notes
    first = "model.layers.0.mlp.router.weight"
    assert f"LoRA leaves 2 of 14 weight matrices without an adapter; the first is {first}." in notes


@pytest.mark.parametrize("name", MODELS)
def test_lora_adapts_every_linear_layer_and_every_expert_and_merging_changes_no_logit(name: str) -> None:
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    rows = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        before = plain(rows, use_cache=False).logits
    whole_linears = [(n, m) for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)]
    names = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    model = lora.attach(plain, 2, 8).eval()
    learns = {lora._plain(n).split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    left = lora.not_adapted(model)
    assert all("gate.weight" in n or "router" in n for n in left), left
    assert (len(lora.matrices(model)), len(left)) == MATRICES[name]
    missed = [n for n, m in whole_linears if f"{n}.weight" in left]
    assert not missed, missed
    assert len(learns) > 4
    with torch.no_grad():
        torch.testing.assert_close(model(rows, use_cache=False).logits, before, rtol=0, atol=1e-6)
        for n, parameter in model.named_parameters():
            if "lora_B" in n:
                parameter.normal_(0, 0.3)
        adapted = model(rows, use_cache=False).logits
        assert not torch.allclose(adapted, before, atol=1e-3)
        with lora.disabled(model):
            torch.testing.assert_close(model(rows, use_cache=False).logits, before, rtol=0, atol=1e-6)
        whole = lora.merged(model)
        torch.testing.assert_close(whole(rows, use_cache=False).logits, adapted, rtol=0, atol=3e-5)
    sent, saved = dict(lora.merged_weights(model)), dict(whole.named_parameters(remove_duplicate=False))
    assert set(sent) == set(saved) == names
    for key, tensor in sent.items():
        torch.testing.assert_close(tensor, saved[key], rtol=0, atol=1e-6)


# --- versions --------------------------------------------------------------------------------------------------------


def test_every_requirement_has_a_lower_bound_that_is_met_here_and_the_guide_says_which_were_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = lower_bounds()
    assert len(lowest) == len(project["dependencies"]), "a requirement has no plain lower bound"
    for name, version in lowest.items():
        assert Version(metadata.version(name)) >= Version(version), name
    tried = re.findall(r"(?m)^\| (\w+) \| ([\d.]+) \|$", (ROOT / "docs/guides/install.md").read_text(encoding="utf-8"))
    assert tried and all(lowest[name] == version for name, version in tried)
