"""Talking to checkpoints in the lab: which models there are, answers as they are written, and the page itself."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page
from safetensors.torch import load_file, save_file
from websockets.sync.client import connect

from posttrain.cli import chat as talk
from posttrain.data.answers import final_part
from posttrain.lab import checkpoints
from posttrain.lab.chat import Asked, Draft, Unfolder, unfold, write_reply
from posttrain.lab.checkpoints import Opened, find_model, list_models, models, open_model
from posttrain.lab.folders import Place
from posttrain.models.heads import HEAD_FILE
from posttrain.store.run import Run
from posttrain.types import ConfigError, DataError, Message, ResumeError, SamplingParams
from tests import tiny
from tests.lab_server import HOSTILE, accessibility, header, opened, too_wide
from tests.lab_server import Opened as Lab

SUM = "What is 36*9?"
GO = "Go on."
TOP = "element => element.getBoundingClientRect().top"
PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "think", "</", ">", "a ", "\n"]), max_size=12)


def finished(folder: Path, model: Path, **sections: Any) -> Path:
    """A finished run with settings of these sections, whose exported model is a copy of `model`."""
    with Run.create(folder, {**header(), "recipe": sections}) as run:
        run.finish({})
    shutil.copytree(model, folder / "model")
    return folder


def never_stop(folder: Path) -> None:
    """Makes the logit of the stop token 0, below the largest one, so that greedy sampling does not stop."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][tiny.STOP] = 0  # tied with the output layer
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder with finished runs: the shipped model's weights, a tiny one, one that only scores, an endless one."""
    root = tmp_path_factory.mktemp("chat")
    runs = root / "runs"
    finished(runs / "twin", checkpoints.FOLDER)
    finished(runs / "small", tiny.chatty(root / "tiny"))
    finished(runs / "judge", root / "tiny")
    (runs / "judge" / "model" / HEAD_FILE).write_bytes(b"")
    config = finished(runs / "endless", checkpoints.FOLDER) / "model" / "config.json"  # writes slower than tiny
    never_stop(config.parent)
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 10**6}))
    return Place(runs)


@pytest.fixture(scope="module")
def lab(place: Place) -> Iterator[Lab]:
    with opened(place.root) as lab:
        yield lab


def ask(text: str, **more: Any) -> str:
    """A request as a page sends it."""
    asked = {"model": "abacus", "messages": [{"role": "user", "content": text}], "max_tokens": 64, "seed": 0}
    return json.dumps({**asked, **more})


def said(model: Opened, text: str, seed: int = 0, **params: Any) -> str:
    """What the library answers."""
    pieces: list[str] = []
    params = {"temperature": 1.0, "max_tokens": 64, **params}
    messages = [Message("user", text)]
    model.reply(messages, SamplingParams(**params), seed, lambda piece, n: pieces.append(piece), lambda: False)
    return "".join(pieces)


def long_seed(model: Opened) -> int:
    """A seed at which the tiny model, sampled hot, goes on and on."""
    return next(seed for seed in range(99) if len(said(model, GO, seed, temperature=2.0, max_tokens=200)) > 150)


# --- thoughts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>30*9=270</think>324", "30*9=270", "324"),
        ("324", "", "324"),
        ("<think>30*9=27", "30*9=27", ""),
        ("a<think>b</think>c<think>d</think>e", "bd", "ace"),
        ("x < y and <thin air", "", "x < y and <thin air"),
        ("</think>", "", "</think>"),
        ("", "", ""),
    ],
)
def test_a_thought_is_what_stands_between_its_marks(text: str, thought: str, answer: str) -> None:
    assert unfold(text) == (thought, answer)


@given(PARTS, st.lists(st.integers(0, 40), max_size=6))
def test_thoughts_are_told_apart_alike_however_the_text_is_cut(parts: list[str], cuts: list[int]) -> None:
    text, unfolder = "".join(parts), Unfolder()
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    found = [unfolder.add(text[a:b]) for a, b in zip(ends, ends[1:], strict=False)] + [unfolder.end()]
    assert ("".join(t for t, _ in found), "".join(a for _, a in found)) == unfold(text)


@given(st.text("ab <>/", max_size=20), st.text("ab <>/", max_size=20))
def test_after_a_thought_the_answer_is_what_a_checker_judges(thought: str, answer: str) -> None:
    text = f"<think>{thought}</think>{answer}"
    assert unfold(text)[1].strip() == final_part(text)


# --- models ---------------------------------------------------------------------------------------------------------


def test_the_models_are_the_shipped_one_and_what_finished_runs_exported_but_no_scorer(place: Place) -> None:
    assert checkpoints.SCORER == HEAD_FILE
    assert set(models(place)) == {"abacus", "twin", "small", "endless"}
    assert [row["name"] for row in list_models(place)] == ["abacus", "endless", "small", "twin"]


