"""Tools: signatures as schemas, calls as a model writes them, exact arithmetic, search, the environment, BFCL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import config
from posttrain.config import DataConfig, EnvConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.tasks import bfcl
from posttrain.data.tasks.calculator import calculator, evaluate, show
from posttrain.data.tasks.load import load_tasks
from posttrain.data.tasks.products import CALLS, LARGE, calculator_calls, large_products
from posttrain.data.tool_calls import Call, call_arguments, describe, parse_calls, with_system_text
from posttrain.data.tool_schema import ToolError, arguments, fit, fits, schema_of, tool_from
from posttrain.envs import ENVS
from posttrain.envs.bm25 import Index, Passage, cut, read_passages
from posttrain.envs.env import EnvFactory, load_env
from posttrain.envs.toolbox import MOST_CHARACTERS, load_tools, run_call, tools_hash
from posttrain.envs.tools import MOST_CALLS
from posttrain.models.load import Policy, with_chat_format
from posttrain.rewards.auto import validate, verifier_for
from posttrain.rewards.verifiers import numeric
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import Collector
from posttrain.rollout.generator import Request
from posttrain.rollout.tasks import env_tasks
from posttrain.types import Completion, ConfigError, DataError, Message, RolloutError, Task
from tests import tiny
from tests.conftest import shared

TASK = Task("t", "test", (Message("user", "What is 12*7?"),), "84")

# --- from a signature to a schema -------------------------------------------------------------------------------------


def book(
    city: str,
    nights: int,
    price: float = 80.0,
    room: Literal["single", "double"] = "single",
    guests: list[str] | None = None,
    extras: dict[str, bool] = {},  # noqa: B006
    quiet: Optional[bool] = None,  # noqa: UP045
) -> str:
    """Books a room
    in a hotel.

    Never twice.

    Args:
        city: where the hotel is
        nights: how long
    """
    return f"{room} in {city} for {nights}"


def test_a_signature_and_its_docstring_become_a_json_schema() -> None:
    assert tool_from(book).schema == {
        "name": "book",
        "description": "Books a room in a hotel.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where the hotel is"},
                "nights": {"type": "integer", "description": "how long"},
                "price": {"type": "number", "default": 80.0},
                "room": {"enum": ["single", "double"], "default": "single"},
                "guests": {
                    "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                    "default": None,
                },
                "extras": {"type": "object", "additionalProperties": {"type": "boolean"}, "default": {}},
                "quiet": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
            },
            "required": ["city", "nights"],
        },
    }


def untyped(x):  # noqa: ANN001
    """Does."""


def undocumented(x: int) -> None:
    pass


def complex_number(x: complex) -> None:
    """Does."""


def many(*numbers: int) -> None:
    """Does."""


def keys(x: dict[int, str]) -> None:
    """Does."""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (untyped, "parameter 'x' of tool untyped has no type"),
        (undocumented, "tool undocumented has no docstring"),
        (complex_number, "parameter 'x' of tool complex_number has type complex, expected str"),
        (many, "parameter 'numbers' of tool many is variadic positional"),
        (keys, "parameter 'x' of tool keys has type dict"),
        (lambda: 1, "a tool cannot be named '<lambda>'"),
    ],
)
def test_a_function_that_cannot_be_described_is_refused_by_name(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tool_from(function)


KINDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (str, st.text()),
    (int, st.integers()),
    (float, st.floats(-1e300, 1e300)),
    (bool, st.booleans()),
    (Literal["a", 2, None], st.sampled_from(["a", 2, None])),
]


@st.composite
def typed_values(draw: st.DrawFn, depth: int = 2) -> tuple[Any, Any]:
    """A type that a tool's parameter may have, and a value of it."""
    shape = draw(st.sampled_from(["plain", "list", "dict", "union"] if depth else ["plain"]))
    if shape == "plain":
        kind, values = draw(st.sampled_from(KINDS))
        return kind, draw(values)
    kind, value = draw(typed_values(depth - 1))
    if shape == "list":
        return list[kind], draw(st.sampled_from([[], [value], [value, value]]))
    if shape == "dict":
        return dict[str, kind], draw(st.dictionaries(st.text(max_size=3), st.just(value), max_size=2))
    return kind | None, draw(st.sampled_from([value, None]))


