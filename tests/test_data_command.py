"""`posttrain data check` shows what training would do with a file, or refuses it as training would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

import posttrain as pt
from posttrain.cli.main import main
from posttrain.data.chat import ChatFormat
from posttrain.models.weights import ABACUS
from posttrain.store.run import Run
from posttrain.types import Message

CHAT = ChatFormat(AutoTokenizer.from_pretrained(ABACUS))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, words)])


def check(*words: object) -> dict[str, Any]:
    done = run("check", *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


QUESTIONS = [{"question": f"{i} + 1?", "answer": str(i + 1), "id": i} for i in range(20)]
FILES: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": q["question"], "completion": q["answer"], "id": q["id"]} for q in QUESTIONS],
    "dpo": [{"prompt": q["question"], "chosen": q["answer"], "rejected": "no", "id": q["id"]} for q in QUESTIONS],
    "kto": [
        {"prompt": q["question"], "completion": q["answer"], "label": q["id"] % 2, "id": q["id"]} for q in QUESTIONS
    ],
    "grpo": QUESTIONS,
}


@pytest.mark.parametrize("algorithm", FILES)
def test_a_file_is_shown_as_the_algorithm_that_its_columns_are_for_reads_it(algorithm: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", FILES[algorithm])
    found = check(file, "--ids", "--rows", 2)
    assert found["algorithm"] == algorithm and found["unread"] == ["id"] and len(found["examples"]) == 2
    assert found["rows"] + found["held_out"] == 20 * (2 if algorithm == "dpo" else 1)
    assert found["shortest"] <= found["median"] <= found["longest"]
    for spans in found["examples"]:
        ids = [i for span in spans for i in span["ids"]]
        trained = "".join(span["text"] for span in spans if span["trained"])
        assert CHAT.decode(ids)
        assert bool(trained) == (algorithm != "grpo")
    assert check(file, "--algo", algorithm)["algorithm"] == algorithm


def test_the_tokens_that_are_shown_are_those_of_the_chat_format(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", FILES["sft"][:1])
    (spans,) = check(file, "--ids", "--data.holdout", 0)["examples"]
    tokens, mask = CHAT.conversation_tokens([Message("user", "0 + 1?"), Message("assistant", "1")])
    assert [i for span in spans for i in span["ids"]] == tokens.tolist()
    assert [span["trained"] for span in spans for _ in span["ids"]] == mask.tolist()


def test_the_counts_and_notes_are_those_of_the_run(tmp_path: Path) -> None:
    rows = [*FILES["sft"], FILES["sft"][0], {"prompt": "long", "completion": "a " * 90}]
    file = write(tmp_path / "a.jsonl", rows)
    settings = {"algo.max_tokens": 40, "algo.overlong": "drop"}
    found = check(file, *(word for key, value in settings.items() for word in (f"--{key}", value)))
    out = tmp_path / "run"
    pt.sft(data=str(file), out=out, train__steps=1, **{k.replace(".", "__"): v for k, v in settings.items()})
    with Run.read(out) as store:
        notes = [event.message for event in store.events() if event.kind == "data"]
    assert set(found["notes"]) == set(notes) and any("were over algo.max_tokens=40" in note for note in notes)
    assert found["duplicates"] == 1


def test_the_text_report_marks_trained_tokens_and_names_what_nothing_reads(tmp_path: Path) -> None:
    done = run("check", write(tmp_path / "a.jsonl", FILES["sft"]), "--ids")
    assert done.exit_code == 0
    for part in ("⟦1<", "rows to train on, 2 held out", "not read by the model: id", "columns that are read: prompt"):
        assert part in done.output, done.output


@pytest.mark.parametrize(
    ("algorithm", "rows", "code", "says"),
    [
        ("sft", [{"question": "q"}], 3, "no column holds text to train on"),
        (
            "dpo",
            FILES["kto"],
            3,
            "has no pairs of chosen and rejected; its columns are prompt, completion, label, id. "
            "Check it with --algo kto",
        ),
        (
            "kto",
            QUESTIONS,
            3,
            "has no completions with a label; its columns are question, answer, id. Check it with --algo grpo",
        ),
        ("grpo", [{"question": "q", "answer": "a"}], 3, "a.jsonl: one row cannot be split"),
        ("grpo", [{"q": "q"}] * 3, 3, "no column holds a question"),
        ("kto", [{**FILES["kto"][0], "label": "good"}, *FILES["kto"]], 3, "a.jsonl:1: label='good'"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused_as_in_training(
    algorithm: str, rows: list[dict[str, Any]], code: int, says: str, tmp_path: Path
) -> None:
    done = run("check", write(tmp_path / "a.jsonl", rows), "--algo", algorithm)
    assert done.exit_code == code and says in done.stderr, done.output


UNUSABLE: dict[str, tuple[str, str]] = {
    "empty.jsonl": ("", "is empty (0 bytes)"),
    "empty.csv": ("", "is empty (0 bytes)"),
    "blank.jsonl": ("\n\n", "has no rows"),
    "header.csv": ("prompt,answer\n", "has no rows"),
    "none.json": ("[]", "has no rows"),
    "no-json.jsonl": ('{"a"\nb\n', "2 bad lines of 2"),
    "no-objects.jsonl": ("[1]\n2\n", "2 bad lines of 2"),
    "no-columns.jsonl": ("{}\n", "an object without columns"),
    "nulls.jsonl": ('{"prompt": null, "chosen": null}\n', "no"),
    "strange.jsonl": ('{"foo": 1}\n{"bar": [2]}\n', "no"),
    "blanks.jsonl": ('{"prompt": " ", "completion": " ", "label": true}\n', "no"),
    "question.jsonl": ('{"question": "q", "answer": "a"}\n', "no"),
    "pair.jsonl": ('{"prompt": "q", "chosen": "a", "rejected": "b"}\n', "no"),
    "half-a-pair.jsonl": ('{"prompt": "q", "chosen": "a"}\n', "no"),
    "judgement.jsonl": ('{"prompt": "q", "completion": "a", "label": true}\n', "no"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_without_a_usable_row_or_with_one_prompt_is_refused_by_name(name: str, tmp_path: Path) -> None:
    text, says = UNUSABLE[name]
    (tmp_path / name).write_text(text)
    for algorithm in ([], *(["--algo", name] for name in ("sft", "dpo", "kto", "grpo"))):
        for more in ([], ["--data.bad_rows", "drop"]):
            done = run("check", tmp_path / name, *algorithm, *more)
            assert done.exit_code == 3 and isinstance(done.exception, SystemExit), done.output
            assert done.stderr.startswith(f"error: {tmp_path / name}") and says in done.stderr, done.stderr


def test_a_file_of_one_prompt_is_checked_with_nothing_held_out(tmp_path: Path) -> None:
    for algorithm in ("sft", "dpo", "kto"):
        file = write(tmp_path / f"{algorithm}.jsonl", FILES[algorithm][:1])
        refused = run("check", file, "--algo", algorithm)
        assert "one row cannot be split" in refused.stderr and "Or set data.holdout = 0" in refused.stderr
        assert run("check", file, "--algo", algorithm, "--data.holdout", "0").exit_code == 0


def test_unknown_words_and_models_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", FILES["sft"])
    for words, says in (
        ([file, "--model", tmp_path / "none"], "tokenizer of"),
        ([file, "more"], "unexpected argument 'more'"),
        (["arithmetic"], "is a built-in task"),
        ([tmp_path / "none.jsonl"], "does not exist"),
    ):
        done = run("check", *words)
        assert done.exit_code in (2, 3) and says in done.stderr, done.output


def test_convert_writes_a_file_that_check_accepts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"input": q["question"], "output": q["answer"]} for q in QUESTIONS])
    assert "--format input-output" in run("check", file, "--algo", "sft").stderr
    done = run("convert", file, "--to", tmp_path / "b.jsonl", "--format", "input-output", "--json")
    assert json.loads(done.stdout) == {"file": str(tmp_path / "b.jsonl"), "rows": {"input-output": 20}}
    assert check(tmp_path / "b.jsonl")["algorithm"] == "sft"
    for words, says in (
        (["--to", tmp_path / "b.jsonl"], "exists"),
        (["--to", tmp_path / "c.csv"], "does not end in .jsonl"),
        (["--to", tmp_path / "c.jsonl", "--format", "input-outputs"], "Did you mean 'input-output'?"),
        (["--to", tmp_path / "c.jsonl", "--rename", "x"], "is not of the form OLD=NEW"),
    ):
        done = run("convert", file, *words)
        assert done.exit_code == 2 and says in done.stderr, done.output
