"""Training data from search trees, worked by hand: values of prefixes, pairs, demonstrations."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.data.files import read_rows
from posttrain.data.preferences import read_preferences, read_solutions
from posttrain.data.sources import row_to_conversation
from posttrain.search import stored
from posttrain.search.export import demonstration, ended, pairs, solutions, values, write
from posttrain.search.report import Outcome, summarise
from posttrain.search.solve import Searched
from posttrain.types import Json, Message, Task

TASK = Task("t", "sums", (Message("user", "1 + 2 + 3?"),), "6")
NODES = [  # (parent, text, end)
    (None, "", ""),
    (0, "3;", "step"),  # 1: three completions below, two right
    (0, "4;", "step"),  # 2: one below, wrong
    (1, "6", "stop"),  # 3 right
    (1, "7", "stop"),  # 4 wrong
    (1, "6", "stop"),  # 5 right, the same text as 3
    (2, "7", "stop"),  # 6 wrong
    (2, "8", "length"),  # 7 was cut
    (0, "5;", "step"),  # 8 was never completed
]
ENDS = {3: True, 4: False, 5: True, 6: False, 7: False}


def tree(nodes: list[tuple[int | None, str, str]] = NODES) -> Json:
    return {"nodes": [{"parent": p, "text": t, "end": e, "tokens": [i]} for i, (p, t, e) in enumerate(nodes)]}


def outcome(ends: dict[int, bool | None], answer: str = "3;6", scores: tuple[float | None, ...] = ()) -> Outcome:
    given = scores or (None,) * len(ends)
    return Outcome(0, "t", True, next(iter(ends), None), answer, 9, 0, tuple(ends), tuple(ends.values()), given)


FOUND = ended(outcome({**ENDS}), tree(), ";")


def test_texts_and_paths_are_read_from_the_stored_tree() -> None:
    assert stored.path(tree(), 6) == [0, 2, 6] and stored.texts(tree())[6] == "4;7"
    assert stored.tokens(tree(), 6).tolist() == [0, 2, 6]
    halves = tree([(None, "", ""), (0, "\ufffd", "step"), (1, "é", "stop")])
    assert stored.texts(halves) == ["", "\ufffd", "é"]  # the rest of a character replaces its first half


def test_the_value_of_a_prefix_is_the_share_of_right_completions_that_begin_with_it() -> None:
    assert values(FOUND) == {("3",): 2 / 3, ("3", "6"): 1.0, ("3", "7"): 0.0, ("4",): 0.0, ("4", "7"): 0.0}


def test_each_different_completion_is_one_labelled_solution() -> None:
    rows = {row.steps: row.labels for row in solutions(TASK, FOUND)}
    assert rows == {("3", "6"): (2 / 3, 1.0), ("3", "7"): (2 / 3, 0.0), ("4", "7"): (0.0, 0.0)}


def test_pairs_share_a_prefix_and_differ_in_the_value_of_the_next_step() -> None:
    rows = [(pair.chosen, pair.rejected, pair.margin) for pair in pairs(TASK, FOUND)]
    assert rows == [("3;6", "4;7", pytest.approx(2 / 3)), ("3;6", "3;7", 1.0)]
    assert pairs(TASK, ended(outcome({3: True, 5: True}), tree(), ";")) == []  # nothing differs


def test_demonstrations_are_right_and_the_chosen_completion_if_that_is() -> None:
    def told(one: Outcome) -> list[str]:
        found = ended(one, tree(), ";", revisions=True)
        return [row["messages"][-1]["content"] for row in demonstration(TASK, one, found)]

    assert told(outcome({**ENDS})) == ["3;6"]
    assert told(outcome({4: False, 3: True}, answer="3;7")) == ["3;6"]  # the scorer chose a wrong one
    assert told(outcome({4: False, 6: False}, answer="3;7")) == []


def test_unverified_and_cut_completions_and_revisions_are_no_data() -> None:
    assert [one.text for one in ended(outcome({3: None, 7: False, 4: False}), tree(), ";")] == ["3;7"]
    revised = tree([(None, "", ""), (0, "7", "stop"), (None, "", ""), (2, "6", "stop")])
    ends = outcome({1: False, 3: True}, answer="6")
    assert [one.text for one in ended(ends, revised, ";")] == ["7"]
    assert [one.text for one in ended(ends, revised, ";", revisions=True)] == ["7", "6"]


def test_the_files_are_read_by_the_commands_that_train_on_them(tmp_path: Path) -> None:
    one = outcome({**ENDS})
    found = Searched(summarise([one], "beam", 4, ""), [TASK], [one], [tree()], ";")
    files = [str(tmp_path / name) for name in ("prm.jsonl", "pairs.jsonl", "sft.jsonl")]
    assert write(found, *files) == dict(zip(files, (3, 2, 1), strict=True))
    assert read_solutions(files[0]) == solutions(TASK, FOUND) and read_preferences(files[1]) == pairs(TASK, FOUND)
    (row,) = read_rows(files[2])
    assert row_to_conversation(row) == (*TASK.messages, Message("assistant", "3;6"))
