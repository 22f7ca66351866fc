"""The plan of a run: parts add up, more never needs less, hand-worked bytes, and a real run's peak beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from bench import memory
from posttrain import config
from posttrain.cli import main as cli
from posttrain.cli.arguments import options_of, read_recipe
from posttrain.models.load import llama_config, load_policy
from posttrain.models.preflight import refusal
from posttrain.models.shapes import SHAPES, ModelShape, shape_of
from posttrain.planner import estimate
from posttrain.planner import memory as planner
from posttrain.planner.memory import Rows, Where
from posttrain.types import ConfigError, PosttrainError
from tests import tiny

SHAPE = ModelShape(layers=2, width=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=100, tied=True)
ALGORITHMS = [name for name in config.RECIPES if name != "distill"]  # which needs a teacher to be named
few = settings(max_examples=12, deadline=None)
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def recipe(algorithm: str, **settings: Any) -> Any:
    given = {"data.tasks": "rows.jsonl", **{name.replace("__", "."): value for name, value in settings.items()}}
    return config.resolve(algorithm, {}, given)


def peak(algorithm: str, rows: Rows | None = None, **settings: Any) -> int:
    rows = rows or Rows(64, 64)
    return planner.plan_memory(recipe(algorithm, **settings), SHAPES["smollm2-135m"], rows).peak


def update(algorithm: str, rows: Rows) -> int:
    """The peak of a training pass with room for the whole optimizer batch."""
    large = recipe(algorithm, train__micro_batch_tokens=1 << 30)
    return planner.plan_memory(large, SHAPES["smollm2-135m"], rows).of("training pass")


def test_the_planner_needs_nothing_but_the_standard_library_and_types() -> None:
    code = "import sys, posttrain.planner.memory; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_weights_are_counted_by_hand() -> None:
    # a layer: query and output 8·8 each, key and value 8·4 each, three of 8·16, two norms of 8
    assert SHAPE.matrices == 2 * (2 * 64 + 2 * 32 + 3 * 128)
    assert SHAPE.parameters == SHAPE.matrices + 2 * 2 * 8 + 8 + 100 * 8
    assert replace(SHAPE, tied=False).parameters == SHAPE.parameters + 100 * 8
    # rank 3 on each of seven matrices: 3 · (in + out)
    assert SHAPE.adapters(3) == 2 * 3 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_made_of_a_shape_has_its_weights_and_is_read_as_that_shape(tied: bool, tmp_path: Path) -> None:
    shape = replace(SHAPE, head_dim=6, tied=tied)  # heads need not divide the width
    model = LlamaForCausalLM(llama_config(shape))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    model.save_pretrained(tmp_path)
    assert shape_of(tmp_path) == shape


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smollm2-135m", 134.5),
        ("llama-3.2-1b", 1235.8),
        ("llama-3.1-8b", 8030.3),
        ("llama-2-13b", 13015.9),
        ("llama-3.1-70b", 70553.7),
    ],
)
def test_well_known_shapes_have_the_weights_their_makers_state(name: str, millions: float) -> None:
    assert round(SHAPES[name].parameters / 1e6, 1) == millions


def test_states_and_activations_of_a_small_run_by_hand() -> None:
    small = recipe("sft", batch_rows=4, train__micro_batch_tokens=1024)
    found = planner.plan_memory(small, SHAPE, Rows(6, 4), Where(baseline=1000))
    size = SHAPE.parameters * 4
    assert found.held == {"process": 1000, "weights": size, "optimizer": 2 * size}
    # 4 rows of 10 tokens; a layer keeps per token: query and result 8, key and value 4, four of 8, three of 16
    assert found.phases["training pass"]["activations"] == 2 * 40 * 4 * (2 * 8 + 2 * 4 + 4 * 8 + 3 * 16)
    assert found.phases["training pass"]["the output layer's gradient"] == 100 * 8 * 4
    # gradients, 8 kB, are made one by one where 33 kB of activations were; of several passes all but one find them
    assert found.phases["training pass"]["gradients"] == 0
    several = planner.plan_memory(recipe("sft", batch_rows=4, train__micro_batch_tokens=20), SHAPE, Rows(6, 4))
    assert several.phases["training pass"]["gradients"] == size


def test_what_a_generator_keeps_by_hand() -> None:
    def kept(vocab: int, problems: int) -> dict[str, int]:
        settings = {"prompts": 3, "group_size": 4, "rollout__slots": 64, "rollout__max_tokens": 65}
        asked = recipe("grpo", eval__problems=problems, eval__samples=1, **settings)
        return planner.generator(asked, replace(SHAPE, vocab=vocab), Rows(10, 65), Where())

    # 12 answers in slots of 128 tokens, 3 prompts of 10; a token has 2 · 4 numbers in each of 2 layers
    found = kept(100, 2)
    assert found["weights for decoding"] == (SHAPE.matrices + 100 * 8) * 4
    assert found["KV cache"] == (12 * 128 + 3 * 10) * 16 * 4
    assert found["newest logits"] == 12 * 100 * 4
    assert kept(100, 20)["KV cache"] == (20 * 128 + 20 * 10) * 16 * 4  # an examination reads 20 prompts at once
    assert kept(100, 500)["KV cache"] == (64 * 128 + 65 * 10) * 16 * 4  # as far as there are slots, and one waits
    # an output layer of many words is read where it is
    packed = {vocab: kept(vocab, 2)["weights for decoding"] for vocab in (8192, 8193)}
    assert packed == {8192: (SHAPE.matrices + 8192 * 8) * 4, 8193: SHAPE.matrices * 4}


def test_of_several_blocks_of_logits_the_last_is_alive_while_the_next_is_made() -> None:
    wide, of = SHAPES["qwen2.5-0.5b"], lambda n: planner.projection(recipe("sft"), wide, n, Where())
    rows = (1 << 24) // 151936
    assert of(rows) == rows * 151936 * 4 and of(rows + 1) == 2 * of(rows)


def test_a_groups_prompt_is_computed_once_and_passes_are_of_equal_size() -> None:
    of = lambda room: planner.largest_pass(
        recipe("grpo", prompts=6, group_size=4, micro_batch_tokens=room), Rows(20, 5)
    )
    assert (of(10_000).tokens, of(10_000).trained) == (6 * 40, 6 * 20)
    assert of(200).tokens == 3 * 40  # five groups fit, so two passes, of three each
    assert of(30).tokens == 20 + 2 * 5  # a group alone is split in two


@algorithms
def test_the_parts_add_up_and_none_is_negative(algorithm: str) -> None:
    found = planner.plan_memory(recipe(algorithm), SHAPE, Rows(20, 30))
    parts = [*found.held.values(), *(v for phase in found.phases.values() for v in phase.values())]
    assert all(count >= 0 for count in parts)
    worst = max(sum(phase.values()) for phase in found.phases.values())
    assert found.peak == sum(found.held.values()) + worst == found.of(found.peak_phase)


@few
@algorithms
@pytest.mark.parametrize("setting", ["train__micro_batch_tokens", "rollout__slots", "rollout__max_tokens"])
@given(sizes=st.tuples(st.integers(64, 1 << 15), st.integers(64, 1 << 15)))
def test_more_room_never_needs_less_memory(algorithm: str, setting: str, sizes: tuple[int, int]) -> None:
    if "rollout" in setting and algorithm == "sft":
        return
    less, more = (peak(algorithm, Rows(64, 1), **{setting: size}) for size in sorted(sizes))
    assert more >= less


@few
@algorithms
@given(lengths=st.tuples(st.integers(1, 2000), st.integers(1, 2000), st.integers(16, 2000)))
def test_longer_rows_never_need_less_memory_where_all_fit_one_pass(
    algorithm: str, lengths: tuple[int, int, int]
) -> None:
    (short, long), prompt = sorted(lengths[:2]), lengths[2]
    less, more = (update(algorithm, Rows(prompt, n)) for n in (short, long))
    assert less <= more


@few
@algorithms
@given(rank=st.integers(1, 64))
def test_where_no_heap_keeps_gaps_lora_never_needs_more_than_full_training(algorithm: str, rank: int) -> None:
    less, more = (
        planner.plan_memory(recipe(algorithm, **set_), SHAPES["smollm2-135m"], Rows(64, 64), Where(cuda=True))
        for set_ in ({"model__lora_rank": rank}, {})
    )
    assert less.peak <= more.peak


@algorithms
def test_checkpointing_and_sharding_need_less(algorithm: str) -> None:
    assert peak(algorithm, model__gradient_checkpointing=True) < peak(algorithm)
    one, four = (planner.states(recipe(algorithm), SHAPE, Where(gpus=n)) for n in (1, 4))
    assert one.keys() == four.keys() and all(four[name] == -(-one[name] // 4) for name in one)


def test_a_reference_a_critic_and_a_lagging_sampler_are_models_of_their_own() -> None:
    size = SHAPE.parameters * 4
    states = lambda algorithm, **more: planner.states(recipe(algorithm, **more), SHAPE, Where())
    assert "reference model" not in states("grpo")
    assert states("grpo", kl_coef=0.1)["reference model"] == size
    assert "reference model" not in states("grpo", kl_coef=0.1, model__lora_rank=4)  # adapters off
    assert states("grpo", max_lag=1)["sampler's copy"] == states("grpo", ahead=1)["sampler's copy"] == size
    assert states("grpo", ahead=3)["sampler's copy"] == 4 * size, (
        "the sampler's own, and one of each of the last three updates"
    )
    assert states("ppo")["critic"] == 3 * size and "critic" not in states("ppo", critic="shared")
    assert states("sft", model__dtype="bfloat16")["float32 masters"] == size


def test_a_shape_is_read_from_a_folder_or_known_by_name_or_refused(tmp_path: Path) -> None:
    assert shape_of(tiny.make(tmp_path / "m")) == ModelShape(2, 32, 4, 2, 8, 48, tiny.VOCAB, True)
    assert shape_of("Qwen/Qwen2.5-0.5B-Instruct") == SHAPES["qwen2.5-0.5b"]
    with pytest.raises(ConfigError, match="no folder of that name"):
        shape_of("nobody/nothing")
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ConfigError, match="does not describe a Llama-like model"):
        shape_of(tmp_path)
    gpt2 = {"n_embd": 8, "n_head": 2, "n_layer": 3, "vocab_size": 5, "n_inner": None, "tie_word_embeddings": True}
    assert _shape(tmp_path, gpt2) == _shape(tmp_path, {"text_config": gpt2}) == ModelShape(3, 8, 2, 2, 4, 32, 5, True)
    for name, value in {"num_local_experts": 4, "n_routed_experts": 8, "kv_lora_rank": 16, "mamba_d_state": 8}.items():
        with pytest.raises(ConfigError, match=f"it sets {name}, and only plain attention"):
            _shape(tmp_path, gpt2 | {name: value})


def _shape(folder: Path, config: dict[str, Any]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config))
    return shape_of(folder)


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli.main, ["plan", *args, "--no-probe", "--json"])


def test_the_command_says_whether_a_run_fits_and_what_to_change() -> None:
    wide = json.loads(invoke("demo", "--memory", "64").stdout)
    assert wide["fits"] and wide["changes"] == [] and wide["rows"]["prompt"] < 100  # read from the data itself
    assert wide["peak"] == sum(wide["held"].values()) + sum(wide["phases"][wide["peak_phase"]].values())
    args = ("sft", "--model.path", "Qwen/Qwen2.5-0.5B", "--data.tasks", "rows.jsonl", "--memory", "8")
    tight = json.loads(invoke(*args, "--device", "cuda").stdout)
    assert not tight["fits"] and tight["changes"][0]["setting"] == "train.micro_batch_tokens"
    assert all(change["saves"] > 0 for change in tight["changes"])
    settings = [text for c in tight["changes"] for text in (f"--{c['setting']}", c["value"])]
    assert json.loads(invoke(*args, "--device", "cuda", *settings).stdout)["fits"]


@pytest.mark.parametrize(
    ("args", "said"),
    [([], "name a recipe"), (["sft", "--model.path", "nowhere"], "shape of model 'nowhere' is unknown"),
     (["grpo", "--slotz", "3"], "Did you mean 'slots'"), (["demo", "--memory", "0"], "memory=0 GiB"),
     (["demo", "--gpus", "0"], "gpus=0"), (["demo", "--device", "tpu"], "Give auto, cpu or cuda")],
)  # fmt: skip
def test_the_command_refuses_in_one_sentence(args: list[str], said: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("algorithm", config.RECIPES)
def test_the_commands_that_show_a_recipe_take_the_options_of_its_training_command(
    algorithm: str, tmp_path: Path
) -> None:
    command = cli.main.get_command(click.Context(cli.main), algorithm)
    assert command
    named = {name for p in command.params if isinstance(p, click.Option) for name in p.opts if name != "--json"}
    assert named == {option for option, _, _ in options_of(algorithm)}
    values = {"--preset": next(iter(config.PRESETS.get(algorithm, {})), ""), "--loss": "cispo"}
    (tmp_path / "recipe.toml").write_text(f'algorithm = "{algorithm}"\n')
    for option, setting, _ in options_of(algorithm):
        value = values.get(option, "abacus")
        expected = read_recipe(algorithm, [f"--{setting}", value])
        assert (
            expected == read_recipe(algorithm, [option, value]) == read_recipe(None, [algorithm, f"{option}={value}"])
        )
        assert expected == read_recipe(None, [str(tmp_path / "recipe.toml"), option, value])
        with pytest.raises(ConfigError, match="contradict each other"):
            read_recipe(algorithm, [option, value, f"--{setting}", "another"])


def _no_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("*token*"), *folder.glob("vocab*")]:
        file.unlink()


def _unknown_type(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "model_type": "llamb", "architectures": ["Llamb"]}))


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def _no_end(folder: Path) -> None:
    for file in folder.glob("*config.json"):
        about = json.loads(file.read_text())
        file.write_text(json.dumps({**about, "eos_token_id": None, "eos_token": None}))


@pytest.mark.parametrize("damage", [_no_tokenizer, _unknown_type, _cut, _no_end])
def test_a_plan_says_in_one_sentence_what_training_would_refuse_about_the_model(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    model = tiny.chatty(tmp_path / "model")
    whole = json.loads(invoke("sft", "--model", str(model), "--data", "arithmetic").stdout)
    assert refusal(config.ModelConfig(path=str(model))) == whole["refused"] == ""
    damage(model)
    with pytest.raises(PosttrainError) as training:
        load_policy(config.ModelConfig(path=str(model)))
    plan = json.loads(invoke("grpo", "--model", str(model)).stdout)
    assert plan["refused"] == str(training.value)
    shown = CliRunner().invoke(cli.main, ["plan", "grpo", "--model", str(model), "--no-probe"])
    assert f"training would refuse this run: {training.value}" in shown.output


def test_a_plan_says_what_training_would_refuse_about_the_data(tmp_path: Path) -> None:
    for algorithm, option in {"grpo": "--tasks", "sft": "--data", "dpo": "--data"}.items():
        plan = json.loads(invoke(algorithm, option, str(tmp_path / "gone.jsonl")).stdout)
        assert "gone.jsonl does not exist" in plan["refused"] and plan["peak"]
    rows = [{"prompt": f"{i} {'long ' * 99}", "answer": "1"} for i in range(4)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("grpo", "--tasks", str(tmp_path / "long.jsonl"), "--data.max_prompt_tokens", "50")
    assert "training prompts are longer than data.max_prompt_tokens=50" in json.loads(invoke(*args).stdout)["refused"]


def test_a_run_that_cannot_fit_is_warned_of_with_the_settings_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.planner import estimate

    assert estimate.warning(config.resolve("grpo", {})) == ""
    monkeypatch.setattr(estimate, "machine_memory", lambda cuda: 1 << 30)
    text = estimate.warning(config.resolve("grpo", {}, {"model.path": "qwen2.5-0.5b"}))
    assert "train.micro_batch_tokens = " in text and "1.0 GiB" in text


def test_a_small_real_run_is_predicted_to_within_a_third() -> None:
    row = memory.compare("tiny", threads=1)
    assert row["measured"] > row["baseline"] and abs(row["predicted"] / row["measured"] - 1) < 0.33


@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_the_memory_of_each_process_is_planned(shard: str) -> None:
    lanes = 8 if shard == "optimizer" else 1

    def found(learners: int, samplers: int = 0, judges: int = 0) -> estimate.Plan:
        asked: dict[str, Any] = {"cluster.learners": learners, "cluster.samplers": samplers, "cluster.judges": judges}
        asked |= {"train.lanes": lanes} | ({"cluster.shard": shard} if learners > 1 else {})
        return estimate.plan(config.resolve("grpo", {}, asked), memory=64, device="cpu", probe=False)

    alone = found(1)
    assert alone.workers == {} and alone.peak == alone.memory.peak
    two, four = found(2, 2, 2), found(4, 2, 2)
    assert {name: count for name, (count, _) in two.workers.items()} == {
        "the run's process": 1, "learner": 2, "sampler": 2, "judge": 2,
    }  # fmt: skip
    assert four.workers["learner"][1] < two.workers["learner"][1] < alone.peak  # each has a smaller share
    assert two.workers["the run's process"][1] < alone.peak
    assert two.peak == sum(count * size for count, size in two.workers.values())
    assert two.as_dict()["processes"]["sampler"]["count"] == 2


def test_a_run_that_samples_ahead_needs_no_model_of_its_own_where_samplers_have_one() -> None:
    def driver(ahead: int) -> int:
        given = {"cluster.samplers": 1, "algo.ahead": ahead, "model.lora_rank": 4, "model.path": "Qwen/Qwen2.5-0.5B"}
        plan = estimate.plan(config.resolve("grpo", {}, given), memory=64, device="cpu", probe=False)
        return plan.workers["the run's process"][1]

    assert driver(1) - driver(0) == shape_of("Qwen/Qwen2.5-0.5B").adapters(4) * 4, "the adapter's weights once more"
