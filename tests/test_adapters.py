"""Environments of other interfaces: Gymnasium's with text, and those of the package verifiers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from posttrain import api, config
from posttrain.envs import ENVS
from posttrain.envs.env import load_env, own_tasks
from posttrain.envs.gymnasium import Gymnasium
from posttrain.envs.scripted import played
from posttrain.rollout.tasks import env_hash
from posttrain.types import ConfigError, Message, RolloutError
from tests import tiny

# --- Gymnasium -------------------------------------------------------------------------------------------------------

LIFT = '''
"""A lift: say up or down until you are on the floor that was asked for."""
import random


class Lift:
    def __init__(self, floors=5):
        self.floors, self.closed = floors, False

    def reset(self, *, seed=None, options=None):
        self.floor, self.goal, self.moves = 1, random.Random(seed).randint(2, self.floors), 0
        return f"Floor 1. Go to {self.goal}.", {}

    def step(self, action):
        self.floor += {"up": 1, "down": -1}.get(action, 0)
        self.moves += 1
        there = self.floor == self.goal
        return f"Floor {self.floor}.", float(there) - 0.1, there, self.moves == 6, {}

    def close(self):
        self.closed = True


class Old(Lift):
    def step(self, action):
        return super().step(action)[:4]


class Numbers(Lift):
    def reset(self, *, seed=None, options=None):
        return 7, {}


class Buttons(Lift):
    class action_space:
        n, start = 2, 1

    def step(self, action):
        text, reward, there, late, info = super().step({1: "up", 2: "down"}[action])
        return text, reward, there, late, {"is_success": there and self.moves < 4}
'''


@pytest.fixture
def lift(tmp_path: Path) -> str:
    (tmp_path / "lift.py").write_text(LIFT)
    return f"gymnasium:{tmp_path / 'lift.py'}"


def test_an_environment_in_a_file_is_played_by_its_text(lift: str) -> None:
    env = load_env(f"{lift}:Lift", ENVS)
    assert isinstance(env, Gymnasium)
    tasks = env.tasks(20, 0)
    assert tasks == env.tasks(20, 0) != env.tasks(20, 1)
    assert {task.prompt[-2] for task in tasks} == set("2345")
    for task in tasks:
        goal = int(task.prompt[-2])
        game = played(env, task, lambda said: "<think>which way?</think>up")
        assert game.passed and game.reward == pytest.approx(1 - 0.1 * (goal - 1))
        assert game.messages[0] == task.messages[0]
        assert [m.content for m in game.messages[2::2]] == [f"Floor {n}." for n in range(2, goal)]
        assert not played(env, task, lambda said: "").passed


def test_every_attempt_has_an_environment_of_its_own_that_is_closed(lift: str) -> None:
    env = load_env(f"{lift}:Lift", ENVS)
    (task,) = env.tasks(1, 0)  # type: ignore[attr-defined]
    one, other = env(task, 0), env(task, 0)
    one.step("up")
    assert other.step("down").messages[0].content == "Floor 0."
    one.close()  # type: ignore[attr-defined]
    assert one.env.closed and not other.env.closed  # type: ignore[attr-defined]


def test_discrete_actions_are_the_number_in_a_reply_and_what_is_none_ends_the_episode(lift: str) -> None:
    env = load_env(f"{lift}:Buttons", ENVS)
    tasks = env.tasks(20, 0)  # type: ignore[attr-defined]
    low, high = (next(t for t in tasks if f"to {n}." in t.prompt) for n in (3, 5))
    assert played(env, low, lambda said: "I press 1").passed
    late = played(env, high, lambda said: "I press 1")
    assert late.reward == pytest.approx(0.6) and not late.passed  # `info` says that it was no success
    for reply in ("up", "3", "0", "-1"):
        turn = env(low, 0).step(reply)
        assert turn.done and not turn.passed and turn.parts["valid"] == 0


def test_a_step_of_the_old_interface_and_an_observation_that_is_no_text_are_named(lift: str) -> None:
    env = load_env(f"{lift}:Old", ENVS)
    (task,) = env.tasks(1, 0)  # type: ignore[attr-defined]
    with pytest.raises(RolloutError, match=r"expected \(observation, reward, terminated, truncated, info\)"):
        env(task, 0).step("up")
    with pytest.raises(RolloutError, match="the environment's observation is int, expected text"):
        load_env(f"{lift}:Numbers", ENVS).tasks(1, 0)  # type: ignore[attr-defined]


def test_a_registered_environment_is_made_by_gymnasium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gymnasium", reason="needs the package gymnasium, which is not installed")
    based = LIFT.replace("import random", "import random\nimport gymnasium\nfrom gymnasium import spaces", 1)
    based = based.replace("class Lift:", "class Lift(gymnasium.Env):\n    metadata = {'render_modes': []}", 1)
    texts = "spaces.Text(80, charset=frozenset(map(chr, range(32, 127))))"
    made = "self.floors, self.closed = floors, False"
    based = based.replace(made, f"{made}\n        self.observation_space = self.action_space = {texts}")
    (tmp_path / "tall.py").write_text(based + "\n\ngymnasium.register('Tall-v0', entry_point=Lift)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    env = load_env("gymnasium:tall:Tall-v0", ENVS)
    for task in env.tasks(5, 0):  # type: ignore[attr-defined]
        assert played(env, task, lambda said: "up").passed
    with pytest.raises(ConfigError, match="gymnasium cannot make 'Nowhere-v0'"):
        load_env("gymnasium:Nowhere-v0", ENVS)


def test_a_run_plays_a_gymnasium_environment_whose_file_is_part_of_what_it_started_with(
    lift: str, tmp_path: Path
) -> None:
    model = tiny.stopping(tiny.chatty(tmp_path / "model"))
    settings = {"model.path": str(model), "env.name": f"{lift}:Lift", "run.out": str(tmp_path / "run")}
    settings |= {"data.count": 20, "eval.problems": 2, "algo.prompts": 2, "algo.group_size": 2, "train.steps": 1}
    settings |= {"rollout.max_tokens": 8, "rollout.slots": 32, "train.threads": 1}
    recipe = config.resolve("grpo", {}, settings)
    assert api.start("grpo", recipe).summary is not None
    _, groups = api.evaluate_recipe(str(tmp_path / "run"), recipe)
    assert all(episode.turn_rewards[0] == -0.1 for group in groups for episode in group)
    before = env_hash(recipe.env.name)
    file = tmp_path / "lift.py"
    file.write_text(file.read_text() + "\n# another comment\n")
    assert env_hash(recipe.env.name) != before


# --- verifiers -------------------------------------------------------------------------------------------------------


class FakeMessage(dict[str, Any]):
    """The package's messages are read like mappings."""


