"""Rewards put together: how they are written, what they score, and that every part stays visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import posttrain as pt
from posttrain.rewards.combine import Gate, Leaf, Sum, joined, labels, leaves, parse
from posttrain.rewards.functions import reward_from
from posttrain.rewards.scoring import score_all, score_safely
from posttrain.rewards.verifiers import exact, format, math, numeric
from posttrain.rollout.tasks import check_gold
from posttrain.store.run import Run
from posttrain.types import ConfigError, DataError, Message, RolloutError, Task, Verdict

TASK = Task("t:1", "t", (Message("user", "What is 6*7?"),), "42")
THOUGHT, BARE, WRONG = "<think>6*7</think>42", "42", "<think>6*7</think>41"


def shape(node: Any) -> Any:
    """A tree as plain values: a leaf is its name."""
    if isinstance(node, Leaf):
        return (node.name, dict(node.settings)) if node.settings else node.name
    return [(w, shape(n)) for w, n in node.terms] if isinstance(node, Sum) else tuple(shape(n) for n in node.parts)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("math", "math"),
        (" ( math ) ", "math"),
        ("math + 0.2*format", [(1, "math"), (0.2, "format")]),
        ("math+.2*format-3 * repetition", [(1, "math"), (0.2, "format"), (-3, "repetition")]),
        ("format & math", ("format", "math")),
        ("format&repetition&math", ("format", "repetition", "math")),
        ("format & math + 0.5*language", ("format", [(1, "math"), (0.5, "language")])),
        ("math + (format & exact)", [(1, "math"), (1, ("format", "exact"))]),
        ("2*(math + format)", [(2, [(1, "math"), (1, "format")])]),
        ("2e-1*math", [(0.2, "math")]),
        ("cosine_length(limit=4000)", ("cosine_length", {"limit": 4000})),
        (
            "numeric(tolerance='1%') - repetition(n=3, most=0.5)",
            [(1, ("numeric", {"tolerance": "1%"})), (-1, ("repetition", {"n": 3, "most": 0.5}))],
        ),
        ("language(language=de, strict=true, shift=-1)", ("language", {"language": "de", "strict": True, "shift": -1})),
        ("my/re-wards.py:f + model:runs/a+runs/b", [(1, "my/re-wards.py:f"), (1, "model:runs/a+runs/b")]),
        ("'my rewards/a+b.py:f' & math", ("my rewards/a+b.py:f", "math")),
        ('"judge:a b.toml"', "judge:a b.toml"),
    ],
)
def test_what_a_text_means(text: str, means: Any) -> None:
    assert shape(parse(text)) == means


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ends after character 0: expected a reward's name"),
        ("math +", r"ends after character 6: expected a reward's name or \("),
        ("math format", "character 6: found 'format', expected"),
        ("math ++ format", r"character 7: found '\+', expected a reward's name"),
        ("-math", "character 1: found '-'"),
        ("0.2 math", r"character 5: found 'math', expected \* and a reward after the weight 0.2"),
        ("(math", "ends after character 5: expected \\)"),
        ("math)", "character 5: found '\\)'"),
        ("math % format", "character 6: unexpected '%'"),
        ("numeric(tolerance)", "expected a setting"),
        ("numeric(tolerance=)", "expected a number"),
        ("numeric(a=1 b=2)", "character 13: found 'b', expected , or"),
        ("numeric()", "expected a setting"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_character(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(text)


def test_an_unknown_name_is_named_with_its_character_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"character 12: unknown reward 'fromat'. Did you mean 'format'\?"):
        reward_from("math + 0.2*fromat")
    with pytest.raises(ConfigError, match="character 1: reward file nowhere.py does not exist"):
        reward_from("nowhere.py:f & math")


@pytest.mark.parametrize(
    ("text", "reply", "score", "passed"),
    [
        ("math + 0.2*format", THOUGHT, 1.2, True),
        ("math + 0.2*format", BARE, 1.0, True),
        ("math + 0.2*format", WRONG, 0.2, False),
        ("0.2*format + math", BARE, 1.0, False),  # the first term says whether a reply passes
        ("math - 0.5*format", THOUGHT, 0.5, True),
        ("format & math", THOUGHT, 1.0, True),
        ("format & math", BARE, 0.0, False),
        ("format & math", WRONG, 0.0, False),
        ("math & cosine_length(limit=40)", WRONG, 0.0, False),
        ("format & 0.5*math", THOUGHT, 0.5, True),
        ("numeric(tolerance=1)", "41", 1.0, True),
        ("numeric(tolerance=1) & numeric", "41", 0.0, False),
    ],
)
def test_weights_add_up_and_gates_close(text: str, reply: str, score: float, passed: bool) -> None:
    verdict = reward_from(text)(TASK, reply)
    assert (verdict.score, verdict.passed) == (pytest.approx(score), passed)


def test_every_part_stays_visible_also_behind_a_closed_gate() -> None:
    verdict = reward_from("format & math + 0.2*numeric(tolerance=1) + 0.1*numeric")(TASK, "41")
    assert verdict.parts == {
        "format": 0, "format/tags": 0, "format/thoughts": 0, "format/answer": 0,
        "math": 0, "numeric": 1, "numeric#2": 0,
    }  # fmt: skip
    assert "math: expected 42, got 41" in verdict.detail


def test_a_reward_that_stands_twice_is_asked_once() -> None:
    tree = parse("math + 0.5*(format & math)")
    assert [leaf.name for leaf in leaves(tree)] == ["math", "format"]
    assert [*labels(tree).values()] == ["math", "format"]


def test_a_single_name_is_the_verifier_itself() -> None:
    assert reward_from("math") is math and reward_from("(exact)") is exact and reward_from(format) is format


def test_functions_from_files_and_auto_are_parts_like_others(tmp_path: Path) -> None:
    folder = tmp_path / "a & b"
    folder.mkdir()
    (folder / "mine.py").write_text("def brief(completion, least=1, **task):\n    return least / len(completion)\n")
    assert reward_from(f"{folder}/mine.py:brief")(TASK, BARE).score == 0.5  # a path that exists needs no quotes
    both = reward_from(f"auto + '{folder}/mine.py:brief'(least=4)", auto=lambda task: numeric)
    assert both(TASK, BARE).parts == {"auto": 1, "brief": 2}


def test_a_part_that_cannot_judge_leaves_the_whole_unscored(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def bad(completion):\n    return float('nan')\n")
    verdict, why = score_safely(reward_from(f"math + {tmp_path}/bad.py:bad"), TASK, BARE)
    assert verdict is None and why and "reward bad returned nan" in why


class Together:
    """A reward that judges all replies in one call, as a model does: their lengths; "" cannot be judged."""

    def __call__(self, task: Task, text: str) -> Verdict:
        raise AssertionError("one by one")

    def score_all(self, pairs: Sequence[tuple[Task, str]]) -> list[Verdict | RolloutError]:
        return [Verdict(float(len(text)), True) if text else RolloutError("no text") for _, text in pairs]


def test_a_part_that_judges_many_at_once_still_does() -> None:
    load: Callable[[str], Any] = lambda name: Together() if name == "model:x" else None
    verify = reward_from("format & math + 0.1*model:x", load=load)
    judged = score_all(verify, [(TASK, THOUGHT), (TASK, ""), (TASK, BARE)])
    first, why, last = judged[0][0], judged[1], judged[2][0]
    assert first and first.score == pytest.approx(1 + 0.1 * len(THOUGHT)) and first.parts["model"] == len(THOUGHT)
    assert why == (None, "no text")
    assert last and (last.score, last.parts["model"]) == (0, 2)
    assert not hasattr(reward_from("format & math"), "score_all")


NAMES = st.sampled_from("abcde")
TREES = st.recursive(
    NAMES.map(Leaf),
    lambda inner: st.one_of(
        st.lists(st.tuples(st.sampled_from([1.0, 0.5, 2.0]), inner), min_size=2, max_size=3).map(
            lambda t: Sum(tuple(t))
        ),
        st.lists(inner, min_size=2, max_size=3).map(lambda t: Gate(tuple(t))),
    ),
    max_leaves=6,
)


def written(node: Any) -> str:
    if isinstance(node, Leaf):
        return node.name
    if isinstance(node, Sum):
        return " + ".join(f"{w}*({written(n)})" for w, n in node.terms)
    return " & ".join(f"({written(n)})" for n in node.parts)


@given(TREES, st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_tree_that_is_written_reads_as_itself_and_all_passing_parts_pass(tree: Any, passing: list[bool]) -> None:
    assert shape(parse(written(tree))) == shape(tree)
    verdicts = {Leaf(name).key: Verdict(float(ok), ok) for name, ok in zip("abcde", passing, strict=True)}
    verdict = joined(tree, verdicts)
    used = {leaf.name: verdicts[leaf.key] for leaf in leaves(tree)}
    assert verdict.parts == {name: one.score for name, one in used.items()}
    assert verdict.score >= 0
    if all(one.passed for one in used.values()):
        assert verdict.passed and verdict.score > 0
    if not any(one.passed for one in used.values()):
        assert not verdict.passed and verdict.score == 0


def test_every_part_s_own_gold_answer_is_checked_before_step_0() -> None:
    right = Task("t:1", "t", (Message("user", "?"),), "42", {"pattern": r"\d+"})
    check_gold([right], "format & regex + 0.5*math + language(language=en)")
    check_gold([replace(right, answer=None)], "regex")
    for bad, name, says in (
        (replace(right, answer=None), "format & math", "no gold answer"),
        (right, "regex(pattern='[a-z]+') + math", "its gold answer '42' does not pass regex"),
        (right, "math + regex(pattern='.*')", "an empty reply passes"),
        (right, "math + regex(pattern='(')", "cannot be scored|does not pass"),
        (right, "ifeval", "cannot be scored .*instruction_id_list"),
        (right, "cosine_length", r"cosine_length\(limit=4000\)"),
    ):
        with pytest.raises(DataError, match=says):
            check_gold([bad], name)


def test_a_run_keeps_the_parts_of_every_episode_and_their_means(tmp_path: Path) -> None:
    small: dict[str, Any] = {"prompts": 2, "group_size": 2, "rollout__max_tokens": 16, "problems": 2}
    result = pt.grpo("abacus", "sums", "auto + 0.2*format", tmp_path / "run", steps=1, **small)
    with Run.read(result.folder) as run:
        episodes = run.episodes("train")
        step, held_out = run.at(1), run.episodes("eval", 1)
    assert len(episodes) == 4
    for kind, rows in (("", episodes), ("eval/", held_out)):
        for name in ("auto", "format", "format/tags", "auto/correct"):
            mean = sum(row.parts[name] for row in rows) / len(rows)
            assert step[f"{kind}part/{name}"] == pytest.approx(mean), "the part is a metric of the step"
    for episode in episodes:
        parts = dict(episode.parts)
        assert {"auto", "format", "format/tags", "auto/correct"} <= parts.keys()
        assert episode.reward == pytest.approx(parts["auto"] + 0.2 * parts["format"])


def test_a_part_for_the_tasks_of_one_name_is_neither_asked_nor_counted_for_others() -> None:
    verify = reward_from("exact@sums + 0.5*format@sums - numeric@products")
    sums, products = (Task("t", env, (Message("user", "?"),), "4") for env in ("sums", "products"))
    assert verify(sums, "<think>2+2</think>4").score == 1.5 and verify(sums, "4").score == 1.0
    judged = verify(products, "4")
    assert judged.score == -1.0 and judged.parts.keys() & {"exact", "format"} == set()
    assert not verify(products, "5").passed, "the first part that is asked says whether a reply passes"
    with pytest.raises(RolloutError, match="no part of the reward applies to this task"):
        reward_from("exact@sums")(products, "4")


def test_a_gate_for_other_tasks_is_open() -> None:
    verify = reward_from("format@sums & exact")
    plain = Task("t", "other", (Message("user", "?"),), "4")
    assert verify(plain, "4").score == 1.0 and verify(Task("t", "sums", plain.messages, "4"), "4").score == 0.0


def test_the_name_of_tasks_must_follow_its_sign() -> None:
    with pytest.raises(ConfigError, match="expected a task name after @"):
        parse("exact@ + format")