@given(typed_values())
def test_a_value_of_a_type_goes_through_json_and_its_schema_unchanged(pair: tuple[Any, Any]) -> None:
    kind, value = pair
    assert fit(schema_of(kind, "it"), json.loads(json.dumps(value)), "it") == value


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (int, True), (int, 1.5), (int, "1"), (float, "x"), (float, True), (float, 10**400), (str, 1), (bool, 1),
        (list[int], [1, "2"]), (dict[str, int], {"a": None}), (Literal["a"], "b"), (Literal[1], True),
        (int | None, "x"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_does_not_fit(kind: Any, wrong: Any) -> None:
    assert not fits(schema_of(kind, "it"), wrong)


def test_numbers_are_given_to_the_function_in_its_own_type() -> None:
    assert fit({"type": "integer"}, 3.0, "n") == 3 and isinstance(fit({"type": "integer"}, 3.0, "n"), int)
    assert isinstance(fit({"type": "number"}, 3, "n"), float)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"city": "Bern"}, "book needs the argument 'nights', a whole number."),
        ({"city": "Bern", "nights": 2, "pool": 1}, "book has no argument 'pool'; its arguments are: city, nights,"),
        ({"city": "Bern", "nights": "two"}, "argument 'nights' of book is \"two\", expected a whole number."),
        ({"city": "Bern", "nights": 2, "room": "suite"}, 'is "suite", expected one of "single", "double".'),
        ({"city": "Bern", "nights": 2, "guests": ["A", 1]}, "argument 'guests' of book is"),
        ({"city": "Bern", "nights": 2, "extras": {"sea": 3}}, "'sea' in argument 'extras' of book is 3, expected true"),
        (["Bern", 2], 'the arguments of book are ["Bern", 2], expected an object'),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(given_: Any, said: str) -> None:
    with pytest.raises(ToolError) as caught:
        arguments(tool_from(book), given_)
    assert said in str(caught.value)


# --- calls in a reply -------------------------------------------------------------------------------------------------


def test_calls_are_read_in_both_forms_in_their_order() -> None:
    text = (
        'First <calc>1+1</calc> then\n<tool_call>\n{"name": "book", "arguments": {"city": "<calc>"}}\n</tool_call>'
        "<calc>2</calc><other>3</other>"
    )
    assert parse_calls(text, ["calc"]) == [
        Call("calc", text="1+1"),
        Call("book", {"city": "<calc>"}),
        Call("calc", text="2"),
    ]
    assert [c.name for c in parse_calls(text)] == ["book"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>{'name': 1}</tool_call>", "the call is not valid JSON: Expecting property name"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "a number that is not finite"),
        (f'<tool_call>{{"name": "f", "arguments": {"9" * 5000}}}</tool_call>', "far too long"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "nested too deeply"),
        ("<tool_call>[]</tool_call>", "this one has no name"),
        ('<tool_call>{"name": "f"}</tool_call>', 'the call of f has no "arguments"'),
        ('<tool_call>{"name": "f", "arguments": {}}', "the call is not closed; </tool_call> is missing."),
        ("<calc>1+1", "the call is not closed; </calc> is missing."),
    ],
)
def test_a_call_that_cannot_be_read_says_why(text: str, said: str) -> None:
    (call,) = parse_calls(text, ["calc"])
    assert said in call.error


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<calculator>", "</calculator>", "<book>", "</book>", '{"name": "book"', "}", ",",
    '"arguments": {', '"city": "x"', '"nights": ', "NaN", "[", "]", "1", "**", "(", ")", "\ud800",
]  # fmt: skip
TOOLS = {tool.name: tool for tool in (tool_from(calculator), tool_from(book))}


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)))
def test_any_text_is_parsed_and_every_call_in_it_has_a_result_that_can_be_encoded(text: str) -> None:
    for call in parse_calls(text, list(TOOLS)):
        result = run_call(call, TOOLS)
        assert len(result.text.encode()) <= 4 * MOST_CHARACTERS + 100
        assert result.ok or result.text.startswith("Error: ")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)  # fmt: skip