class FakeClient:
    __abstractmethods__ = frozenset({"setup_client", "close"})

    def __init__(self, client: Any) -> None:
        self.client = client


class FakeRubric:
    def __init__(self, function: Callable[[list[Any], str], float]) -> None:
        self.function = function

    async def score_rollout(self, state: dict[str, Any]) -> None:
        state["reward"] = self.function(state["completion"], state["answer"])
        state["metrics"] = {"num_turns": float(len(state["trajectory"]))}


class FakeEnv:
    """What the documentation of verifiers says of MultiTurnEnv: setup, then a reply and a response by turns."""

    tool_defs: list[Any] | None = None
    requires_group_rollouts = False

    def __init__(self, rows: Sequence[dict[str, Any]], turns: int = 3) -> None:
        self.rows, self.turns, self.cleaned = rows, turns, 0
        self.rubric = FakeRubric(lambda said, answer: float(answer in said[-1]["content"]))

    def get_dataset(self, n: int = -1, seed: int | None = None) -> list[dict[str, Any]]:
        return list(self.rows[:n])

    async def rollout(self, input: dict[str, Any], client: Any, model: str, sampling_args: Any = None) -> Any:
        state = {**input, "trajectory": [], "completion": [], "error": None}
        messages = [FakeMessage(m) for m in input["prompt"]]
        begun = len(messages)
        try:
            while True:
                response = await client.get_response(prompt=messages, model=model, sampling_args={}, tools=None)
                messages.append(FakeMessage(role="assistant", content=response.message["content"]))
                state["trajectory"].append(response)
                state["completion"] = messages[begun:]
                if len(state["trajectory"]) == self.turns or input["answer"] in messages[-1]["content"]:
                    return state
                await asyncio.sleep(0)
                messages = await self.env_response(messages, state)
        finally:
            self.cleaned += 1

    async def env_response(self, messages: list[Any], state: dict[str, Any]) -> list[Any]:
        return [*messages, FakeMessage(role="user", content=f"Not {messages[-1]['content']}.")]


class Forgetful(FakeEnv):
    async def env_response(self, messages: list[Any], state: dict[str, Any]) -> list[Any]:
        return [FakeMessage(role="user", content="In short: a colour."), FakeMessage(role="user", content="Again?")]


class Broken(FakeEnv):
    async def env_response(self, messages: list[Any], state: dict[str, Any]) -> list[Any]:
        raise KeyError("no such thing")


class WithTools(FakeEnv):
    tool_defs = [object()]


