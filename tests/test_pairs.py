"""Preference pairs share their prompt; they are read from files, or sampled from the model and judged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posttrain.config import DataConfig, EvalConfig, RewardConfig, RolloutConfig, RunConfig
from posttrain.config.pairs import PairsConfig
from posttrain.data.pairs import judgement_rows, pair_rows
from posttrain.models.load import Policy, with_chat_format
from posttrain.rollout.sample_pairs import TEST_FILE, TRAIN_FILE, load_judgements, load_pairs, pairs_of
from posttrain.train.job import Setup
from posttrain.types import DataError, Episode, Judgement, Message, Preference, Span, Task, TemplateError
from tests import tiny

ASK = (Message("user", "hi"),)
TALK = (Message("user", "hi"), Message("assistant", "yes?"), Message("user", "go"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    policy = tiny.load(tiny.chatty(tmp_path_factory.mktemp("model")))
    policy.stop_ids = tuple(range(2, 80))  # a random model that stops now and then
    return policy


def pair(chosen: str, rejected: str, prompt: tuple[Message, ...] = ASK, **more: float) -> Preference:
    return Preference(f"{chosen}/{rejected}", prompt, chosen, rejected, **more)


def episode(text: str, reward: float | None, stop: Any = "stop") -> Episode:
    one = np.array([3])
    spans = (Span("prompt", one), Span("model", one, np.zeros(1, np.float32)))
    return Episode("t", 0, 0, spans, text, reward, stop=stop)


def length(completion: str) -> float:
    return float(len(completion))


def setup(policy: Policy, folder: Path, source: str = "addition", **sections: Any) -> Setup:
    recipe: Any = SimpleNamespace(
        data=DataConfig(**{"tasks": source, "count": 12, **sections.pop("data", {})}),
        pairs=PairsConfig(**sections.pop("pairs", {"samples": 16})),
        reward=RewardConfig(),
        rollout=RolloutConfig(max_tokens=8, slots=32),
        eval=EvalConfig(problems=20),
        run=RunConfig(),
    )
    return Setup(recipe, policy, with_chat_format(policy, "chat"), folder, reward=length)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def started(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    return folder


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_pair_is_two_rows_with_one_prompt_and_only_the_answer_and_its_stop_token_trained(policy: Policy) -> None:
    chat = with_chat_format(policy, "chat")
    rows, notes = pair_rows([pair("good", "bad", TALK, label=0.9, margin=2.0)], chat, 100)
    prompt = chat.prompt_tokens(TALK)
    for row, answer in zip(rows, ("good", "bad"), strict=True):
        assert np.array_equal(row.tokens[: len(prompt)], prompt)
        assert not row.loss_mask[: len(prompt)].any() and row.loss_mask[len(prompt) :].all()
        assert chat.decode(row.tokens[row.loss_mask]) == answer and row.tokens[-1] == policy.tokenizer.eos_token_id
    assert [(r.label, r.margin) for r in rows] == [(0.9, 2.0), (pytest.approx(0.1), 2.0)] and not notes


def test_rows_are_cut_at_the_end_and_counted(policy: Policy) -> None:
    chat = with_chat_format(policy, "chat")
    room = len(chat.prompt_tokens(ASK)) + 3
    rows, notes = pair_rows([pair("abcdef", "xy"), pair("abcde", "abcdf")], chat, room)
    assert [chat.decode(r.tokens[r.loss_mask]) for r in rows] == ["abc", "xy"]
    assert notes[0] == f"3 rows were cut at pairs.max_tokens={room}." and notes[1].startswith("1 pairs were left out")


def test_pairs_that_are_equal_once_cut_are_refused_when_no_other_is_left(policy: Policy) -> None:
    chat = with_chat_format(policy, "chat")
    with pytest.raises(DataError, match="none of 1 pairs differs in the first"):
        pair_rows([pair("abcde", "abcdf")], chat, len(chat.prompt_tokens(ASK)) + 3)


def test_a_row_without_room_for_its_answer_is_refused_by_name(policy: Policy) -> None:
    chat = with_chat_format(policy, "chat")
    with pytest.raises(DataError, match=r"good/bad: the prompt alone has at least 4 tokens.*pairs\.max_tokens"):
        pair_rows([pair("good", "bad")], chat, 4)


def test_a_template_that_writes_the_prompt_differently_on_the_two_sides_is_refused(tmp_path: Path) -> None:
    policy = tiny.load(tiny.chatty(tmp_path))
    policy.tokenizer.chat_template = tiny.TEMPLATE.replace(
        "<bos>", "<bos>{% if messages[-1]['content'] == 'long answer' %}!{% endif %}"
    ).replace("{% if add", "{% if messages[-1]['role'] == 'user' %}{% endif %}{% if add")
    with pytest.raises(TemplateError, match=r"prompt differently|rewrites earlier turns"):
        pair_rows([pair("long answer", "short")], with_chat_format(policy, "chat"), 100)


def test_a_judgement_is_one_row_labelled_by_its_verdict(policy: Policy) -> None:
    chat = with_chat_format(policy, "chat")
    judged = [Judgement("a", TALK, "good", True), Judgement("b", ASK, "bad", False)]
    rows, _ = judgement_rows(judged, chat, 100)
    assert [(chat.decode(r.tokens[r.loss_mask]), r.label) for r in rows] == [("good", 1.0), ("bad", 0.0)]


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_preference_file_is_split_by_prompt(policy: Policy, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 5}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(10)]
    sets = load_pairs(setup(policy, tmp_path / "run", write(tmp_path / "p.jsonl", rows), data={"holdout": 0.2}))
    assert (len(sets.train), len(sets.test)) == (8, 2) and sets.tasks is None
    assert not {p.prompt for p in sets.train} & {p.prompt for p in sets.test}
    assert sets.notes[0] == "8 pairs to train on, 2 held out."
    assert not (tmp_path / "run").exists(), "pairs of a file are not kept again"


def test_training_pairs_whose_prompt_is_evaluated_are_dropped_and_counted(policy: Policy, tmp_path: Path) -> None:
    train = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    held = write(tmp_path / "held.jsonl", train[:1])
    sets = load_pairs(setup(policy, tmp_path, write(tmp_path / "p.jsonl", train), data={"eval_tasks": held}))
    assert (len(sets.train), len(sets.test)) == (
        2,
        1,
    ) and "1 training pairs with a prompt that is also in" in sets.notes[1]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "a"}, "has 'chosen' but no 'rejected'"),
        ({"chosen": "a", "rejected": ""}, "is empty"),
        ({"chosen": "a", "rejected": "a"}, "the same text"),
        ({"completion": "a", "label": True}, "judgements of single answers"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_in_a_sentence(
    policy: Policy, tmp_path: Path, row: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        load_pairs(setup(policy, tmp_path, write(tmp_path / "p.jsonl", [{"prompt": "q", **row}])))


def test_a_judgement_file_and_a_preference_file_both_give_judgements(policy: Policy, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i % 2 == 0} for i in range(4)]
    alone = load_judgements(setup(policy, tmp_path, write(tmp_path / "j.jsonl", rows), data={"holdout": 0}))
    assert [j.desirable for j in alone.train] == [True, False, True, False]
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    split = load_judgements(setup(policy, tmp_path, write(tmp_path / "p.jsonl", pairs), data={"holdout": 0}))
    assert [(j.answer, j.desirable) for j in split.train] == [("a", True), ("b", False)] * 4


def test_labels_that_are_no_judgement_are_refused_and_never_read_as_tasks(policy: Policy, tmp_path: Path) -> None:
    for name, labels in (("good", ("good", "bad")), ("yes", ("yes", "no")), ("scores", (4, 5))):
        rows = [{"prompt": f"q{i}", "completion": "a", "label": labels[i % 2]} for i in range(4)]
        with pytest.raises(DataError, match=rf"1: label={labels[0]!r}, expected true"):
            load_judgements(setup(policy, tmp_path, write(tmp_path / f"{name}.jsonl", rows)))
    rows = [{"prompt": f"q{i}", "completion": "a", "label": ("Desirable", "undesirable ")[i % 2]} for i in range(4)]
    read = load_judgements(setup(policy, tmp_path, write(tmp_path / "d.jsonl", rows), data={"holdout": 0}))
    assert [j.desirable for j in read.train] == [True, False, True, False]


def test_prompts_over_the_limit_are_refused_or_dropped(policy: Policy, tmp_path: Path) -> None:
    rows = [{"prompt": "q" * n, "chosen": "a", "rejected": "b"} for n in (3, 60)]
    data = {"holdout": 0, "max_prompt_tokens": 20}
    source = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError, match=r"1 training prompts are longer than data\.max_prompt_tokens=20"):
        load_pairs(setup(policy, tmp_path, source, data=data))
    sets = load_pairs(setup(policy, tmp_path, source, data={**data, "overlong": "drop"}))
    assert len(sets.train) == 1 and "1 training prompts over 20 tokens were dropped." in sets.notes


LABELLED: dict[str, tuple[dict[str, Any], str]] = {
    "agree": ({"score_chosen": 2, "score_rejected": 1}, ""),
    "agree, swapped": ({"label": 0.1, "score_chosen": 1, "score_rejected": 2}, ""),
    "no scores": ({}, ""),
    "margin 0 is its default": ({"margin": 0}, ""),
    "a tie with equal scores": ({"tie": True, "score_chosen": 1, "score_rejected": 1}, ""),
    "contradict": ({"score_chosen": 1, "score_rejected": 5}, "score_chosen − score_rejected=-4 where chosen is better"),
    "contradict, swapped": ({"label": 0, "score_chosen": 2, "score_rejected": 1}, "=1 where rejected is better"),
    "of a tie": ({"tie": True, "score_chosen": 2, "score_rejected": 1}, "=1 where the two are a tie"),
    "margin": ({"margin": -0.5}, "margin=-0.5 where chosen is better"),
    "the margin agrees, the scores do not": (
        {"margin": 2, "score_chosen": 1, "score_rejected": 2},
        "margin=2 and score_chosen − score_rejected=-1 where chosen is better",
    ),
    "equal": ({"score_chosen": 3.5, "score_rejected": 3.5}, "equal scores although one answer is labelled better"),
}


@pytest.mark.parametrize("name", LABELLED)
def test_pairs_whose_scores_contradict_their_labels_are_counted_before_the_first_step(
    policy: Policy, tmp_path: Path, name: str
) -> None:
    more, says = LABELLED[name]
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} | (more if i in (1, 3) else {}) for i in range(4)]
    source = write(tmp_path / "p.jsonl", rows)
    for load in (load_pairs, load_judgements):
        notes = [
            note for note in load(setup(policy, tmp_path, source, data={"holdout": 0.25})).notes if "pairs have" in note
        ]
        assert len(notes) == bool(says)
        if says:
            assert notes[0].startswith("2 of 4 pairs have ") and f"(the first is {source}:2" in notes[0]
            assert says in notes[0]


# --- sampled --------------------------------------------------------------------------------------------------------


def test_answers_pair_up_where_their_rewards_differ_and_the_margin_is_the_difference() -> None:
    task = Task("t", "e", ASK, "1")
    group = [episode("best", 1.0), episode("worst", 0.0), episode("middle", 0.5), episode("best", 1.0)]
    pairs, counts = pairs_of([group], [task], 10, 0)
    found = {(p.chosen, p.rejected, p.margin) for p in pairs}
    assert found == {("best", "worst", 1.0), ("best", "middle", 0.5), ("middle", "worst", 0.5)} and len(pairs) == 3
    assert counts == {"answers": 4, "unusable": 0, "flat": 0}


def test_cut_blank_and_unscored_answers_make_no_pair_and_are_counted() -> None:
    task = Task("t", "e", ASK, "1")
    group = [
        episode("right", 1.0),
        episode("cut", 0.0, "length"),
        episode(" ", 0.0),
        episode("broken", None),
        episode("\ufffd", 0),
    ]
    assert pairs_of([group], [task], 10, 0) == ([], {"answers": 5, "unusable": 4, "flat": 1})


def test_at_most_so_many_pairs_of_a_task_are_drawn_and_the_draw_is_the_seeds() -> None:
    task = Task("t", "e", ASK, "1")
    group = [episode(f"right {i}", 1.0) for i in range(5)] + [episode(f"wrong {i}", 0.0) for i in range(5)]
    draws = [[(p.chosen, p.rejected) for p in pairs_of([group], [task], 2, seed)[0]] for seed in range(10)]
    assert all(len(draw) == 2 == len(set(draw)) for draw in draws)
    assert draws[0] == [(p.chosen, p.rejected) for p in pairs_of([group], [task], 2, 0)[0]]
    assert len({pair for draw in draws for pair in draw}) > 10, "every seed drew the same pairs"


def test_pairs_of_a_task_are_sampled_from_the_model_judged_and_kept(policy: Policy, tmp_path: Path) -> None:
    sets = load_pairs(setup(policy, tmp_path / "run"))
    assert sets.train and sets.test and sets.tasks and sets.verify
    assert all(length(p.chosen) > length(p.rejected) for p in (*sets.train, *sets.test))
    assert (tmp_path / "run" / TRAIN_FILE).exists() and (tmp_path / "run" / TEST_FILE).exists()
    assert any("training pairs from 12 tasks with 16 sampled answers each" in note for note in sets.notes)


def test_a_run_killed_before_it_began_samples_the_same_pairs_again(policy: Policy, tmp_path: Path) -> None:
    once, again = (load_pairs(setup(policy, tmp_path / "run")) for _ in range(2))
    assert (once.train, once.test, once.hash) == (again.train, again.test, again.hash)


def test_a_resumed_run_reads_the_pairs_it_kept(policy: Policy, tmp_path: Path) -> None:
    first = load_pairs(setup(policy, tmp_path))
    again = load_pairs(setup(policy, started(tmp_path)))
    assert (again.train, again.test, again.hash) == (first.train, first.test, first.hash)
    lines = (tmp_path / TRAIN_FILE).read_text().splitlines(keepends=True)
    (tmp_path / TRAIN_FILE).write_text("".join(lines[1:]))
    changed = load_pairs(setup(policy, tmp_path))
    assert changed.train == first.train[1:] and changed.hash != first.hash, "a changed file shows in the hash"


def test_a_new_run_does_not_take_pairs_that_another_recipe_left_in_its_folder(policy: Policy, tmp_path: Path) -> None:
    load_pairs(setup(policy, tmp_path))
    (tmp_path / TRAIN_FILE).write_text("left by something else\n")
    assert load_pairs(setup(policy, tmp_path)).train


def test_tasks_whose_answers_are_all_alike_give_no_pair_and_are_refused(policy: Policy, tmp_path: Path) -> None:
    same = setup(policy, tmp_path)
    same = Setup(same.recipe, policy, same.chat, tmp_path, reward=lambda completion: 1.0)
    with pytest.raises(DataError, match="no task of addition got answers of different reward in 16 samples"):
        load_pairs(same)
