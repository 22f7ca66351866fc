"""Whole runs on real models: abacus learns to think, and a model that is not ours trains too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import posttrain as pt
from posttrain.store import checkpoint
from posttrain.store.run import Run
from posttrain.types import Message, Task
from tests.conftest import shared


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_abacus_learns_to_think_from_right_or_wrong_alone(tmp_path: Path) -> None:
    """A few steps of the demo: the answers it trains on become longer, think more and are right more often."""
    settings = {"steps": 8, "prompts": 16, "lr": 2e-4, "rollout__max_tokens": 96, "eval__problems": 112}
    result = pt.grpo(out=tmp_path / "run", **settings)
    with Run.read(result.folder) as run:
        curves = {name: run.curve(name)[1] for name in ("accuracy", "think_share", "length", "mismatch")}
    assert result.summary is not None
    before, after = result.summary["before"], result.summary["after"]
    assert before["eval/accuracy"] < 0.35 and after["eval/accuracy_low"] > before["eval/accuracy_high"]
    assert curves["think_share"][-1] > curves["think_share"][0] + 0.3
    assert curves["length"][-1] > curves["length"][0] + 10
    assert max(curves["mismatch"]) <= 3e-5, "sampler and learner differ by the rounding of float32"


def once_upon_a_time(completion: str, answer: str, **task: object) -> float:
    """The share of the letter the task asks for."""
    return completion.count(answer) / max(1, len(completion))


def test_a_pretrained_model_that_is_not_ours_trains_with_grpo_and_resumes(tmp_path: Path) -> None:
    model = str(shared("models", "stories260K"))
    tasks = [Task(f"t{i}", "stories", (Message("user", f"Once upon a {word}"),), "a") for i, word in enumerate(WORDS)]
    settings = {"steps": 4, "prompts": 4, "group_size": 8, "lr": 1e-3, "data__format": "plain"}
    settings |= {"rollout__max_tokens": 24, "eval__problems": 2, "checkpoint_every": 2, "data__holdout": 0.2}
    result = pt.grpo(model=model, tasks=tasks, reward=once_upon_a_time, out=tmp_path / "run", **settings)
    with Run.read(result.folder) as run:
        rewards, mismatch = run.curve("reward")[1], run.curve("mismatch")[1]
    assert rewards[-1] > rewards[0], "the letter should become likelier"
    assert max(mismatch) <= 3e-5
    assert pt.resume(result.folder, reward=once_upon_a_time).summary == result.summary, "a finished run stays finished"


WORDS = ("time", "day", "hill", "boat", "bear", "king", "star", "cake", "tree", "door")


def test_a_pretrained_model_that_is_not_ours_learns_texts_with_sft(tmp_path: Path) -> None:
    rows = [{"text": f"The little {word} was very happy and sang all day."} for word in WORDS]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = pt.sft(
        model=str(shared("models", "stories260K")),
        data=str(tmp_path / "texts.jsonl"),
        out=tmp_path / "run",
        data__format="plain",
        data__holdout=0.2,
        batch_rows=4,
        train_on="all",
        steps=8,
        lr=1e-3,
    )
    assert result.summary is not None
    assert result.summary["after"]["eval/nll"] < result.summary["before"]["eval/nll"] - 0.3
    assert (result.model / "model.safetensors").exists()


def test_lora_trains_only_adapters_and_exports_a_plain_model(tmp_path: Path) -> None:
    settings = {"steps": 2, "prompts": 4, "group_size": 4, "lora_rank": 4, "kl_coef": 0.1, "eval__problems": 4}
    result = pt.grpo(tasks="products", out=tmp_path / "run", rollout__max_tokens=48, lr=1e-3, **settings)
    saved = checkpoint.latest(result.folder)
    assert saved is not None
    names = checkpoint.load(saved)[0]["model"].keys()
    assert names and all("lora_" in name for name in names)
    exported, _ = pt.evaluate(str(result.model), "products", eval__problems=8, rollout__max_tokens=48)
    adapted, _ = pt.evaluate(str(result.folder), "products", eval__problems=8, rollout__max_tokens=48)
    assert exported.tasks == adapted.tasks == 8