@given(st.text(min_size=1), st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_a_call_written_as_json_is_read_back(name: str, given_: dict[str, Any]) -> None:
    written = json.dumps({"name": name, "arguments": given_})
    assert parse_calls(f"Yes. <tool_call>{written}</tool_call>") == [Call(name, given_)]


def test_an_inline_call_gives_its_one_argument_or_an_object_of_all() -> None:
    def root(number: int, places: int = 2) -> float:
        """Takes a root."""
        return round(math.sqrt(number), places)

    def now() -> str:
        """Tells the time."""
        return "noon"

    root_, now_, book_ = tool_from(root), tool_from(now), tool_from(book)
    assert call_arguments(Call("root", text=" 16 "), root_) == {"number": 16}
    assert call_arguments(Call("now", text=""), now_) == {}
    both = '{"city": "Bern", "nights": 2}'
    assert call_arguments(Call("book", text=both), book_) == {"city": "Bern", "nights": 2}
    with pytest.raises(ToolError, match="argument 'number' of root is not valid JSON"):
        call_arguments(Call("root", text="sixteen"), root_)
    told = describe([root_.schema, book_.schema], "inline")
    assert "<root>number</root> Takes a root." in told and '<book>{"city": …, "nights": …, ' in told


def test_a_model_is_told_of_its_tools_in_the_system_message() -> None:
    told = describe([tool_from(book).schema])
    line = next(line for line in told.splitlines() if line.startswith("{"))
    assert json.loads(line) == {"type": "function", "function": tool_from(book).schema}
    assert with_system_text(TASK.messages, "x") == (Message("system", "x"), *TASK.messages)
    own = (Message("system", "Be brief."), *TASK.messages)
    assert with_system_text(own, "x")[0].content == "Be brief.\n\nx"


def test_whatever_goes_wrong_in_a_call_is_a_result_the_model_reads(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from posttrain.types import RolloutError\n"
        "def crash(x: int) -> int:\n    'Crashes.'\n    return 1 // x\n"
        "def long(x: int) -> str:\n    'Writes much.'\n    return 'a' * x\n"
        "def rows(x: int) -> list[int]:\n    'Lists.'\n    return [x, x]\n"
        "def down(x: int) -> int:\n    'Fails.'\n    raise RolloutError('the server is gone')\n"
    )
    tools = load_tools(", ".join(f"{file}:{name}" for name in ("crash", "long", "rows", "down")))
    assert run_call(Call("crash", {"x": 0}), tools).text.startswith("Error: ZeroDivisionError: integer division")
    assert (
        run_call(Call("crsh", {}), tools).text == "Error: there is no tool 'crsh'; there is: crash, long, rows, down."
    )
    assert run_call(Call("crash", {}), tools).text == "Error: crash needs the argument 'x', a whole number."
    assert run_call(Call("long", {"x": 5000}), tools).text.endswith("aaa… (5000 characters in all)")
    assert run_call(Call("rows", {"x": 2}), tools).text == "[2, 2]"
    with pytest.raises(RolloutError, match="the server is gone"):  # then no call could have succeeded
        run_call(Call("down", {"x": 1}), tools)


def test_tools_are_named_and_a_changed_file_changes_their_hash(tmp_path: Path) -> None:
    assert list(load_tools("calculator")) == ["calculator"]
    with pytest.raises(ConfigError, match=r"unknown tool 'calculater'. Did you mean 'calculator'\?"):
        load_tools("calculater")
    with pytest.raises(ConfigError, match="lists no tool"):
        load_tools(" ,")
    with pytest.raises(ConfigError, match="has two tools named calculator"):
        load_tools("calculator,calculator")
    file = tmp_path / "mine.py"
    file.write_text("def f(x: int) -> int:\n    'Adds one.'\n    return x + 1\n")
    before = tools_hash(f"calculator,{file}:f")
    assert before == tools_hash(f"calculator,{file}:f")
    file.write_text("def f(x: int) -> int:\n    'Adds one.'\n    return x + 2\n")
    assert tools_hash(f"calculator,{file}:f") != before


def test_python_runs_in_the_sandbox_and_what_it_prints_or_raises_is_the_result() -> None:
    try:
        tools = load_tools("python")
    except ConfigError as refused:
        pytest.skip(str(refused))
    assert run_call(Call("python", {"code": "print(6*7)"}), tools).text == "42\n"
    failed = run_call(Call("python", {"code": "print(1)\n1/0"}), tools)
    assert not failed.ok and "ZeroDivisionError" in failed.text and failed.text.endswith("Printed before: 1\n")
    assert run_call(Call("python", text="x = 1"), tools).text == "Nothing was printed."


# --- the calculator ---------------------------------------------------------------------------------------------------

Tree = tuple[str, Any, Any] | str


def trees() -> st.SearchStrategy[Tree]:
    leaf = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, allow_nan=False, allow_infinity=False, places=3).map(
        str
    )
    return st.recursive(leaf, lambda inner: st.tuples(st.sampled_from("+-*/%"), inner, inner), max_leaves=8)


