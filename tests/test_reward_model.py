"""Reward models: which of two answers is better, how sure that is, and the score as a reward."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from posttrain import api, config
from posttrain.algos.reward import bootstrap_counts, make_loss, whole_pairs
from posttrain.cli import main as cli
from posttrain.cli.tables import calibration_picture, calibration_table
from posttrain.config import ModelConfig, RewardConfig
from posttrain.config.reward import RewardModelConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.pairs import pair_rows
from posttrain.evaluation.calibration import calibration
from posttrain.models import heads
from posttrain.models.load import load_policy, save_pretrained
from posttrain.rewards.models import RewardModel, load_reward_model
from posttrain.rewards.scoring import score_all
from posttrain.rewards.verifiers import exact
from posttrain.store.run import Run
from posttrain.train.forward import sample_scores
from posttrain.types import Batch, ConfigError, DataError, Message, Preference, RolloutError, Task
from tests import tiny

WORDS = ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and pairs whose better answer is the one with more `y` than `n`."""
    folder = tmp_path_factory.mktemp("reward")
    tiny.chatty(folder / "base")
    path = folder / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 1024}))
    rows = [{"prompt": f"Say {a}{b}.", "chosen": f"{a}yy{b}", "rejected": f"{a}nn{b}"} for a in WORDS for b in WORDS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(root: Path, name: str, **settings: Any) -> Path:
    base = {"model.path": str(root / "base"), "data.tasks": str(root / "pairs.jsonl"), "run.out": str(root / name)}
    quick = {"algo.batch_pairs": 8, "train.lr": 1e-2, "data.holdout": 0.3, "train.threads": 1, "train.steps": 12}
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return api.start("reward", config.resolve("reward", {}, {**base, **quick, **dotted})).folder


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    return train(root, "trained", algo__heads=3)


@pytest.fixture(scope="module")
def scorer(trained: Path) -> RewardModel:
    return load_reward_model(f"model:{trained}", RewardConfig(), judge=lambda task: exact)


def task(text: str = "Say abcd.", answer: str = "") -> Task:
    return Task(f"t:{text}", "mine", (Message("user", text),), answer)


# --- the loss --------------------------------------------------------------------------------------------------------


def batch(labels: list[float], margins: list[float]) -> Batch:
    blank = torch.zeros(len(labels), 2)
    return Batch(
        blank.long(), blank.bool(), blank, blank, blank, labels=torch.tensor(labels), margins=torch.tensor(margins)
    )


def test_the_loss_of_a_pair_is_minus_log_sigma_of_its_gap_less_the_margin_plus_the_centring() -> None:
    scores = torch.tensor([[2.0], [0.5]])
    pair = batch([1.0, 0.0], [0.5, 0.5])
    weights = torch.ones(1, 1)
    plain, stats = make_loss(RewardModelConfig(), weights)(scores, pair)
    assert plain.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    with_margin, _ = make_loss(RewardModelConfig(margin=True, centre_coef=0.1), weights)(scores, pair)
    assert with_margin.item() == pytest.approx(math.log1p(math.exp(-1.0)) + 0.1 * 2.5**2)
    assert {name: stat.value for name, stat in stats.items()} == {
        "pair_accuracy": 1,
        "score_gap": 1.5,
        "score_mean": 1.25,
    }


def test_soft_labels_mix_both_directions_and_a_tie_is_in_no_accuracy() -> None:
    scores = torch.tensor([[1.0], [0.0], [0.0], [3.0]])
    loss = make_loss(RewardModelConfig(), torch.full((2, 1), 0.5))
    value, stats = loss(scores, batch([0.25, 0.75, 0.5, 0.5], [0.0] * 4))
    first = 0.25 * math.log1p(math.exp(-1)) + 0.75 * math.log1p(math.exp(1))
    tie = 0.5 * math.log1p(math.exp(3)) + 0.5 * math.log1p(math.exp(-3))
    assert value.item() == pytest.approx((first + tie) / 2)
    assert stats["pair_accuracy"].count == 1 and stats["pair_accuracy"].value == 0.0
    assert stats["score_gap"].value == -1.0  # towards the answer that is more probably the better


def test_each_head_learns_from_its_own_bootstrap_and_a_pair_it_did_not_draw_teaches_it_nothing() -> None:
    scores = torch.zeros(2, 2, requires_grad=True)
    value, _ = make_loss(RewardModelConfig(heads=2), torch.tensor([[2.0, 0.0]]))(scores, batch([1.0, 0.0], [0.0, 0.0]))
    value.backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-1.0, 0.0], [1.0, 0.0]]  # 2 · (σ(0) − 1), and exactly nothing


