"""Stop strings and extra stop tokens: where a completion ends, what is trained, and what the verifier reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import posttrain as pt
from posttrain import config
from posttrain.cli import chat
from posttrain.config import ModelConfig
from posttrain.models.load import Policy, load_policy
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import Request
from posttrain.rollout.stopping import StopStrings, check_strings, completion_text
from posttrain.rollout.text import Stream
from posttrain.store.listing import stop_settings
from posttrain.store.run import Run
from posttrain.types import Completion, ConfigError, SamplingParams
from tests import tiny

PIECES = ["a", "b", "ab", "ba", "aab", "\n", "é"]


def spell(tokens: np.ndarray) -> str:
    """Bytes of token t: PIECES[t]; the ids after them are the two bytes of é. Broken characters decode to U+FFFD."""
    raw = [*(piece.encode() for piece in PIECES), b"\xc3", b"\xa9", b""]
    return b"".join(raw[t] for t in tokens).decode("utf-8", "replace")


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.lists(st.sampled_from(["a", "aa", "ab\n", "bab", "\n\n", "é", "bé"]), min_size=1, max_size=3),
)
def test_a_completion_ends_at_the_first_token_with_which_its_text_contains_a_stop_string(
    tokens: list[int], strings: list[str]
) -> None:
    found = StopStrings(strings, spell, [9])
    ends = [n for n in range(1, len(tokens) + 1) if any(s in spell(np.array(tokens[:n])) for s in strings)]
    said = ""
    for n in range(1, (ends[0] if ends else len(tokens)) + 1):
        said = found.completed_by(np.array(tokens[:n]))
        assert bool(said) == (bool(ends) and n == ends[0]), (tokens[:n], said)
    if ends:
        row = np.array(tokens[: ends[0]], np.int32)
        whole, zeros = spell(row), np.zeros(len(row), np.float32)
        text = completion_text(spell, Completion(row, zeros, zeros, "stop", 0, said))
        assert text == whole[: min(at for s in strings if (at := whole.find(s)) >= 0)]
        assert not any(s in text for s in strings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return load_policy(ModelConfig(path=str(model)))


def requests(policy: Policy, count: int = 12) -> list[Request]:
    return [Request(prompt, (i, i + 100)) for i, prompt in enumerate(tiny.prompts(policy, count, longest=9))]


def texts(policy: Policy, tokens: np.ndarray) -> str:
    return policy.tokenizer.decode(tokens, skip_special_tokens=True)


def common(policy: Policy, found: list[list[Completion]]) -> str:
    """A character that several of the completions contain, but not at once."""
    said = [texts(policy, c.tokens) for group in found for c in group]
    letters = {c for text in said for c in text[1:] if c.isascii() and c.isprintable()}
    return max(letters, key=lambda c: sum(c in text[2:] for text in said))


def test_with_stop_strings_a_completion_is_the_beginning_of_the_one_without_whatever_its_batch_mates(
    policy: Policy,
) -> None:
    asked, params = requests(policy), SamplingParams(max_tokens=24)
    whole = EmbeddedGenerator(policy, 32).generate(asked, params)
    stop = common(policy, whole)
    ending = SamplingParams(max_tokens=24, stop=(stop, "\n\n\n"))
    many = EmbeddedGenerator(policy, 32).generate(asked, ending)
    alone = [EmbeddedGenerator(policy, 16).generate([request], ending)[0] for request in asked]
    stopped = 0
    for full, group, single in zip(whole, many, alone, strict=True):
        for a, b, c in zip(full, group, single, strict=True):
            n = len(b.tokens)
            assert np.array_equal(b.tokens, a.tokens[:n]) and np.array_equal(b.logprobs, a.logprobs[:n])
            assert np.array_equal(b.tokens, c.tokens) and b.stop_string == c.stop_string
            assert (stop in texts(policy, a.tokens)) == (b.stop_string == stop)
            if b.stop_string:
                assert b.stop == "stop" and stop not in texts(policy, b.tokens[:-1])
                text = completion_text(lambda tokens: texts(policy, tokens), b)
                assert text == texts(policy, a.tokens).partition(stop)[0]
                stopped += 1
    assert stopped > 3


def test_a_stop_string_may_begin_in_the_prefix_but_one_within_it_does_not_end_the_rest(policy: Policy) -> None:
    params = SamplingParams(max_tokens=24)
    (request,) = requests(policy, 1)
    ((first, _),) = EmbeddedGenerator(policy, 16).generate([request], params)
    assert len(first.tokens) > 8
    prefix = first.tokens[:5]
    rest = Request(request.prompt, request.seeds[:1], prefix=prefix)
    over = texts(policy, first.tokens[4:6])  # its last token is the first new one
    ((found,),) = EmbeddedGenerator(policy, 16).generate([rest], SamplingParams(max_tokens=19, stop=(over,)))
    if texts(policy, first.tokens).find(over) == len(texts(policy, first.tokens[:4])):
        assert found.stop_string == over and len(found.tokens) == 1
    inside = texts(policy, first.tokens[1:3])
    ((found,),) = EmbeddedGenerator(policy, 16).generate([rest], SamplingParams(max_tokens=19, stop=(inside,)))
    assert not found.stop_string or inside in texts(policy, first.tokens[2:])


def test_a_run_trains_the_tokens_up_to_the_stop_and_scores_the_text_before_it(model: Path, tmp_path: Path) -> None:
    read: list[str] = []

    def reward(completion: str, **task: Any) -> float:
        read.append(completion)
        return float(len(completion) % 2)

    settings: dict[str, Any] = {"steps": 1, "rollout__max_tokens": 24, "rollout__slots": 32, "prompts": 4,
                                "group_size": 4, "problems": 2, "count": 16, "threads": 1,
                                "checkpoint_every": 1}  # fmt: skip
    stops = [chr(c) for c in range(33, 80)]
    done = pt.grpo(str(model), "sums", reward, tmp_path / "run", rollout__stop=stops, format="plain", **settings)
    with Run.read(done.folder) as run:
        rows = run.episodes("train", 1)
        assert run.header["recipe"]["rollout"]["stop"] == stops
    tokenizer = load_policy(ModelConfig(path=str(model))).tokenizer
    ended = 0
    for row in rows:
        said = tokenizer.decode(row.tokens[row.loss_mask], skip_special_tokens=True)
        assert row.text in read and not any(c in row.text for c in stops)
        if any(c in said for c in stops):
            assert row.stop == "stop" and said[:-1] == row.text and row.length == int(row.loss_mask.sum())
            ended += 1
    assert ended > 8
    (saved,) = (done.folder / "ckpt").glob("step_*")
    for folder in (done.folder, done.folder / "model", saved):
        assert stop_settings(folder) == (tuple(stops), ())
        answers = chat.sample(str(folder), "hello", True, 8, 1.0, 1.0, 0, 24, 0)
        assert not any(c in answer["text"] for c in stops for answer in answers), "posttrain sample stops there too"
    report, groups = pt.evaluate(str(done.folder), "sums", reward, rollout__stop=stops, rollout__max_tokens=24,
                                 eval__problems=2, format="plain")  # fmt: skip
    assert not any(c in e.text for c in stops for group in groups for e in group)


def test_extra_stop_tokens_end_a_completion_and_are_not_part_of_its_text(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 1, "rollout__max_tokens": 24, "rollout__slots": 32, "prompts": 4,
                                "group_size": 4, "problems": 2, "count": 16, "threads": 1}  # fmt: skip
    ids = list(range(30, 60))
    even = lambda completion, **task: float(len(completion) % 2)
    done = pt.grpo(str(model), "sums", even, tmp_path / "run", rollout__stop_token_ids=ids, **settings)
    with Run.read(done.folder) as run:
        rows = run.episodes("train", 1)
    said = [row.tokens[row.loss_mask] for row in rows]
    assert sum(int(tokens[-1]) in ids for tokens in said) > 4
    assert not any(np.isin(tokens[:-1], ids).any() for tokens in said)
    with pytest.raises(ConfigError, match=r"rollout.stop_token_ids has 9999, but the model's ids are below"):
        pt.grpo(str(model), "sums", even, tmp_path / "odd", rollout__stop_token_ids=[9999], **settings)


LISTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "one text": ("END", ("END",)),
    "a JSON list": ('["\\n\\n", "Q:"]', ("\n\n", "Q:")),
    "a TOML list": (["a", "b"], ("a", "b")),
    "none": ([], ()),
}


@pytest.mark.parametrize("name", LISTS)
def test_stop_strings_are_read_from_text_and_lists_and_written_as_toml(name: str, tmp_path: Path) -> None:
    value, expected = LISTS[name]
    recipe = config.resolve("grpo", {}, {"rollout.stop": value})
    assert recipe.rollout.stop == expected
    (tmp_path / "again.toml").write_text(config.as_toml("grpo", recipe))
    algorithm, sections, _ = config.read_toml(tmp_path / "again.toml")
    assert config.resolve(algorithm, sections) == recipe
    assert config.stored("grpo", json.loads(json.dumps(config.as_dict(recipe)))) == recipe


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"rollout.stop": [""]}, "has an empty string"),
    "a number": ({"rollout.stop": [3]}, "rollout.stop=3 is int, expected str"),
    "no number": ({"rollout.stop_token_ids": "[1, x]"}, "is not a JSON list"),
    "vllm": ({"rollout.stop": "x", "rollout.engine": "vllm"}, "cannot end at a string"),
    "an environment": ({"rollout.stop": "x", "env.name": "number"}, "the environment 'number' cannot answer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_stops_that_cannot_work_are_refused(name: str) -> None:
    settings, says = WRONG[name]
    with pytest.raises(ConfigError, match=says):
        config.resolve("grpo", {}, settings)


def test_a_stream_never_writes_a_part_of_a_stop_string(policy: Policy) -> None:
    written: list[str] = []
    stream = Stream(policy, written.append, ["END", "\n\n"])
    for token in policy.tokenizer.encode("it is E EN\n EN", add_special_tokens=False):
        stream.add(0, 0, token)
    assert "".join(written) == "it is E EN\n "
    stream.finish("it is E EN\n EN")
    assert "".join(written) == "it is E EN\n EN"
    for token in policy.tokenizer.encode("D more", add_special_tokens=False):
        stream.add(0, 0, token)
    assert "".join(written) == "it is E EN\n EN"


def test_a_stop_string_with_a_special_token_is_refused_unless_it_ends_completions_anyway(policy: Policy) -> None:
    special = {"<|end|>": 2, "<|call|>": 7}
    check_strings(["<|end|>", "</answer>"], special, (2,))
    for string, number in {"<|call|>": 7, "x<|call|>": 7, "<|end|>\n": 2}.items():
        with pytest.raises(ConfigError, match=rf"never be found.*stop_token_ids = \[{number}\]"):
            check_strings([string], special, (2,))


def test_a_run_refuses_a_special_token_as_a_stop_string(model: Path, policy: Policy, tmp_path: Path) -> None:
    added = policy.tokenizer.added_tokens_decoder
    odd = next(str(token) for number, token in added.items() if token.special and number not in policy.stop_ids)
    settings: dict[str, Any] = {"rollout__stop": [odd], "count": 8, "threads": 1}
    with pytest.raises(ConfigError, match="would never be found"):
        pt.grpo(str(model), "sums", lambda completion: 1.0, tmp_path / "r", steps=1, **settings)