def written(tree: Tree) -> str:
    return tree if isinstance(tree, str) else f"({written(tree[1])} {tree[0]} {written(tree[2])})"


def worth(tree: Tree) -> Fraction | None:
    if isinstance(tree, str):
        return Fraction(tree)
    a, b = worth(tree[1]), worth(tree[2])
    if a is None or b is None or (tree[0] in "/%" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b}[tree[0]] if tree[0] in "+-*" else a / b if tree[0] == "/" else a % b


@given(trees())
def test_the_calculator_agrees_with_exact_fractions_on_any_expression(tree: Tree) -> None:
    text, value = written(tree), worth(tree)
    if len(text) > 200:
        with pytest.raises(ToolError, match="characters"):
            evaluate(text)
    elif value is None:
        with pytest.raises(ToolError, match="division by zero"):
            evaluate(text)
    else:
        assert evaluate(text) == value and Fraction(calculator(text)) == value


@given(st.fractions())
def test_a_value_is_shown_in_full(value: Fraction) -> None:
    assert Fraction(show(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*7", "84"), ("2+3*4", "14"), ("-2**2", "-4"), ("2^10", "1024"), ("6×7÷4", "10.5"), ("0.1+0.2", "0.3"),
        ("1/3", "1/3"), ("-1/3", "-1/3"), ("7//2", "3"), ("-7%3", "2"), ("2**-2", "0.25"), ("1e3", "1000"),
        ("(-1)**999999999", "-1"), ("0**0", "1"), (" ( 1 + 2 ) * 3 ", "9"), ("5.", "5"),
        ("0.30000000000000000000001*1", "0.30000000000000000000001"),
    ],
)  # fmt: skip
def test_worked_examples(text: str, value: str) -> None:
    assert calculator(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "2+", "abs(1)", "2(3)", "1,000", "1_000", "0x1f", "9**9**9", "2**4097", "0.5**5000", "(1/3)**-9999",
     "1e999*1e999", "2**0.5", "0**-1", "1/0", "1%0", "5//0", "[1]", "1<2", "2 3", "()", "'a'", "__import__('os')",
     "1if 1else 2", "e", "(" * 150, "-" * 199 + "1e", "1" * 201, "x", "\ud800", "1\x00", "٣+١",
     "9" * 150 + "**" + "9" * 40],
)  # fmt: skip
def test_what_is_not_bounded_arithmetic_is_refused_at_once(text: str) -> None:
    with pytest.raises(ToolError):
        evaluate(text)


# --- search -----------------------------------------------------------------------------------------------------------


def test_bm25_gives_the_numbers_worked_out_by_hand() -> None:
    index = Index([Passage("a", "the cat sat"), Passage("b", "the dog"), Passage("c", "the cat and the cat and a cat")])
    # 3 passages of 3, 2 and 8 words, mean 13/3; `cat` is in 2 of them: ln(1 + 1.5/2.5).
    rarity = math.log(1.6)
    first = rarity * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / (13 / 3)))
    third = rarity * 3 * 2.2 / (3 + 1.2 * (0.25 + 0.75 * 8 / (13 / 3)))
    assert index.scores("Cat cat") == pytest.approx({0: first, 2: third})
    assert [p.source for p in index.search("cat", 5)] == ["c", "a"]
    assert [p.source for p in index.search("the dog", 1)] == ["b"]
    assert index.search("bird", 3) == []