def test_bootstrap_counts_are_poisson_fixed_by_the_seed_and_differ_between_heads() -> None:
    counts = bootstrap_counts(20000, 2, seed=3)
    assert torch.equal(counts, bootstrap_counts(20000, 2, seed=3))
    assert counts.mean(0).tolist() == pytest.approx([1.0, 1.0], abs=0.03)
    assert counts.var(0).tolist() == pytest.approx([1.0, 1.0], abs=0.05)
    assert (counts == 0).float().mean().item() == pytest.approx(math.exp(-1), abs=0.01)
    assert abs(np.corrcoef(counts.T)[0, 1]) < 0.03
    assert torch.equal(bootstrap_counts(5, 1, seed=3), torch.ones(5, 1))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_ends_with_its_end_of_turn_token_whatever_the_template_writes_after_it(root: Path) -> None:
    policy = load_policy(ModelConfig(path=str(root / "base")))
    policy.tokenizer.chat_template = tiny.TEMPLATE.replace("<eos>{% endfor %}", "<eos>\n\n{% endfor %}")
    chat = ChatFormat(policy.tokenizer)
    pair = Preference("p", (Message("user", "a"),), "good", "bad")
    whole, _ = pair_rows([pair], chat, 100)
    assert whole[0].tokens[-1] != policy.tokenizer.eos_token_id, "the template no longer writes anything after it"
    (kept,), notes = whole_pairs([pair], chat, 100)
    assert [row.tokens[-1] for row in kept] == [policy.tokenizer.eos_token_id] * 2 and notes == []


def test_pairs_that_do_not_fit_are_left_out_and_counted_rather_than_cut(root: Path) -> None:
    chat = ChatFormat(load_policy(ModelConfig(path=str(root / "base"))).tokenizer)
    pairs = [Preference(f"p{n}", (Message("user", "a"),), "x" * n, "y") for n in (3, 30)]
    kept, notes = whole_pairs(pairs, chat, 20)
    assert len(kept) == 1 and notes == ["1 pairs longer than pairs.max_tokens=20 were left out."]
    with pytest.raises(DataError, match="none of 2 pairs fits pairs.max_tokens=4; raise it"):
        whole_pairs(pairs, chat, 4)


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_reward_model_learns_which_answers_are_better_and_says_how_sure_that_is(trained: Path) -> None:
    with Run.read(trained) as run:
        summary = run.summary()
    assert summary is not None
    before, after = summary["before"], summary["after"]
    assert before["eval/pair_loss"] > 0.3 and after["eval/pair_loss"] < 0.1
    assert after["eval/pair_accuracy_low"] > 0.85 and after["eval/score_gap"] > 2
    assert sum(row["count"] for row in summary["calibration"]) == 30  # each held-out pair once
    assert all(
        0.5 <= row["predicted"] <= 1 and row["low"] <= row["observed"] <= row["high"] + 1e-9
        for row in summary["calibration"]
    )


def test_scores_of_the_training_answers_have_mean_zero_for_every_head(root: Path, trained: Path) -> None:
    from posttrain.data.preferences import row_to_preference
    from posttrain.data.sources import read_rows, split_holdout

    pairs, _ = split_holdout([row_to_preference(r) for r in read_rows(str(root / "pairs.jsonl"))], 0.3, 0)
    policy = heads.load_scorer(ModelConfig(path=str(trained / "model")))
    rows, _ = whole_pairs(pairs, ChatFormat(policy.tokenizer), 1024)
    scores = sample_scores(policy, [row for pair in rows for row in pair], 8192)
    assert scores.shape == (140, 3) and np.abs(scores.mean(0)).max() < 1e-4


def test_a_run_folder_opens_with_its_head_and_gives_the_exported_models_scores(trained: Path) -> None:
    opened, exported = api.open_policy(str(trained)), heads.load_scorer(ModelConfig(path=str(trained / "model")))
    assert opened.scalar is not None and exported.scalar is not None
    assert torch.equal(opened.scalar.weight, exported.scalar.weight)
    assert torch.equal(opened.scalar.bias, exported.scalar.bias)
    chat = ChatFormat(opened.tokenizer)
    (pair,), _ = whole_pairs([Preference("p", (Message("user", "a"),), "good", "bad")], chat, 99)
    assert np.array_equal(sample_scores(opened, pair, 99), sample_scores(exported, pair, 99))


