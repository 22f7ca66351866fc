"""Each template of the zoo is trained by SFT and GRPO, and every verifier reads the same reply under each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain as pt
from posttrain.config import ModelConfig
from posttrain.data.chat import ChatFormat
from posttrain.models.load import load_policy
from posttrain.rewards import code as code_reward
from posttrain.rewards.verifiers import VERIFIERS
from posttrain.store.run import Run
from posttrain.types import Task
from tests.test_formal import STATEMENT, fake_lean
from tests.test_templates import CONVERSATIONS, TOOLS, WITH_TOOLS, every, format_of, said
from tests.zoo import ZOO, Animal, save

__all__ = ["fake_lean"]
PROMPT = "What is 3 + 5?"
COLUMNS: dict[str, Any] = {
    "choices": ["7", "8"],
    "pattern": "[0-9]+",
    "schema": {"type": "object"},
    "instruction_id_list": ["detectable_format:json_format"],
    "kwargs": [{}],
    "kind": "call",
    "entry": "solve",
    "cases": [{"args": [3, 5], "expected": 8}],
    "seconds": 20,
    "language": "en",
    "limit": 400,
    "smtlib": "(declare-const x Int)(assert (= x 8))",
    **STATEMENT,
}
SENTENCE = "The sum of these two numbers is eight."
GOOD = {
    "exact": "8",
    "numeric": "The answer is 8",
    "math": "The answer is $8$",
    "units": "The answer is 8",
    "multiple_choice": "The answer is B",
    "regex": "8",
    "json_schema": '{"sum": 8}',
    "ifeval": '{"sum": 8}',
    "ifeval_loose": '{"sum": 8}',
    "format": "8",
    "code": "```python\ndef solve(a, b):\n    return a + b\n```",
    "language": SENTENCE,
    "cosine_length": "8",
    "repetition": SENTENCE,
    "z3": "x = 8",
    "lean": "```lean\nby rfl\n```",
}
"""A final answer that each verifier passes on the task below."""
READ_THOUGHTS = {"language", "repetition"}  # by definition: what is thought counts, too
ASKED = said(f"u:{PROMPT}")
TASK = Task("t", "t", ASKED, "8", COLUMNS)


@pytest.fixture(scope="module", autouse=True)
def _close_sandboxes() -> Iterator[None]:
    yield
    for sandbox in code_reward._sandboxes.values():
        sandbox.close()


def task_for(verifier: str) -> Task:
    """A gold choice is a letter; the other verifiers share the gold answer."""
    return TASK if verifier != "multiple_choice" else Task("t", "t", ASKED, "B", COLUMNS)


@pytest.mark.usefixtures("fake_lean")
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_reply_is_paid_the_same_whoever_opens_its_thought_and_never_within_it(verifier: str) -> None:
    verify, task = VERIFIERS[verifier], task_for(verifier)
    whole = f"<think>\nI add the numbers.\n</think>\n\n{GOOD[verifier]}"
    expected = verify(task, whole)
    assert expected.passed, f"{verifier} does not pass {GOOD[verifier]!r}: {expected.detail}"
    for name in ZOO:
        opening = format_of(name).opening(ASKED)
        assert whole.startswith(opening)
        assert verify(task, opening + whole.removeprefix(opening)) == expected, name
        if verifier not in READ_THOUGHTS:
            cut = opening + whole.removeprefix(opening).replace("</think>", "")
            assert not verify(task, cut).passed, f"{name}: an answer within an unfinished thought is paid"


TAGS = [("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"), ("<reasoning>", "</reasoning>")]


@pytest.mark.usefixtures("fake_lean")
@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_thought_between_other_tags_is_paid_as_one_between_think_tags(verifier: str) -> None:
    verify, task = VERIFIERS[verifier], task_for(verifier)
    for begin, end in TAGS:
        assert verify(task, f"{begin}\nI add the numbers.\n{end}\n\n{GOOD[verifier]}").passed, begin
        if verifier not in READ_THOUGHTS:
            assert not verify(task, f"{begin}\nI add the numbers.\n\n{GOOD[verifier]}").passed, begin


def rows_of(name: str, folder: Path) -> Path:
    """A file with a conversation of several turns, with thoughts where the template shows them."""
    kind = next(kind for kind in ("thoughts", "thought", "two") if kind not in ZOO[name].refuses)
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATIONS[kind]]
    data = folder / "rows.jsonl"
    data.write_text((json.dumps({"messages": messages}) + "\n") * 4, encoding="utf-8")
    return data


SMALL: dict[str, Any] = {"threads": 1, "rollout__max_tokens": 6, "rollout__slots": 8, "prompts": 2, "group_size": 2,
                         "eval__problems": 2, "steps": 1}  # fmt: skip


@every
def test_each_template_is_trained_by_sft_and_by_grpo_with_every_verifier(name: str, tmp_path: Path) -> None:
    folder = save(ZOO[name], tmp_path / "model")
    done = pt.sft(str(folder), str(rows_of(name, tmp_path)), tmp_path / "sft", steps=1, batch_rows=2, threads=1,
                  data__holdout=0)  # fmt: skip
    assert done.summary is not None
    tasks = tmp_path / "tasks.jsonl"
    row = {name: value for name, value in COLUMNS.items() if name != "statement"}
    tasks.write_text(
        "".join(json.dumps({"prompt": f"What is {n} + 5?", "answer": "8", **row}) + "\n" for n in range(12)),
        encoding="utf-8",
    )
    no_number = ("json_schema", "ifeval", "ifeval_loose", "code", "z3", "lean")  # the gold answer must pass
    used = [verifier for verifier in VERIFIERS if verifier not in no_number]
    run = pt.grpo(str(folder), str(tasks), " + ".join(used), tmp_path / "grpo", **SMALL)
    chat = ChatFormat(load_policy(ModelConfig(path=str(folder))).tokenizer)
    with Run.read(run.folder) as store:
        rows = store.episodes("train", 1)
    assert len(rows) == 4 and all(row.error is None for row in rows)
    for row in rows:
        asked = said(f"u:{row.prompt}")
        first = int(np.flatnonzero(row.loss_mask)[0])
        assert row.loss_mask[first:].all() and np.array_equal(row.tokens[:first], chat.prompt_tokens(asked))
        assert row.text == chat.opening(asked) + chat.decode(row.tokens[row.loss_mask])
        task = Task("t", "t", asked, "8", COLUMNS)
        for verifier in used:
            assert row.parts[verifier] == pytest.approx(VERIFIERS[verifier](task, row.text).score), verifier


def test_a_template_with_tools_is_trained_on_calls_and_their_results(tmp_path: Path) -> None:
    animal = Animal(WITH_TOOLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}"))
    folder = save(animal, tmp_path / "model")
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 5}'}}
    messages = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "8", "tool_call_id": "c7"},
        {"role": "assistant", "content": "8."},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"messages": messages, "tools": TOOLS}) + "\n") * 4, encoding="utf-8")
    done = pt.sft(str(folder), str(data), tmp_path / "sft", steps=1, batch_rows=2, threads=1, data__holdout=0)
    assert done.summary is not None