def test_documents_are_cut_into_passages_and_found(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "bread.md").write_text("Bake bread at 230 degrees.\n" + "filler words here\n" * 60)
    (tmp_path / "tea.txt").write_text("Tea wants water just below boiling.")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert {p.source for p in read_passages(tmp_path)} == {"notes/bread.md", "tea.txt"}
    tools = load_tools(f"search:{tmp_path}")
    found = run_call(Call("search", {"query": "how hot for bread?", "count": 1}), tools)
    assert found.ok and found.text.startswith("[notes/bread.md]\nBake bread at 230 degrees.")
    assert run_call(Call("search", {"query": "zeppelin"}), tools).text == "Nothing found."
    file = tmp_path / "documents.jsonl"
    file.write_text('{"title": "Moon", "text": "The moon is far."}\n{"text": "The sun is farther."}\n')
    assert [p.source for p in read_passages(file)] == ["Moon", "documents.jsonl:2"]
    with pytest.raises(ConfigError, match="no file or folder .*/nowhere to search"):
        load_tools(f"search:{tmp_path}/nowhere")
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1: there is no column `text`"):
        read_passages(tmp_path / "bad.jsonl")


@given(st.text(st.sampled_from("ab \n"), max_size=2000))
def test_cutting_keeps_every_word_in_order(text: str) -> None:
    passages = list(cut(text))
    assert " ".join(passages).split() == text.split()
    assert all(len(p.split()) < 240 for p in passages)


# --- the environment --------------------------------------------------------------------------------------------------


def world(**settings_: Any) -> Any:
    return load_env("tools", ENVS, numeric, EnvConfig(name="tools", **settings_))(TASK, 0)


def test_a_call_is_answered_and_a_reply_without_one_is_judged() -> None:
    tools = world(call_syntax="inline")
    assert [m.role for m in tools.opening] == ["system", "user"]
    assert "<calculator>expression</calculator>" in tools.opening[0].content
    turn = tools.step("<think>Hm, <calculator>1</calculator>?</think><calculator>12*7</calculator>")
    assert turn.messages == (Message("tool", "84"),) and not turn.over and turn.reward == 0.0
    turn = tools.step("It is 84.")
    assert turn.over and turn.passed and turn.reward == 1.0
    assert turn.parts == {"calls": 1.0, "failed_calls": 0.0, "answer": 1.0}


def test_only_the_first_call_that_succeeds_is_paid() -> None:
    tools = world(call_reward=0.25)
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
    turns = [tools.step(call % text) for text in ("1/0", "12*7", "1+1")] + [tools.step("85")]
    assert [turn.reward for turn in turns] == [0.0, 0.25, 0.0, 0.0]
    assert turns[0].messages == (Message("tool", "Error: division by zero."),)
    assert not turns[-1].passed and turns[-1].parts == {"calls": 3.0, "failed_calls": 1.0, "answer": 0.0}


def test_one_reply_makes_so_many_calls_and_no_more() -> None:
    turn = world().step("<calculator>1</calculator>" * 50)
    assert len(turn.messages) == MOST_CALLS + 1 and "only the first" in turn.messages[-1].content


def test_an_answer_that_cannot_be_judged_leaves_the_attempt_unscored() -> None:
    def broken(task: Task, text: str) -> Any:
        raise KeyError("gone")

    tools = load_env("tools", ENVS, broken, EnvConfig())(TASK, 0)
    with pytest.raises(RolloutError, match="raised KeyError for task 't'"):
        tools.step("84")


def test_a_users_own_environment_may_have_the_tools_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n    def __init__(self, task, seed, tools): self.tools = tools\n    def step(self, reply): pass\n"
    )
    assert list(load_env(f"{file}:Mine", ENVS, None, EnvConfig())(TASK, 0).tools) == ["calculator"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="unknown tool 'abacus'"):
        load_env(f"{file}:Mine", ENVS, None, EnvConfig(tools="abacus"))