ROWS = [
    {"prompt": [{"role": "user", "content": "Which colour?"}], "answer": colour, "example_id": i, "info": {"n": i}}
    for i, colour in enumerate(("red", "blue", "green"))
]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for the package, with environments by their names."""
    known: dict[str, Any] = {
        "colours": FakeEnv(ROWS),
        "forgetful": Forgetful(ROWS),
        "broken": Broken(ROWS),
        "tools": WithTools(ROWS),
    }

    def load_environment(name: str) -> Any:
        if name not in known:
            raise ValueError(f"Could not import '{name}' environment.")
        return known[name]

    modules = {name: ModuleType(name) for name in ("verifiers", "verifiers.clients", "verifiers.types")}
    modules["verifiers"].load_environment = load_environment  # type: ignore[attr-defined]
    modules["verifiers.clients"].Client = FakeClient  # type: ignore[attr-defined]
    modules["verifiers.types"].Response = SimpleNamespace  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield known


def test_a_rollout_of_verifiers_goes_on_with_each_reply_and_its_rubric_scores_it(package: dict[str, Any]) -> None:
    env = load_env("verifiers:colours", ENVS)
    tasks = own_tasks(env)
    assert tasks is not None
    red, blue, _ = tasks(3, 0)
    assert (red.id, red.answer, red.prompt) == ("verifiers:colours-0", "red", "Which colour?")
    replies = iter(["green", "<think>not green</think> blue"])
    game = played(env, blue, lambda said: next(replies))
    assert game.passed and game.rewards == (0.0, 1.0)
    assert game.messages[:3] == (*blue.messages, Message("assistant", "green"), Message("user", "Not green."))
    lost = played(env, red, lambda said: "mauve")
    assert not lost.passed and lost.rewards == (0.0, 0.0, 0.0)
    assert package["colours"].cleaned == 2


def test_many_rollouts_are_under_way_at_once_and_do_not_mix(package: dict[str, Any]) -> None:
    env = load_env("verifiers:colours", ENVS)
    tasks = env.tasks(3, 0)  # type: ignore[attr-defined]
    worlds = [(task, env(task, i)) for i, task in enumerate(tasks * 20)]
    for _, world in worlds:
        assert world.step("pink").messages[0].content == "Not pink."
    assert all(world.step(str(task.answer)).passed for task, world in worlds)


def test_what_an_environment_rewrites_becomes_an_edited_history(package: dict[str, Any]) -> None:
    env = load_env("verifiers:forgetful", ENVS)
    turn = env(env.tasks(1, 0)[0], 0).step("mauve")  # type: ignore[attr-defined]
    assert turn.history == (Message("user", "In short: a colour."),) and turn.messages == (Message("user", "Again?"),)


def test_an_error_in_a_rollout_leaves_its_attempt_unscored(package: dict[str, Any]) -> None:
    env = load_env("verifiers:broken", ENVS)
    with pytest.raises(KeyError, match="no such thing"):
        env(env.tasks(1, 0)[0], 0).step("mauve")  # type: ignore[attr-defined]


def test_a_rollout_that_is_given_up_is_cleaned_up(package: dict[str, Any]) -> None:
    env = load_env("verifiers:colours", ENVS)
    world = env(env.tasks(1, 0)[0], 0)  # type: ignore[attr-defined]
    world.close()  # type: ignore[attr-defined]
    with pytest.raises(RolloutError, match="was cancelled"):
        world.step("red")
    assert package["colours"].cleaned == 1


def test_environments_that_cannot_be_adapted_are_refused_before_the_run(
    package: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="uses tools"):
        load_env("verifiers:tools", ENVS)
    with pytest.raises(ConfigError, match="cannot load the environment 'nowhere': Could not import"):
        load_env("verifiers:nowhere", ENVS)
    monkeypatch.setitem(sys.modules, "verifiers.clients", None)
    with pytest.raises(ConfigError, match="needs the package verifiers"):
        load_env("verifiers:colours", ENVS)


def test_the_real_package_plays_one_of_its_own_environments() -> None:
    vf = pytest.importorskip("verifiers", reason="needs the package verifiers, which is not installed")
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"Say {word}.", "answer": word} for word in ("one", "two", "three")]

    async def right(completion: Any, answer: str) -> float:
        return float(answer in completion[-1]["content"])

    class Again(vf.MultiTurnEnv):
        async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
            return [{"role": "user", "content": f"Not {messages[-1]['content']}."}]

        @vf.stop
        async def said(self, state: Any) -> bool:
            steps = state["trajectory"]
            return bool(steps) and state["answer"] in steps[-1]["completion"][-1]["content"]

    made = Again(dataset=datasets.Dataset.from_list(rows), rubric=vf.Rubric(funcs=[right]), max_turns=3)
    module = ModuleType("posttrain_test_again")
    module.load_environment = lambda: made  # type: ignore[attr-defined]
    sys.modules["posttrain_test_again"] = module
    env = load_env("verifiers:posttrain-test-again", ENVS)
    for task in env.tasks(3, 0):  # type: ignore[attr-defined]
        replies = iter(["zero", str(task.answer)])
        game = played(env, task, lambda said, replies=replies: next(replies))
        assert game.passed and game.rewards == (0.0, 1.0) and game.messages[2].content == "Not zero."
        assert not played(env, task, lambda said: "zero").passed
