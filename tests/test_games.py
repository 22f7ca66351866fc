"""Games, the text world and the dialogue: who plays well wins, who says nothing does not, and the rules are exact."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import api, config
from posttrain.data.tasks.load import held_out, read_tasks, write_tasks
from posttrain.envs import ENVS
from posttrain.envs.adventure import Adventure, Place, after, described, drawn_map, solution
from posttrain.envs.dialogue import Dialogue, load_user, ordered
from posttrain.envs.env import load_env, own_tasks
from posttrain.envs.games import Countdown, Word, marks, value_of
from posttrain.envs.scripted import PlayedBy, played
from posttrain.envs.words import WORDS
from posttrain.store.run import Run
from posttrain.types import ConfigError, Message, Task
from tests import tiny

GAMES = ["number", "countdown", "word", "adventure", "dialogue"]

# --- players, who read only what a model would read ------------------------------------------------------------------


def halve(said: Sequence[Message]) -> str:
    low, high = 1, int(re.findall(r"\d+", said[0].content)[-1])
    for guess, answer in itertools.pairwise(said[1:]):
        if answer.content == "higher":
            low = max(low, int(guess.content) + 1)
        if answer.content == "lower":
            high = min(high, int(guess.content) - 1)
    return str((low + high) // 2)


def search(said: Sequence[Message]) -> str:
    target, *numbers = map(int, re.findall(r"\d+", said[0].content))

    def made(terms: list[tuple[Fraction, str]]) -> str | None:
        if len(terms) == 1:
            return terms[0][1] if terms[0][0] == target else None
        for i, j in itertools.permutations(range(len(terms)), 2):
            (a, left), (b, right) = terms[i], terms[j]
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            results = [(a + b, "+"), (a - b, "-"), (a * b, "*")] + ([(a / b, "/")] if b else [])
            for value, sign in results:
                if found := made([*rest, (value, f"({left}{sign}{right})")]):
                    return found
        return None

    return made([(Fraction(n), str(n)) for n in numbers]) or ""


def narrow(said: Sequence[Message]) -> str:
    left = list(WORDS)
    for guess, answer in itertools.pairwise(said[1:]):
        if guess.role == "assistant":
            seen = "".join(re.findall(r"\b[a-z]([-+?])", answer.content))
            left = [word for word in left if marks(guess.content, word) == seen]
    if len(left) == len(WORDS):
        return "stare"
    return min(left, key=lambda word: max(Counter(marks(word, other) for other in left).values()))


def follow(answer: Sequence[str]) -> PlayedBy:
    commands = iter(answer)
    return lambda said: next(commands)


def ask(said: Sequence[Message]) -> str:
    names = re.findall(r"\w+", said[0].content.partition("at a time: ")[2].partition(".")[0])
    facts = dict(re.findall(r"The (\w+): (.+)\.", "\n".join(m.content for m in said if m.role == "user")))
    missing = [name for name in names if name not in facts]
    return f"What {missing[0]}?" if missing else f"ORDER {' | '.join(facts[name] for name in names)}"


def player_of(task: Task) -> PlayedBy:
    players = {"number": halve, "countdown": search, "word": narrow, "dialogue": ask}
    return players[task.env] if task.env in players else follow(task.answer)


@pytest.mark.parametrize("name", GAMES)
def test_a_perfect_player_wins_every_game_within_the_default_turns(name: str) -> None:
    tasks = ENVS[name].tasks(30, 1)
    games = [played(ENVS[name], task, player_of(task)) for task in tasks]
    assert all(game.passed and game.reward > 0.4 for game in games)
    if name in ("adventure", "dialogue"):
        assert all(game.reward == pytest.approx(1.0) for game in games)


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("reply", ["", "I do not know.", "<think>let me see</think>", "<think>no end 8", "0", "help"])
def test_who_says_nothing_useful_wins_no_game(name: str, reply: str) -> None:
    for task in ENVS[name].tasks(30, 1):
        game = played(ENVS[name], task, lambda said: reply)
        assert not game.passed and game.reward == 0


@pytest.mark.parametrize("name", GAMES)
def test_tasks_are_a_function_of_their_seed_with_ids_that_differ_and_survive_a_file(name: str, tmp_path: Path) -> None:
    tasks, again, other = (ENVS[name].tasks(40, seed) for seed in (3, 3, 4))
    assert tasks == again and tasks != other
    assert len(tasks) == len({task.id for task in tasks}) == 40
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    back = read_tasks(tmp_path / "tasks.jsonl")
    assert all(played(ENVS[name], task, player_of(task)).passed for task in back[:5])


def test_games_of_countdown_and_words_are_not_asked_again_in_the_examination() -> None:
    for name in ("countdown", "word"):
        sets = held_out(ENVS[name].tasks(4096, 0), config.DataConfig(), 0)
        assert sets.test and not sets.notes
        assert not {str(task.answer) for task in sets.train} & {str(task.answer) for task in sets.test}


# --- number ----------------------------------------------------------------------------------------------------------


def test_halving_finds_any_of_fifteen_numbers_in_four_guesses() -> None:
    question = ENVS["number"].tasks(1, 0)[0].messages
    tries = [len(played(ENVS["number"], Task(str(n), "number", question, n), halve).rewards) for n in range(1, 16)]
    assert sorted(tries) == [1, 2, 2, 3, 3, 3, 3, *[4] * 8]


# --- countdown -------------------------------------------------------------------------------------------------------

EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.booleans()).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})" if t[3] else f"{t[0]}{t[1]}{t[2]}"
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_an_expression_has_the_value_that_exact_fractions_give_it(text: str) -> None:
    numbers = sorted(map(int, re.findall(r"\d+", text)))
    try:
        exact = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="divides by zero"):
            value_of(text)
    else:
        assert value_of(text) == (exact, numbers)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a number is missing"),
        ("1+", "a number is missing"),
        ("-1", "a number is missing"),
        ("(1+2", "not closed"),
        ("1+2)", "nothing should follow"),
        ("1 2", "nothing should follow"),
        ("2**3", "a number is missing"),
        ("4/(2-2)", "divides by zero"),
        ("__import__('os')", "only whole numbers"),
        ("٣+1", "only whole numbers"),
        ("1.5*2", "only whole numbers"),
        ("9" * 101, "more than 100 characters"),
        ("(" * 90, "a number is missing"),
    ],
)
def test_what_is_no_expression_is_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        value_of(text)


def test_countdown_tells_what_a_try_came_to_and_pays_a_later_win_less() -> None:
    meta = {"numbers": [2, 3, 5, 8], "target": 24}
    task = Task("c", "countdown", (Message("user", "Make 24."),), "(5-2)*8*1", meta)
    world = Countdown(task, 0)
    assert world.step("8/3+2+5").messages[0].content == "That is 29/3. 3 tries left."
    assert world.step("8*3").messages[0].content == "Use each of 2, 3, 5 and 8 once. 2 tries left."
    assert world.step("eight").messages[0].content.startswith("That cannot be read: only whole numbers")
    last = world.step("<think>8*5=40, 40/2=20</think>8*5-2*(3+5)")
    assert last.done and not last.passed and last.reward == 0
    assert last.parts == {"solved": 0.0, "tries": 4.0, "readable": 0.75}
    world = Countdown(task, 0)
    assert world.step("8+5+3+2").messages[0].content == "That is 18. 3 tries left."
    won = world.step("2*8+(5+3)")
    assert won.passed and won.reward == 0.9


def test_exactly_the_given_numbers_win_once_each() -> None:
    task = Task("c", "countdown", (Message("user", "Make 6."),), "1*2*3", {"numbers": [1, 2, 3], "target": 6})
    assert Countdown(task, 0).step("3*2*1").reward == 1.0
    assert Countdown(task, 0).step("1+2+3").passed
    for cheat in ("6", "3+3", "1*1*2*3", "2*3"):
        assert not Countdown(task, 0).step(cheat).passed


# --- word ------------------------------------------------------------------------------------------------------------

FIVE = st.text("abcde", min_size=5, max_size=5)


@given(FIVE, FIVE)
def test_marks_never_promise_a_letter_more_often_than_the_word_has_it(guess: str, secret: str) -> None:
    found = marks(guess, secret)
    assert [mark == "+" for mark in found] == [g == s for g, s in zip(guess, secret, strict=True)]
    for letter in set(guess):
        marked = sum(m in "+?" for g, m in zip(guess, found, strict=True) if g == letter)
        assert marked == min(guess.count(letter), secret.count(letter))


@pytest.mark.parametrize(
    ("guess", "secret", "expected"),
    [
        ("crane", "crane", "+++++"),
        ("eerie", "crane", "--?-+"),
        ("llama", "label", "+??--"),
        ("speed", "erase", "?-??-"),
    ],
)
def test_marks_worked_by_hand(guess: str, secret: str, expected: str) -> None:
    assert marks(guess, secret) == expected


def test_a_word_that_is_no_word_of_five_letters_costs_a_try() -> None:
    world = Word(Task("w", "word", (Message("user", "Find it."),), "crane"), 0)
    assert world.step("cranes").messages[0].content == "Five letters. 5 tries left."
    assert world.step("Trace").messages[0].content == "t- r+ a+ c? e+ 4 tries left."
    won = world.step(" crane ")
    assert won.passed and won.reward == pytest.approx(0.8) and won.parts["valid"] == pytest.approx(2 / 3)


# --- adventure -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_every_map_is_joined_both_ways_and_solved_by_its_solution(seed: int) -> None:
    plan = drawn_map(random.Random(seed))
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    for room, exits in plan["exits"].items():
        assert exits and all(plan["exits"][there][back[way]] == room for way, there in exits.items())
    place = Place(plan["start"])
    for command in solution(plan):
        assert not place.opened
        place = after(plan, place, command)
    assert place.opened and json.loads(json.dumps(plan)) == plan


def test_the_adventure_says_what_is_there_and_pays_the_key_once() -> None:
    exits = {"hall": {"north": "attic"}, "attic": {"south": "hall", "east": "cellar"}, "cellar": {"west": "attic"}}
    plan = {"exits": exits, "start": "hall", "key": "attic", "chest": "cellar"}
    assert solution(plan) == ["go north", "take key", "go east", "open chest"]
    assert described(plan, Place("attic")) == "You are in the attic. You see a key. Exits: east, south."
    world = Adventure(Task("a", "adventure", (Message("user", "Play."),), [], plan), 0)
    said = [world.step(reply) for reply in ("open chest", "dance", "Go north.", "take key", "take key", "go east")]
    assert [turn.reward for turn in said] == [0, 0, 0, 0.2, 0, 0]
    assert said[0].messages[0].content == "That does not work. You are in the hall. Exits: north."
    assert said[1].messages[0].content.startswith("I do not know how to do that.")
    assert said[3].messages[0].content == "You take the key. You are in the attic. Exits: east, south."
    end = world.step("<think>now</think>open chest")
    assert end.passed and end.reward == pytest.approx(0.8)


# --- dialogue --------------------------------------------------------------------------------------------------------

BOOKING = Task(
    "d",
    "dialogue",
    (Message("system", "Ask."), Message("user", "I would like to book a table.")),
    None,
    {"wish": "book a table", "facts": {"day": "Friday", "people": "4"}, "patience": 2},
)


def test_each_fact_pays_when_it_is_first_told_and_the_right_order_pays_the_rest() -> None:
    world = Dialogue(BOOKING, 0)
    first = world.step("Which day suits you?")
    assert (first.messages[0].content, first.reward) == ("The day: Friday.", 0.25)
    assert world.step("And which day?").reward == 0.0
    assert world.step("For how many people?").reward == 0.25
    end = world.step("Very well.\nORDER friday | 4")
    assert end.passed and end.reward == 0.5 and end.parts == {"facts": 1.0, "ordered": 1.0}


def test_a_guessed_order_a_wrong_one_and_lost_patience_end_the_conversation_unpaid() -> None:
    lucky = Dialogue(BOOKING, 0).step("ORDER Friday | 4")
    assert lucky.done and not lucky.passed and lucky.reward == 0
    world = Dialogue(BOOKING, 0)
    world.step("When? How many people?")  # a user answers one question at a time
    assert not world.step("people?").over
    assert world.step("ORDER Friday | 5").reward == 0
    world = Dialogue(BOOKING, 0)
    assert not world.step("Hello!").over
    assert world.step("Nice weather.").done


def test_the_last_order_counts() -> None:
    assert ordered("I think\nORDER a | b\nno:\n  ORDER  c|d ") == ["c", "d"]
    assert ordered("my ORDER is") is None


class Customer(BaseHTTPRequestHandler):
    """A model that plays the user as it was told to, and counts how often it was asked."""

    asked: list[list[dict[str, str]]] = []

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        self.asked.append(messages)
        facts = dict(re.findall(r"(\w+): ([\w ]+)", messages[0]["content"].partition("alone: ")[2].partition(".")[0]))
        wanted = next((name for name in facts if name in messages[-1]["content"]), None)
        said = f"The {wanted}: {facts[wanted]}." if wanted else "I beg your pardon?"
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def customer() -> Iterator[str]:
    Customer.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Customer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def user_file(folder: Path, **values: object) -> Path:
    path = folder / "user.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return path


def test_a_model_behind_an_endpoint_can_be_the_user_and_is_scored_by_the_same_program(
    customer: str, tmp_path: Path
) -> None:
    file = user_file(tmp_path, endpoint=customer, model="customer", cache=str(tmp_path / "replies.db"))
    env = load_env(f"dialogue:{file}", ENVS)
    tasks = own_tasks(env)
    assert tasks is not None and tasks(5, 0) == Dialogue.tasks(5, 0)
    for task in tasks(5, 0):
        game = played(env, task, ask)
        assert game.passed and game.reward == pytest.approx(1.0)
        assert not played(env, task, lambda said: "Hello!").passed
    roles = [[m["role"] for m in messages] for messages in Customer.asked]
    assert all(r[0] == "system" and r[1:] == ["assistant", "user"] * (len(r) // 2) for r in roles)
    before = len(Customer.asked)
    assert played(env, tasks(5, 0)[0], ask).passed
    assert len(Customer.asked) == before  # an equal conversation is answered from the cache


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"endpoint": "http://a/v1", "modell": "m"}, "unknown setting 'modell'. Did you mean 'model'"),
        ({"endpoint": "http://a/v1"}, "`model` must name"),
        ({"endpoint": "no address", "model": "m"}, "not a plain URL"),
        ({"endpoint": "http://a/v1", "model": "m", "retries": "many"}, "retries"),
    ],
)
def test_a_users_file_that_cannot_be_used_is_named(values: dict[str, object], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)) as error:
        load_user(str(user_file(tmp_path, **values)))
    assert "user.toml" in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_user(str(tmp_path / "none.toml"))


# --- in the documentation --------------------------------------------------------------------------------------------


def test_the_environment_of_the_page_is_trained_from_its_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guides" / "environments.md").read_text(encoding="utf-8")
    (tmp_path / "again.py").write_text(page.partition("```python runnable\n")[2].partition("```")[0])
    model = tiny.stopping(tiny.chatty(tmp_path / "model"))
    settings = {
        "model.path": str(model),
        "env.name": f"{tmp_path / 'again.py'}:Again",
        "run.out": str(tmp_path / "run"),
    }
    settings |= {"data.count": 30, "eval.problems": 3, "algo.prompts": 2, "algo.group_size": 2, "train.steps": 2}
    settings |= {"rollout.max_tokens": 8, "rollout.slots": 32, "train.threads": 1}
    result = api.start("grpo", config.resolve("grpo", {}, settings))
    assert result.summary is not None
    with Run.read(result.folder) as run:
        assert dict((name, value) for _, name, value in run.metrics())["turns"] >= 1


def test_every_environment_is_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "guides" / "environments.md").read_text(encoding="utf-8")
    for name in ENVS:
        assert f"`{name}`" in page or f"`{name}" in page, name


# --- with a model ----------------------------------------------------------------------------------------------------


def test_an_evaluation_plays_the_world(tmp_path: Path) -> None:
    model = tiny.stopping(tiny.chatty(tmp_path))
    settings = {"env.name": "countdown", "rollout.max_tokens": 8, "rollout.slots": 32, "eval.problems": 4}
    recipe = config.resolve("grpo", {}, {**settings, "data.count": 40, "eval.samples": 2, "train.threads": 1})
    report, groups = api.evaluate_recipe(str(model), recipe)
    episodes = [episode for group in groups for episode in group]
    assert report.tasks == 4 and len(episodes) == 8
    assert all(e.task_id.startswith("countdown:") and e.turn_rewards for e in episodes)
    assert any(e.turns > 1 for e in episodes) and "readable" in episodes[0].parts