class Says:
    """A generator that replies with given texts, one after the other."""

    def __init__(self, chat: ChatFormat, *texts: str) -> None:
        self.replies = [np.array([*chat._encode_text(text, set()), chat.stop_ids[0]], np.int32) for text in texts]
        self.read: list[np.ndarray] = []

    def load(self, weights: Any, version: int) -> None: ...

    def generate(self, requests: Sequence[Request], params: Any, on_done: Any) -> list[list[Completion]]:
        ((request,), tokens) = requests, self.replies.pop(0)
        self.read.append(request.prompt)
        zeros = np.zeros(len(tokens), np.float32)
        completion = Completion(tokens, zeros, zeros, "stop")
        on_done(0, 0, completion)
        return [[completion]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    with tiny.threads(1):
        yield tiny.load(tiny.stopping(tiny.chatty(tmp_path_factory.mktemp("chatty"))))


TURN = "{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
KNOWING = "{% for m in messages %}" + TURN
REFUSING = "{% for m in messages %}{{ raise_exception('no') if m['role'] == 'tool' }}" + TURN
DROPPING = "{% for m in messages if m['role'] != 'tool' %}" + TURN


@pytest.mark.parametrize(("template", "knows"), [(KNOWING, True), (REFUSING, False), (DROPPING, False)])
def test_results_are_the_tools_where_the_template_knows_it_and_else_the_users(
    policy: Policy, template: str, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    chat = with_chat_format(policy, "chat")
    assert chat.knows("tool") is knows and chat.knows("user")
    recipe = config.resolve("grpo", {}, {"env.name": "tools", "rollout.max_tokens": 24, "env.call_syntax": "inline"})
    env: EnvFactory = load_env("tools", ENVS, numeric, recipe.env)
    says = Says(chat, "<calculator>12*7</calculator><calculator>1/4</calculator>", "84")
    collector: Collector = replace(make_collector(policy, chat, numeric, recipe, env), generator=says)
    ((episode,),) = collector.groups([TASK], 1, 0)
    assert episode.error is None and episode.passed and episode.turns == 2
    heard = policy.tokenizer.decode(episode.spans[2].tokens)
    eos = policy.tokenizer.eos_token
    expected = f"<tool>84{eos}<tool>0.25{eos}<assistant>" if knows else f"<user>84\n0.25{eos}<assistant>"
    assert heard.endswith(expected)
    assert "[tool] 84" in episode.text


def test_a_recipe_gives_the_tools_environment_its_tasks_verifier_and_tools(policy: Policy) -> None:
    given_ = {"env.name": "tools", "data.tasks": "addition", "eval.problems": 4}
    recipe = config.resolve("grpo", {}, given_)
    sets, verify, env = env_tasks(recipe, with_chat_format(policy, "chat"))
    assert env is not None and len(sets.test) == 4
    turn = env(sets.test[0], 0).step(sets.test[0].answer)
    assert turn.passed and verify(sets.test[0], sets.test[0].answer).passed
    other = config.resolve("grpo", {}, {**given_, "env.tools": f"search:{Path(__file__).parents[1] / 'docs'}"})
    assert env_tasks(other, with_chat_format(policy, "chat"))[0].hash != sets.hash


SEES_WHAT = "import os\nprint(os.path.exists('/etc/passwd'), os.access('/etc/passwd', os.R_OK))"


@pytest.mark.parametrize(
    ("choice", "sees"),
    [("namespaces", "False False\n"), ("landlock", "True True\n"), ("none", "True True\n")],
)
def test_the_python_tool_has_the_isolation_that_the_reward_code_has(policy: Policy, choice: str, sees: str) -> None:
    """A program sees no file of the host in a namespace; Landlock hides only what is in it."""
    given_ = {"env.name": "tools", "env.tools": "python", "data.tasks": "addition", "eval.problems": 4}
    given_ |= {"reward.sandbox": choice, "reward.accept_arbitrary_code": choice == "none"}
    try:
        _, _, env = env_tasks(config.resolve("grpo", {}, given_), with_chat_format(policy, "chat"))
    except ConfigError as refused:
        pytest.skip(str(refused))
    assert env is not None
    tools = env.keywords["tools"]  # type: ignore[attr-defined]
    assert run_call(Call("python", {"code": SEES_WHAT}), tools).text == sees
    read = run_call(Call("python", {"code": "print(open('/etc/passwd').read())"}), tools)
    assert read.ok is (choice == "none")


def test_the_python_tool_is_not_to_be_had_without_isolation_unless_that_is_accepted(policy: Policy) -> None:
    given_ = {"env.name": "tools", "env.tools": "python", "data.tasks": "addition", "reward.sandbox": "none"}
    with pytest.raises(ConfigError, match="also set reward.accept_arbitrary_code = true"):
        env_tasks(config.resolve("grpo", {}, given_), with_chat_format(policy, "chat"))


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({}, False),
        ({"env.name": "tools"}, False),
        ({"env.name": "tools", "env.tools": "calculator, python"}, True),
        ({"env.name": "number", "env.tools": "python"}, False),
        ({"env.name": "number", "reward.name": "code"}, False),
        ({"env.name": "tools", "reward.name": "exact & format"}, False),
    ],
)
def test_that_there_is_no_isolation_is_said_where_model_written_code_is_executed(
    policy: Policy, more: dict[str, Any], warned: bool
) -> None:
    given_ = {"data.tasks": "addition", "data.count": 20, "eval.problems": 2}
    given_ |= {"reward.sandbox": "none", "reward.accept_arbitrary_code": True}
    sets, _, _ = env_tasks(config.resolve("grpo", {}, {**given_, **more}), with_chat_format(policy, "chat"))
    assert any("WITHOUT ISOLATION" in note for note in sets.notes) is warned


