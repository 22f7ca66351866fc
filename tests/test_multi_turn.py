"""Episodes of several turns: who wrote which token, what is trained; worlds that are slow, crash or edit history."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.config import EnvConfig, GRPOConfig
from posttrain.data.chat import ChatFormat
from posttrain.envs import ENVS
from posttrain.envs.env import Env, EnvFactory, Turn, load_env
from posttrain.envs.timeouts import Calls
from posttrain.models.load import Policy, with_chat_format
from posttrain.rollout.collector import Collector, episode_stats, to_samples, turn_returns, turns_of
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.multi_turn import MultiTurn
from posttrain.train.forward import sample_logprobs
from posttrain.types import ConfigError, Episode, Message, RolloutError, SamplingParams, Span, Task, Verdict
from tests import tiny

TASK = Task("t", "test", (Message("user", "Say something."),), "x")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return tiny.load(tiny.stopping(tiny.chatty(tmp_path_factory.mktemp("chatty"))))


@pytest.fixture(scope="module")
def chat(policy: Policy) -> ChatFormat:
    return with_chat_format(policy, "chat")


@dataclass
class Echo:
    """Answers each reply with its length, three times; pays a tenth a turn."""

    task: Task
    seed: int
    turns: int = 0

    def step(self, reply: str) -> Turn:
        self.turns += 1
        if self.turns == 4:
            return Turn(reward=1.0, done=True, passed=True, parts={"turns": 4.0})
        return Turn.say(f"{len(reply)} letters <eos>", reward=0.1)


@pytest.fixture(scope="module")
def collect(policy: Policy, chat: ChatFormat) -> Callable[..., list[list[Episode]]]:
    generator = EmbeddedGenerator(policy, 32)

    def run(
        env: EnvFactory, tasks: Sequence[Task] = (TASK,), attempts: int = 2, **limits: float
    ) -> list[list[Episode]]:
        settings = replace(EnvConfig(), **limits)
        decode = chat.decode
        encode = lambda task: chat.prompt_tokens(task.messages)
        rollout = MultiTurn(env, encode, chat.continuation_tokens, decode, settings, 256)
        collector = Collector(
            generator, encode, decode, lambda t, s: Verdict(0, False), SamplingParams(max_tokens=8), 0,
            multi_turn=rollout,
        )  # fmt: skip
        return collector.groups(tasks, attempts, 0)

    return run


def test_what_was_sampled_is_what_is_trained(collect: Callable[..., list[list[Episode]]], policy: Policy) -> None:
    (group,) = collect(Echo, attempts=4)
    longest = max(group, key=lambda e: e.turns)
    assert longest.turns >= 2
    for episode in group:
        authors = [span.by for span in episode.spans]
        assert authors[0] == "prompt" and authors[1::2] == ["model"] * len(authors[1::2])
        assert all(author == "env" for author in authors[2::2])
        (sample,) = to_samples(episode, 1.0)
        written = np.concatenate([s.tokens for s in episode.spans if s.by == "model"])
        assert np.array_equal(sample.tokens[sample.loss_mask], written)
        (logp,) = sample_logprobs(policy, [sample], 1000)
        np.testing.assert_allclose(logp[sample.loss_mask], sample.behaviour_logp[sample.loss_mask], atol=2e-5)


def test_a_turn_is_the_templates_own_text_and_a_worlds_words_never_become_control_tokens(
    collect: Callable[..., list[list[Episode]]], policy: Policy, chat: ChatFormat
) -> None:
    (group,) = collect(Echo, attempts=4)
    eos = policy.tokenizer.eos_token_id
    for episode in group:
        for span in episode.spans[2::2]:
            text = policy.tokenizer.decode(span.tokens)
            assert text.startswith("<user>") and text.endswith("letters <eos><eos><assistant>")
            assert int((span.tokens == eos).sum()) == 1  # the template's; the world's is spelt in letters


def test_following_a_reply_gives_the_tokens_of_the_whole_conversation(chat: ChatFormat) -> None:
    before = (Message("user", "hello"), Message("assistant", "hi"))
    more = (Message("user", "and <assistant> you?"), Message("system", "x"))
    whole = chat.prompt_tokens((*before, *more))
    begun, mask = chat.conversation_tokens(before)
    begun = begun[: np.flatnonzero(mask)[-1] + 1]
    assert np.array_equal(np.concatenate([begun, chat.continuation_tokens(more)]), whole)


def test_an_attempt_does_not_depend_on_rounds_workers_or_batch_mates(
    collect: Callable[..., list[list[Episode]]],
) -> None:
    class Slow(Echo):
        def step(self, reply: str) -> Turn:
            time.sleep(0.05 * (self.seed % 3))
            return super().step(reply)

    tasks = [replace(TASK, id=str(i)) for i in range(4)]
    together = collect(Slow, tasks, 3)
    one_by_one = [collect(Echo, [task], 3, workers=1)[0] for task in tasks]
    for one, other in zip(together, one_by_one, strict=True):
        for a, b in zip(one, other, strict=True):
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.behaviour_logp, b.behaviour_logp)
            assert a.reward == b.reward and a.turn_rewards == b.turn_rewards


def test_a_world_that_crashes_or_hangs_leaves_only_its_own_attempt_unscored(
    collect: Callable[..., list[list[Episode]]],
) -> None:
    class Bad(Echo):
        def step(self, reply: str) -> Turn:
            if self.task.id == "crash":
                raise KeyError("gone")
            if self.task.id == "hang":
                time.sleep(9)
            if self.task.id == "wrong":
                return "well done"  # type: ignore[return-value]
            if self.task.id == "unspeakable":
                return Turn.say("\ud800")
            return super().step(reply)

    names = ["fine", "crash", "hang", "wrong", "unspeakable", "fine too"]
    start = time.monotonic()
    groups = collect(Bad, [replace(TASK, id=name) for name in names], 1, timeout=2)
    assert time.monotonic() - start < 8
    errors = {group[0].task_id: group[0].error for group in groups}
    assert errors["fine"] is None and errors["fine too"] is None
    assert "raised KeyError: 'gone'" in (errors["crash"] or "")
    assert "longer than 2 seconds" in (errors["hang"] or "")
    assert "the environment returned str, expected a Turn" in (errors["wrong"] or "")
    assert errors["unspeakable"]
    assert [group[0].reward is None for group in groups] == [False, True, True, True, True, False]
    for group in groups[1:5]:
        assert not any(sample.loss_mask.any() for sample in to_samples(group[0], 1.0))


def test_a_world_that_cannot_be_made_and_a_prompt_without_room_are_unscored_attempts(
    collect: Callable[..., list[list[Episode]]],
) -> None:
    def refuse(task: Task, seed: int) -> Env:
        raise ConnectionError("no server")

    (group,) = collect(refuse)
    assert all(e.reward is None and "no server" in (e.error or "") and e.length == 0 for e in group)
    (group,) = collect(Echo, [replace(TASK, messages=(Message("user", "long " * 60),))])
    assert all(e.reward is None and "leaves no room" in (e.error or "") for e in group)


def test_an_edited_history_splits_the_episode_and_both_parts_are_trained(
    collect: Callable[..., list[list[Episode]]], policy: Policy, chat: ChatFormat
) -> None:
    summary = (Message("user", "In short:"),)

    class Forgets(Echo):
        def step(self, reply: str) -> Turn:
            turn = super().step(reply)
            return replace(turn, history=summary) if self.turns == 2 else turn

    (group,) = collect(Forgets, attempts=6)
    split = [e for e in group if e.cuts]
    assert split
    for episode in split:
        first, second = to_samples(episode, 1.0)
        assert np.array_equal(np.concatenate([first.tokens, second.tokens]), episode.tokens)
        assert int(first.loss_mask.sum() + second.loss_mask.sum()) == episode.length
        said = chat.decode(episode.spans[3].tokens[:-1])
        read = (*summary, Message("user", f"{len(said)} letters <eos>"))
        assert np.array_equal(episode.segments[1][0].tokens, chat.prompt_tokens(read))
        for sample in (first, second):
            (logp,) = sample_logprobs(policy, [sample], 1000)
            np.testing.assert_allclose(logp[sample.loss_mask], sample.behaviour_logp[sample.loss_mask], atol=2e-5)


def test_the_last_turn_is_heard_and_ends_the_episode(collect: Callable[..., list[list[Episode]]]) -> None:
    closed: list[int] = []

    class Endless(Echo):
        def step(self, reply: str) -> Turn:
            return Turn.say("go on", reward=1.0)

        def close(self) -> None:
            closed.append(1)

    (group,) = collect(Endless, attempts=3, max_turns=2)
    assert all(e.turns <= 2 and e.reward == e.turns and e.spans[-1].by == "model" for e in group)
    assert len(closed) == 3
    assert episode_stats([group], 0)["turns"].value == sum(e.turns for e in group) / 3


def span(by: str, *tokens: int) -> Span:
    return Span(by, np.array(tokens), np.zeros(len(tokens), np.float32) if by == "model" else None)  # type: ignore[arg-type]


def test_what_a_turn_earned_counts_for_the_turns_before_it_and_is_compared_at_the_same_turn() -> None:
    long = Episode("a", 0, 0, (span("prompt", 1), span("model", 2, 3), span("env", 4), span("model", 5)), "", 3.0,
                   turn_rewards=(1.0, 2.0))  # fmt: skip
    short = Episode("a", 0, 1, (span("prompt", 1), span("model", 2)), "", 0.5, turn_rewards=(0.5,))
    failed = replace(short, index=2, reward=None)
    earned = turn_returns([[long, short, failed]])
    assert torch.equal(earned.nan_to_num(-1), torch.tensor([[[3.0, 2.0], [0.5, -1.0], [-1.0, -1.0]]]))
    assert [row.tolist() for row in turns_of(long)] == [[0, 0, 0, 0, 1]]
    cut = replace(long, cuts=(2,))
    assert [row.tolist() for row in turns_of(cut)] == [[0, 0, 0], [0, 1]]
    assert GRPOConfig().credit == "episode"


def test_calls_keep_to_their_limit_and_a_late_one_is_told() -> None:
    calls: Calls[int] = Calls(2, 1.0)
    running, most, late = 0, 0, []

    def work(seconds: float) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(seconds)
        running -= 1
        return seconds

    for i, seconds in enumerate([0.02, 0.02, 2.0, 0.02, 0.02]):
        calls.submit(i, lambda seconds=seconds: work(seconds), lambda i=i: late.append(i))
    found = {}
    while calls.pending:
        found |= dict(calls.finished(5.0))
    assert {i for i, value in found.items() if value == 0.02} == {0, 1, 3, 4}
    assert isinstance(found[2], TimeoutError) and late == []
    deadline = time.monotonic() + 10
    while not late and time.monotonic() < deadline:
        time.sleep(0.02)
    assert late == [2] and most <= 3  # a call that was given up may still be running


def test_an_environment_is_named_or_written_in_a_file(tmp_path: Path) -> None:
    assert load_env("number", ENVS) is ENVS["number"]
    with pytest.raises(ConfigError, match="Did you mean 'number'"):
        load_env("numbr", ENVS)
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n    def __init__(self, task, seed, verify): self.verify = verify\n"
        "    def step(self, reply): return None\n"
        "class One:\n    def __init__(self, task): pass\n    def step(self, reply): return None\n"
        "class Blind:\n    def __init__(self, task, seed): pass\n"
    )
    check = lambda task, text: Verdict(1, True)
    assert load_env(f"{file}:Mine", ENVS, check)(TASK, 0).verify is check  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="must accept a task and a seed"):
        load_env(f"{file}:One", ENVS)
    with pytest.raises(ConfigError, match=r"has no method step\(reply\)"):
        load_env(f"{file}:Blind", ENVS)


def test_a_turn_with_the_assistants_words_or_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(RolloutError, match="which only the model may write"):
        Turn((Message("assistant", "I win"),))
    with pytest.raises(RolloutError, match="expected a finite number"):
        Turn(reward=float("nan"))


def test_number_answers_higher_and_lower_and_pays_early_guesses_more() -> None:
    (task, *_) = ENVS["number"].tasks(3, 0)  # type: ignore[attr-defined]
    world = ENVS["number"](task, 0)
    secret = int(task.answer)
    low = world.step("1") if secret > 1 else Turn.say("higher")
    assert low.messages[0].content == "higher" and not low.over
    found = world.step(str(secret))
    assert found.over and found.passed and found.reward == (0.95 if secret > 1 else 1.0)
    assert ENVS["number"](task, 0).step("banana").over