def test_a_run_that_is_called_abacus_does_not_hide_the_shipped_model(tmp_path: Path) -> None:
    finished(tmp_path / "abacus", tiny.chatty(tmp_path / "tiny"))
    found = models(Place(tmp_path))
    assert found == {"abacus": checkpoints.FOLDER, "abacus~": tmp_path / "abacus" / "model"}


def test_a_model_that_is_exported_only_in_part_is_none_yet(tmp_path: Path) -> None:
    finished(tmp_path / "run", tiny.chatty(tmp_path / "tiny"))
    (tmp_path / "run" / "model" / "tokenizer.json").unlink()
    assert set(models(Place(tmp_path))) == {"abacus"}


@pytest.mark.parametrize("name", ["../tiny", "small/model", "/etc", "", ".", "judge", "Small"])
def test_a_name_is_looked_up_and_never_a_path(place: Place, name: str) -> None:
    with pytest.raises(ResumeError, match="no model named"):
        find_model(place, name)


def test_models_are_opened_once_by_many_at_once_and_few_are_kept(place: Place, tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: open_model(place, "small"), range(6)))
        assert len({id(one) for one in found}) == 1
        for i in range(checkpoints.AT_ONCE + 1):
            finished(tmp_path / f"run{i}", place.root / "small" / "model")
        names = [name for name in models(Place(tmp_path)) if name != "abacus"]
        list(pool.map(lambda name: open_model(Place(tmp_path), name), names))  # several at a time
    assert len(checkpoints._entries) == checkpoints.AT_ONCE


# --- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_chat_in_the_terminal(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([SUM, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk.chat("abacus", 1.0, 64, "")
    printed = capsys.readouterr().out.partition("quits.\n")[2].strip()
    assert printed and said(open_model(place, "abacus"), SUM).strip() == printed


def test_two_answers_at_once_are_those_of_one_after_the_other(place: Place) -> None:
    model = open_model(place, "abacus")
    alone = [said(model, SUM, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: said(model, SUM, seed), range(4))) == alone


def test_an_answer_ends_soon_after_it_is_stopped_and_the_next_one_is_whole(place: Place) -> None:
    draft, model = Draft(), open_model(place, "small")
    seed = long_seed(model)
    whole = said(model, GO, seed, temperature=2.0, max_tokens=200)
    heard: list[int] = []

    def write(text: str, tokens: int) -> None:
        heard.append(tokens)
        draft.stop.set()

    params = SamplingParams(2.0, max_tokens=200)
    reply = model.reply([Message("user", GO)], params, seed, write, draft.stop.is_set)
    assert (reply.stop, reply.written) == ("stopped", sum(heard)) and reply.written < 5
    assert said(model, GO, seed, temperature=2.0, max_tokens=200) == whole


def test_a_conversation_that_is_longer_than_the_context_is_refused_and_a_shorter_one_cut_at_its_end(
    place: Place,
) -> None:
    model = open_model(place, "small")
    with pytest.raises(ConfigError, match=r"has 304 tokens, but the context of small is 256 tokens"):
        said(model, "x" * 300)
    reply = model.reply([Message("user", "x" * 240)], SamplingParams(), 0, lambda text, n: None, lambda: False)
    assert (reply.read + reply.written <= 256) and reply.stop in ("stop", "length")


def test_a_model_without_a_template_reads_the_last_message_alone(tmp_path: Path) -> None:
    finished(tmp_path / "run", tiny.make(tmp_path / "plain"))
    model = open_model(Place(tmp_path), "run")
    heard: list[str] = []
    messages = [Message("user", "w5 w6"), Message("assistant", "w7"), Message("user", "w8 w9")]
    model.reply(messages, SamplingParams(0.0, max_tokens=9), 0, lambda text, n: heard.append(text), lambda: False)
    assert model.format == "plain" and "".join(heard) == said(model, "w8 w9", temperature=0.0, max_tokens=9)