def test_the_descriptions_of_tools_count_as_part_of_the_prompt(policy: Policy) -> None:
    chat = with_chat_format(policy, "chat")
    given_ = {"env.name": "tools", "data.tasks": "addition", "eval.problems": 4}
    sets, _, env = env_tasks(config.resolve("grpo", {}, given_), chat)
    assert env is not None
    read = [len(chat.prompt_tokens(env(task, 7).opening)) for task in (*sets.train, *sets.test)]  # type: ignore[attr-defined]
    asked = max(len(chat.prompt_tokens(task.messages)) for task in sets.train)
    assert asked < min(read), "what is asked alone is shorter than any prompt that is read"
    exactly = config.resolve("grpo", {}, {**given_, "data.max_prompt_tokens": max(read)})
    assert len(env_tasks(exactly, chat)[0].train) == len(sets.train)
    shorter = {**given_, "data.max_prompt_tokens": max(read) - 1}
    with pytest.raises(DataError, match=rf"prompts are longer than data.max_prompt_tokens={max(read) - 1} "):
        env_tasks(config.resolve("grpo", {}, shorter), chat)
    alone = config.resolve("grpo", {}, {"data.tasks": "addition", "data.max_prompt_tokens": asked})
    assert len(env_tasks(alone, chat)[0].train) == len(sets.train), "without tools there is nothing to count"


# --- products and their demonstrations --------------------------------------------------------------------------------


def test_demonstrated_calls_give_the_results_they_show_and_hold_out_the_same_products() -> None:
    tasks = calculator_calls(50, 0, "train")
    assert tasks == calculator_calls(50, 0, "train") != calculator_calls(50, 1, "train")
    for task in tasks:
        system, question, call, result = task.messages
        (made,) = parse_calls(call.content, ["calculator"])
        assert run_call(made, TOOLS).text == result.content == task.answer
        assert system.content == describe([tool_from(calculator).schema], "inline")
    held = {frozenset(t.meta["numbers"]) for t in large_products(2000, 3, "test")}
    assert not held & {frozenset(t.meta["numbers"]) for t in large_products(2000, 3, "train")}
    assert {t.env for t in tasks} == {CALLS} and {t.env for t in large_products(1, 0, "test")} == {LARGE}


# --- BFCL -------------------------------------------------------------------------------------------------------------

FILES = {"simple_python": 400, "multiple": 200, "parallel": 200, "irrelevance": 240}


