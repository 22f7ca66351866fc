"""The socket that explorers ask: the answers of the routes that read, and of no other."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from tests.lab_server import Opened, opened

ALGORITHMS = "/api/explore/algorithms?size=7b&dtype=bfloat16&devices=1&length=1024&lora=false"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with opened(tmp_path_factory.mktemp("asking")) as lab:
        yield lab


@pytest.fixture
def socket(lab: Opened) -> Iterator[ClientConnection]:
    address = f"{lab.address.replace('http', 'ws')}/ask?token={lab.token}"
    with connect(address, origin=Origin(lab.address)) as socket:
        yield socket


def requested(lab: Opened, path: str) -> tuple[int, Any]:
    try:
        answer = urllib.request.urlopen(lab.address + path, timeout=600)
    except urllib.error.HTTPError as error:
        answer = error
    return int(answer.status or 0), json.loads(answer.read())


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (ALGORITHMS, 200),
        (ALGORITHMS.replace("7b", "8x"), 400),
        ("/api/explore/grpo/advantages?rewards=1,0,0.5&how=rloo&watch=0", 200),
        ("/api/explore/grpo/advantages?rewards=1,0,0.5&how=best&watch=0", 400),
        ("/api/explore/grpo/advantages?rewards=1%2C0&how=grpo&watch=1", 200),
        ("/api/runs/none", 404),
        ("/api/course/why", 200),
    ],
)
def test_an_answer_is_that_of_a_request(lab: Opened, socket: ClientConnection, path: str, status: int) -> None:
    socket.send(json.dumps({"id": 7, "path": path}))
    told = json.loads(socket.recv(600))
    assert (told["id"], told["status"]) == (7, status)
    assert (told["status"], told["body"]) == requested(lab, path)


def test_many_questions_at_once_each_get_their_own_answer(socket: ClientConnection) -> None:
    for number in range(40):
        rewards = ",".join(["1"] + ["0"] * (1 + number % 20))
        path = f"/api/explore/grpo/advantages?rewards={rewards}&how=grpo&watch=0"
        socket.send(json.dumps({"id": number, "path": path}))
    told = [json.loads(socket.recv(600)) for _ in range(40)]
    found = {one["id"]: len(one["body"]["rewards"]) for one in told}
    assert found == {number: 2 + number % 20 for number in range(40)}


@pytest.mark.parametrize("path", ["/", "/runs", "/static/main.js", "/api/label", "/ask", "//evil.example/api/runs", ""])
def test_what_is_no_reading_route_is_not_answered(socket: ClientConnection, lab: Opened, path: str) -> None:
    socket.send(json.dumps({"id": 1, "path": path}))
    told = json.loads(socket.recv(600))
    if path == "/api/label":  # reads what can be labelled; its writes are other routes
        assert (told["status"], told["body"]) == requested(lab, path)
    elif path.startswith("//"):  # a host is not looked at: the lab asks nobody
        assert (told["status"], told["body"]) == requested(lab, "/api/runs")
    else:
        assert told["status"] == 404 and "serves no data at" in told["body"]["error"]


@pytest.mark.parametrize(
    "said", ["", "[]", "{}", '{"id": 1}', '{"id": 1e999, "path": "/"}', '{"id": "x", "path": "/"}', "7"]
)
def test_what_is_no_question_ends_the_socket(socket: ClientConnection, said: str) -> None:
    socket.send(said)
    with pytest.raises(ConnectionClosed) as ended:
        socket.recv(600)
    assert ended.value.rcvd is not None and ended.value.rcvd.code == 1003


def test_a_page_without_a_socket_asks_by_requests(page: Page, lab: Opened) -> None:
    page.add_init_script("window.WebSocket = class { constructor() { setTimeout(() => this.onclose()); } };")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{lab.address}/explore/algorithms")
    page.get_by_text("Memory on one device").wait_for()
    assert [url for url in asked if "/api/explore/algorithms" in url]


def test_a_page_asks_on_its_socket(page: Page, lab: Opened) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{lab.address}/explore/algorithms")
    page.get_by_text("Memory on one device").wait_for()
    assert not [url for url in asked if "/api/explore/algorithms" in url]