def test_how_pairs_are_split_into_passes_changes_nothing(root: Path) -> None:
    settings = {"algo__heads": 2, "train__steps": 2, "train__max_grad_norm": 0.0}
    scores = [
        load_reward_model(str(train(root, f"room{n}", train__micro_batch_tokens=n, **settings)), RewardConfig()).scores(
            [(task(), "abyycd"), (task(), "abnncd")]
        )
        for n in (30, 4096)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


def test_adapters_and_head_train_together(root: Path) -> None:
    folder = train(root, "lora", model__lora_rank=4, train__steps=2)
    scores = load_reward_model(str(folder), RewardConfig()).scores([(task(), "abyycd"), (task(), "abnncd")])
    opened = api.open_policy(str(folder))
    chat = ChatFormat(opened.tokenizer)
    (pair,), _ = whole_pairs([Preference("p", task().messages, "abyycd", "abnncd")], chat, 99)
    assert sample_scores(opened, pair, 99)[:, 0] == pytest.approx(scores, abs=1e-4)  # adapters apart and merged


def test_pairs_come_from_the_models_own_answers_where_the_data_are_tasks(root: Path) -> None:
    (root / "rewards.py").write_text("def size(completion, answer): return len(completion) / 4")
    tiny.stopping(Path(shutil.copytree(root / "base", root / "stopping")))
    settings = {"data__tasks": "sums", "data__count": 12, "reward__name": f"{root / 'rewards.py'}:size"}
    sampling = {"rollout__max_tokens": 8, "rollout__slots": 32, "pairs__samples": 16, "eval__problems": 6}
    folder = train(root, "sampled", model__path=str(root / "stopping"), **settings, **sampling, train__steps=2)
    with Run.read(folder) as run:
        notes = [event.message for event in run.events()]
    assert any("training pairs from 12 tasks" in note for note in notes)
    assert (folder / "pairs.jsonl").read_text().count("chosen") > 3


# --- scores as rewards -----------------------------------------------------------------------------------------------


def test_the_better_answer_earns_more_and_many_replies_score_as_one_alone_does(scorer: RewardModel) -> None:
    pairs = [(task(f"Say {word}zz."), f"{word}{end}zz") for word in WORDS for end in ("yy", "nn")]
    together = scorer.score_all(pairs)
    assert [together[i].score > together[i + 1].score for i in range(0, 20, 2)] == [True] * 10
    alone = [scorer(*pair) for pair in pairs]
    assert [v.score for v in alone] == pytest.approx([v.score for v in together], abs=1e-5)
    assert [v.score for v, _ in score_all(scorer, pairs) if v] == [v.score for v in together]
    assert [float(s) for s in scorer.scores(pairs)] == [v.score for v in together]


def test_heads_are_joined_by_mean_minimum_or_mean_less_variance(scorer: RewardModel, trained: Path) -> None:
    pair = (task(), "abyycd")
    parts = scorer(*pair).parts
    each = [parts[f"head_{k}"] for k in range(3)]
    assert len({round(x, 6) for x in each}) == 3 and parts["uncertainty"] == pytest.approx(float(np.std(each)))
    expected = {"mean": np.mean(each), "min": min(each), "penalised": np.mean(each) - 2 * np.var(each)}
    for how, value in expected.items():
        cfg = replace(RewardConfig(), ensemble=how, uncertainty_coef=2.0)
        assert load_reward_model(f"model:{trained}", cfg)(*pair).score == pytest.approx(float(value), abs=1e-5)


def test_several_runs_are_joined_head_by_head(root: Path, trained: Path) -> None:
    other = train(root, "other", run__seed=1, train__steps=2)
    both = load_reward_model(f"model:{trained}+{other}", RewardConfig())(task(), "abyycd")
    one, two = (load_reward_model(str(f), RewardConfig())(task(), "abyycd").parts for f in (trained, other))
    assert [both.parts[f"head_{k}"] for k in range(4)] == [one["head_0"], one["head_1"], one["head_2"], two["head_0"]]


def test_passed_is_the_gold_answers_verdict_and_without_one_a_score_above_zero(scorer: RewardModel) -> None:
    wrong = scorer(task(answer="something else"), "abyycd")
    assert wrong.score > 0 and not wrong.passed and wrong.parts["gold"] == 0.0
    assert scorer(task(answer="abnncd"), "abnncd").parts["gold"] == 1.0
    liked, disliked = scorer(task(), "abyycd"), scorer(task(), "abnncd")
    assert (liked.passed, disliked.passed) == (liked.score > 0, disliked.score > 0) == (True, False)
    assert "gold" not in liked.parts


def test_a_reward_model_is_a_reward_of_grpo(root: Path, trained: Path) -> None:
    settings = {"rollout__max_tokens": 6, "slots": 32, "prompts": 2, "group_size": 2, "problems": 2, "threads": 1}
    run = api.grpo(str(root / "base"), "addition", f"model:{trained}", root / "grpo", None, steps=1, **settings)
    with Run.read(run.folder) as store:
        rows = store.episodes("train")
    assert len(rows) == 4 and len({row.reward for row in rows}) > 1
    assert {"head_0", "uncertainty", "gold"} <= rows[0].parts.keys()


def test_an_answer_longer_than_the_reward_model_reads_is_an_error_and_no_score(scorer: RewardModel) -> None:
    with pytest.raises(
        RolloutError, match="tokens for the reward model .*, whose context is 1024 tokens. Lower rollout.max_tokens"
    ):
        scorer(task(), "x" * 2000)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_score_is_refused_in_a_sentence(root: Path, trained: Path, tmp_path: Path) -> None:
    def load(spec: str) -> Any:
        return load_reward_model(spec, RewardConfig())

    with pytest.raises(ConfigError, match="reward model folder 'nowhere' does not exist. Write model:FOLDER"):
        load("model:nowhere")
    with pytest.raises(ConfigError, match="has no scalar head"):
        load(f"model:{root / 'base'}")
    critic = load_policy(ModelConfig(path=str(root / "base")))
    save_pretrained(critic, tmp_path / "critic")
    heads.save_head(heads.attach_scalar(critic, 1), tmp_path / "critic")
    with pytest.raises(ConfigError, match="was not trained to score completions .a critic's head predicts returns"):
        load(f"model:{tmp_path / 'critic'}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no model yet because it has not finished"):
        load(str(tmp_path / "run"))
    steps = load_policy(ModelConfig(path=str(root / "base")))
    about = {"kind": "step", "format": "chat", "separator": "\n", "aggregate": "min"}
    save_pretrained(steps, tmp_path / "steps")
    heads.save_head(heads.attach_scalar(steps, 1, about=about), tmp_path / "steps")
    with pytest.raises(ConfigError, match="needs reward models of the same kind; these are reward, step"):
        load(f"model:{trained}+{tmp_path / 'steps'}")


def test_bad_settings_and_data_are_refused_before_the_first_step(root: Path) -> None:
    for settings, sentence in (
        ({"algo__heads": 0}, "heads=0 must be 1 or more"),
        ({"algo__centre_coef": -1}, "centre_coef=-1.0 cannot be negative"),
        ({"pairs__samples": 1}, "pairs.samples=1 is too few for a pair"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            train(root, "refused", **settings)
    same = root / "same.jsonl"
    same.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match="same.jsonl:1: .*"):
        train(root, "refused", data__tasks=str(same))
    with pytest.raises(DataError, match="does not exist"):
        train(root, "refused", data__tasks=str(root / "absent.jsonl"))
    assert not (root / "refused" / "run.json").exists()


# --- what people see -------------------------------------------------------------------------------------------------


def test_the_calibration_error_is_the_mean_distance_weighted_by_counts(tmp_path: Path) -> None:
    error, table = calibration(np.array([0.55, 0.55, 0.95, 0.95]), np.array([1.0, 0.0, 1.0, 1.0]), 20)
    assert error == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert [(row["count"], row["observed"]) for row in table] == [(2, 0.5), (2, 1.0)]
    assert table[0]["low"] == pytest.approx(0.0945, abs=1e-3) and table[0]["high"] == pytest.approx(0.9055, abs=1e-3)
    calibration_picture(table, tmp_path / "calibration.png", "a run")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert calibration_table(table).row_count == 2


def test_the_commands_train_and_probe(root: Path, trained: Path) -> None:
    settings = ["--train.steps", "1", "--train.threads", "1", "--out", str(root / "command")]
    files = ["--model", str(root / "base"), "--tasks", str(root / "pairs.jsonl")]
    done = CliRunner().invoke(cli.main, ["reward", *files, *settings])
    assert done.exit_code == 0 and "Calibration on held-out data" in done.output, done.output
    assert (root / "command" / "calibration.png").exists()
    done = CliRunner().invoke(cli.main, ["probe", str(trained), "--tasks", "addition", "--count", "4", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert [one["name"] for one in found] == ["length", "sycophancy", "sycophancy_gap", "format", "position"]
    assert all(one["estimate"]["low"] <= one["estimate"]["value"] <= one["estimate"]["high"] for one in found)
    assert "answer first" in done.stderr and "95 % interval" in done.stderr