@pytest.mark.parametrize(("name", "rows"), FILES.items())
def test_every_row_of_bfcl_is_a_task_whose_gold_calls_pass_and_whose_null_answer_fails(name: str, rows: int) -> None:
    path = shared("data", "bfcl", f"BFCL_v4_{name}.json")
    sets = load_tasks(DataConfig(tasks=str(path), count=0, holdout=0.1), seed=0)
    tasks = sets.train + sets.test
    assert len(tasks) == rows and {task.env for task in tasks} == {bfcl.ENV}
    validate(tasks, lambda task, text: verifier_for(task)(task, text))
    spoilt = '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'
    assert not any(bfcl.verify(task, task.answer + spoilt).passed for task in tasks)
    if name != "irrelevance":
        assert not any(bfcl.verify(task, bfcl.NO_CALL).passed for task in tasks)


def test_bfcl_files_of_several_turns_are_refused() -> None:
    path = shared("data", "bfcl", "BFCL_v4_multi_turn_base.json")
    with pytest.raises(DataError, match="has several turns, which need BFCL's simulated services"):
        load_tasks(DataConfig(tasks=str(path)), seed=0)


def calls(*made: tuple[str, dict[str, Any]]) -> str:
    return "".join(f"<tool_call>{json.dumps({'name': n, 'arguments': a})}</tool_call>" for n, a in made)


SWIFT, MAROON = {"artist": "Taylor Swift", "minutes": 20}, {"artist": "Maroon 5", "minutes": 15}


@pytest.mark.parametrize(
    ("made", "passes"),
    [
        ([SWIFT, MAROON], True),
        ([MAROON | {"artist": "maroon-5"}, SWIFT], True),
        ([SWIFT | {"minutes": 20.0}, MAROON | {"loud": False}], True),
        ([SWIFT], False),
        ([SWIFT | {"minutes": 15}, MAROON | {"minutes": 20}], False),
        ([SWIFT, MAROON | {"loud": True}], False),
        ([SWIFT, MAROON | {"minutes": True}], False),
        ([SWIFT, {"minutes": 15}], False),
        ([SWIFT, MAROON | {"x": 1}], False),
        ([SWIFT, SWIFT], False),
        ([SWIFT, MAROON, MAROON], False),
        ([], False),
    ],
)
def test_calls_are_compared_by_what_they_say_in_any_order(made: list[dict[str, Any]], passes: bool) -> None:
    accepted = [
        {"play": {"artist": ["Taylor Swift"], "minutes": [20], "loud": ["", False]}},
        {"play": {"artist": ["Maroon 5", "Maroon Five"], "minutes": [15], "loud": ["", False]}},
    ]
    task = Task("p", bfcl.ENV, (Message("user", "Play."),), "", {"accepted": accepted})
    assert bfcl.verify(task, calls(*[("play", arguments_) for arguments_ in made])).passed is passes


def test_overlapping_alternatives_are_matched_as_well_as_they_can_be() -> None:
    accepted = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    task = Task("p", bfcl.ENV, (Message("user", "Go."),), "", {"accepted": accepted})
    assert bfcl.verify(task, calls(("f", {"x": 1}), ("f", {"x": 2}))).passed
    assert bfcl.verify(task, calls(("f", {"x": 2}), ("f", {"x": 2}))).parts["matched"] == 0.5


def test_objects_and_lists_hold_their_own_alternatives() -> None:
    accepted = [{"f": {"area": [{"width": [20], "unit": ["m", ""]}], "days": [["mon", "tue"]]}}]
    task = Task("p", bfcl.ENV, (Message("user", "Go."),), "", {"accepted": accepted})
    for area, days, passes in [
        ({"width": 20}, ["Mon", "Tue"], True),
        ({"width": 20, "unit": "M"}, ["mon", "tue"], True),
        ({"unit": "m"}, ["mon", "tue"], False),
        ({"width": 20, "depth": 1}, ["mon", "tue"], False),
        ({"width": 20}, ["tue", "mon"], False),
    ]:
        assert bfcl.verify(task, calls(("f", {"area": area, "days": days}))).passed is passes