def test_a_thought_that_the_template_opens_is_folded_too(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", tiny.chatty(tmp_path / "tiny"))
    template = run / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<assistant>{%", "<assistant><think>\n{%"))
    text = said(open_model(Place(tmp_path), "run"), "Hm?")
    assert text.startswith("<think>") and unfold(text)[1] == ""


def test_an_answer_ends_at_the_stop_strings_and_stop_tokens_of_the_model_s_run(tmp_path: Path) -> None:
    model = tiny.chatty(tmp_path / "tiny")
    free = open_model(Place(finished(tmp_path / "free", model).parent), "free")
    seed = long_seed(free)
    text = said(free, GO, seed, temperature=2.0, max_tokens=200)
    stop = text[20:22]
    stopping = finished(tmp_path / "stopping", model, rollout={"stop": [stop], "stop_token_ids": [7]})
    opened = open_model(Place(stopping.parent), "stopping")
    assert 7 in opened.policy.stop_ids
    heard = said(opened, GO, seed, temperature=2.0, max_tokens=200)
    assert heard and text.startswith(heard) and stop not in heard


def test_a_draft_hands_out_everything_once_with_counts(place: Place) -> None:
    draft, taken = Draft(), []
    for text, tokens in (("<thi", 1), ("nk>ab", 1), ("c</think>", 2), ("d<", 1)):
        draft.write(text, tokens)
        taken.append(draft.take())
    draft.end(state="done")
    taken.append(draft.take())
    for name, whole in (("raw", "<think>abc</think>d<"), ("thought", "abc"), ("answer", "d<")):
        assert "".join(news.get(name, "") for news in taken) == whole
    assert [news.get("thoughts") for news in taken] == [0, 1, 3, 3, None] and taken[3]["tokens"] == 5
    assert draft.take() == {}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "null", ask(""), ask("a", messages=[]), ask("a", messages=[{"role": "user"}]), ask("a", model=1),
        ask("a", temperature="1"), ask("a", temperature=-1), ask("a", top_p=0), ask("a", max_tokens=0),
        ask("a", max_tokens=10**9), ask("a", max_tokens=True), ask("a", seed=-1), ask("a", messages=[{}] * 9),
        ask("a", messages=[{"role": "pirate", "content": "a"}]), ask("a", messages=[{"role": "user", "content": 1}]),
        ask("a", messages=[{"role": "assistant", "content": "a"}]), '{"messages": 1, "model": "abacus"}',
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused_in_one_line(text: str) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        Asked.of(text)
    assert "\n" not in str(error.value)


def test_the_draft_of_an_answer_is_that_answer(place: Place) -> None:
    draft = Draft()
    write_reply(place, ask(SUM, seed=3), draft)
    news = draft.take()
    assert news["raw"] == said(open_model(place, "abacus"), SUM, 3) and news["state"] == "done"
    assert news["tokens"] == news["written"] - (news["stop"] == "stop")


# --- sockets --------------------------------------------------------------------------------------------------------


def listen(lab: Lab, text: str) -> list[dict[str, Any]]:
    """Everything that one answer's socket says."""
    with connect(f"ws://127.0.0.1:{lab.port}/api/reply?token={lab.token}", origin=lab.address) as socket:  # type: ignore[arg-type]
        socket.send(text)
        return [json.loads(message) for message in socket]


def test_an_answer_comes_in_pieces_that_make_it_up(lab: Lab, place: Place) -> None:
    model = open_model(place, "small")
    seed = long_seed(model)
    news = listen(lab, ask(GO, model="small", temperature=2.0, max_tokens=200, seed=seed))
    whole = said(model, GO, seed, temperature=2.0, max_tokens=200)
    assert "".join(one.get("raw", "") for one in news) == whole
    assert len([one for one in news if "raw" in one]) > 2 and news[-1]["state"] == "done"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (ask(SUM, model="../x"), "no model named '../x'"),
        (ask("sum " * 900), "but the context of abacus is 512 tokens"),
        ("{", "not a valid chat request"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(lab: Lab, text: str, error: str) -> None:
    last = listen(lab, text)[-1]
    assert last["state"] == "failed" and error in last["error"] and "\n" not in last["error"]


def test_pages_are_read_while_answers_are_written_and_a_closed_page_ends_its_answer(lab: Lab, place: Place) -> None:
    clock = Path(f"/proc/{lab.process.pid}/stat")
    if not clock.exists():
        pytest.skip("needs /proc to see whether the server works")

    def worked(seconds: float) -> float:
        def ticks() -> int:
            return sum(int(x) for x in clock.read_text().rpartition(")")[2].split()[11:13])

        before = ticks()
        time.sleep(seconds)
        return (ticks() - before) / 100 / seconds

    address = f"ws://127.0.0.1:{lab.port}/api/reply?token={lab.token}"
    with ExitStack() as sockets:
        for _ in range(3):
            socket = sockets.enter_context(connect(address, origin=lab.address))  # type: ignore[arg-type]
            socket.send(ask(GO, model="endless", temperature=0, max_tokens=8192))
            while "raw" not in json.loads(socket.recv()):
                pass
        began = time.monotonic()
        urllib.request.urlopen(f"{lab.address}/api/home", timeout=600).read()
        seconds = time.monotonic() - began
        busy = worked(0.5)
    time.sleep(1)
    idle = worked(1)
    assert seconds < 10 and idle < busy / 2 and idle < 0.2, (seconds, busy, idle)


# --- the page -------------------------------------------------------------------------------------------------------


def send(page: Page, text: str) -> None:
    page.locator("[name=message]").fill(text)
    page.locator("[name=message]").press("Enter")


def thinking_seed(place: Place) -> int:
    """A seed at which the shipped model thinks."""
    model = open_model(place, "abacus")
    return next(seed for seed in range(50) if unfold(said(model, SUM, seed))[0])


def test_two_models_answer_one_message_side_by_side_with_their_thoughts_folded(
    lab: Lab, place: Place, page: Page
) -> None:
    seed = thinking_seed(place)
    text = said(open_model(place, "abacus"), SUM, seed)
    page.goto(f"{lab.address}/chat?{urlencode({'with': 'twin', 'seed': seed})}")
    send(page, SUM)
    replies = page.locator(".reply")
    replies.locator(".note").nth(1).wait_for()
    for i, name in enumerate(("abacus (ships with posttrain)", "twin")):  # equal weights, equal seed
        reply = replies.nth(i)
        assert reply.locator(".who").inner_text() == name
        assert reply.locator(".answer").inner_text() == unfold(text)[1]
        thought = reply.locator("details.thought")
        assert thought.get_attribute("open") is None and "tokens" in thought.locator("summary").inner_text()
        thought.locator("summary").click()
        assert thought.locator(".spoken").inner_text() == unfold(text)[0]
    send(page, "And 36*8?")
    page.locator(".turn").nth(1).locator(".reply .note").nth(1).wait_for()
    assert page.locator(".turn").count() == 2
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0


def test_a_model_is_shown_the_whole_conversation_and_the_system_message(lab: Lab, place: Place, page: Page) -> None:
    model, heard = open_model(place, "abacus"), []
    page.goto(f"{lab.address}/chat?{urlencode({'temperature': 0, 'system': 'Be brief.', 'max_tokens': 64})}")
    messages = [Message("system", "Be brief.")]
    for i, text in enumerate((SUM, "Help me shoot a photo of a coat.")):
        send(page, text)
        page.locator(".turn").nth(i).locator(".reply .note").wait_for()
        messages.append(Message("user", text))
        pieces: list[str] = []
        params = SamplingParams(0.0, max_tokens=64)
        model.reply(messages, params, 0, lambda piece, n, to=pieces: to.append(piece), lambda: False)
        messages.append(Message("assistant", "".join(pieces)))
        heard.append(unfold("".join(pieces))[1])
    assert [one.strip() for one in page.locator(".answer").all_inner_texts()] == [one.strip() for one in heard]


def test_a_message_is_text_and_stop_stops(lab: Lab, page: Page) -> None:
    page.goto(f"{lab.address}/chat?{urlencode({'model': 'endless', 'temperature': 0, 'max_tokens': 8192})}")
    page.get_by_text("parameters, context").wait_for()
    send(page, HOSTILE)
    answer, stop = page.locator(".answer, .thought").first, page.get_by_role("button", name="Stop")
    answer.wait_for()
    place, last = stop.evaluate(TOP), "document.querySelector('.turns').lastElementChild.offsetHeight"
    page.wait_for_function(f"least => {last} > least", arg=page.evaluate(last))
    assert abs(stop.evaluate(TOP) - place) < 4, "the button keeps its place while the answer grows, in pixels"
    stop.click()
    page.get_by_text("stopped by you").wait_for()
    assert page.title() == "Chat · posttrain lab" and page.locator(".turn script, .turn img").count() == 0
    assert "\\u202e" in page.locator(".yours").inner_text()
    page.get_by_role("button", name="Send").wait_for()


def test_an_unknown_model_and_a_lab_that_was_closed_are_said_in_one_line(place: Place, page: Page) -> None:
    with opened(place.root) as lab:
        page.goto(f"{lab.address}/chat?model=..%2F..%2Fetc")
        send(page, SUM)
        page.locator(".reply .wrong").wait_for()
        assert "there is no model named '../../etc'" in page.locator(".reply .wrong").inner_text()
    send(page, SUM)
    page.locator(".turn").nth(1).locator(".wrong").wait_for()
    assert "The lab is not responding" in page.locator(".turn").nth(1).locator(".wrong").inner_text()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chat_is_accessible_and_fits(lab: Lab, page: Page, width: int, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{lab.address}/chat?with=twin")
    page.get_by_text("Write a message below").wait_for()
    page.get_by_text("Sampling:").click()
    assert accessibility(page) == [] and not too_wide(page)
    send(page, f"{SUM} {'x' * 120}")
    page.locator(".reply .note, .reply .wrong").nth(1).wait_for()
    assert accessibility(page) == [] and not too_wide(page)
