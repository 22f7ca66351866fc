"""Who the lab does not answer: other hosts, other sites, those without this launch's token, paths out of its folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from starlette.convertors import IntegerConvertor
from starlette.routing import Route, WebSocketRoute
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from posttrain.cli import main as cli
from posttrain.lab.app import make_app
from posttrain.lab.serve import hosts, is_loopback
from tests.lab_server import Opened, hostile_run, opened

HERE, ELSEWHERE = "http://{own}", "https://example.com"
WRITE = {"Origin": HERE, "X-Lab-Token": "{token}"}

# name → method, path, headers beside a right Host (None leaves Host out, a list gives several). {own} is the right
# host and port, {token} the right token.
CORPUS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # a name that is pointed at this machine, or a proxy's idea of it
    "host of another site": ("GET", "/", {"Host": "example.com"}),
    "host of another site with the port": ("GET", "/api/runs", {"Host": "example.com:{port}"}),
    "host without its port": ("GET", "/", {"Host": "127.0.0.1"}),
    "host with another port": ("GET", "/", {"Host": "127.0.0.1:1"}),
    "host that begins like ours": ("GET", "/api/home", {"Host": "127.0.0.1:{port}.example.com"}),
    "host that ends like ours": ("GET", "/api/home", {"Host": "example.com.localhost:{port}"}),
    "host behind a user name": ("GET", "/", {"Host": "{own}@example.com"}),
    "host with a user name": ("GET", "/", {"Host": "example.com@{own}"}),
    "any address as host": ("GET", "/", {"Host": "0.0.0.0:{port}"}),
    "short form of the address": ("GET", "/", {"Host": "127.1:{port}"}),
    "address as one number": ("GET", "/", {"Host": "2130706433:{port}"}),
    "empty host": ("GET", "/", {"Host": ""}),
    "no host": ("GET", "/", {"Host": None}),
    "two hosts": ("GET", "/", {"Host": ["{own}", "example.com"]}),
    "wrong host for a file": ("GET", "/static/lab.css", {"Host": "example.com:{port}"}),
    "wrong host where there is nothing": ("GET", "/nothing", {"Host": "example.com:{port}"}),
    "right host only in a forwarding header": ("GET", "/", {"Host": "example.com", "X-Forwarded-Host": "{own}"}),
    "right host only in an absolute address": ("GET", "http://{own}/", {"Host": "example.com"}),
    # requests that another site makes this browser send
    "write without origin": ("POST", "/api/runs", {"X-Lab-Token": "{token}"}),
    "write from another site": ("POST", "/api/runs", {**WRITE, "Origin": ELSEWHERE}),
    "write from another port": ("POST", "/api/runs", {**WRITE, "Origin": "http://127.0.0.1:1"}),
    "write over https, which we are not": ("POST", "/api/runs", {**WRITE, "Origin": "https://{own}"}),
    "write from a sandboxed frame": ("POST", "/api/runs", {**WRITE, "Origin": "null"}),
    "write with two origins": ("POST", "/api/runs", {**WRITE, "Origin": [HERE, ELSEWHERE]}),
    "write by our other name": ("POST", "/api/runs", {**WRITE, "Origin": "http://localhost:{port}"}),
    "write that the browser calls cross-site": ("POST", "/api/runs", {**WRITE, "Sec-Fetch-Site": "cross-site"}),
    "write that the browser calls same-site": ("POST", "/api/runs", {**WRITE, "Sec-Fetch-Site": "same-site"}),
    "write without the token": ("POST", "/api/runs", {"Origin": HERE}),
    "write with a wrong token": ("POST", "/api/runs", {"Origin": HERE, "X-Lab-Token": "x" * 43}),
    "write with the token in the address": ("POST", "/api/runs?token={token}", {"Origin": HERE}),
    "write with the token as a cookie": ("POST", "/api/runs", {"Origin": HERE, "Cookie": "lab_token={token}"}),
    "form as plain text": ("POST", "/api/runs", {"Origin": ELSEWHERE, "Content-Type": "text/plain"}),
    "put": ("PUT", "/api/runs/hostile", {"Origin": HERE}),
    "delete": ("DELETE", "/api/runs/hostile", {"Origin": HERE}),
    "patch": ("PATCH", "/api/runs/hostile", {"Origin": HERE}),
    "preflight": ("OPTIONS", "/api/runs", {"Origin": ELSEWHERE, "Access-Control-Request-Method": "POST"}),
    "method of nobody": ("PURGE", "/api/runs", {"Origin": HERE}),
    "write that is too large": ("POST", "/api/runs", {**WRITE, "Content-Length": "99999999"}),
    "write of unknown length": ("POST", "/api/runs", {**WRITE, "Transfer-Encoding": "chunked"}),
    "read with another site's origin": ("GET", "/api/runs", {"Origin": ELSEWHERE}),
    "script of another site": ("GET", "/api/runs", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
    "frame of another site": (
        "GET", "/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ),
    "read from another port": ("GET", "/api/runs", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}),
    # paths that would lead out of the folder
    "file above the static ones": ("GET", "/static/../app.py", {}),
    "the same, encoded": ("GET", "/static/%2e%2e/app.py", {}),
    "the same, encoded with its slash": ("GET", "/static/..%2fapp.py", {}),
    "file by its whole path": ("GET", "/static//etc/passwd", {}),
    "run above the folder": ("GET", "/api/runs/..", {}),
    "run above the folder, encoded": ("GET", "/api/runs/%2e%2e%2fsecret", {}),
    "stage above its pipeline": ("GET", "/api/runs/hostile~..~..~secret", {}),
    "pipeline above the folder": ("GET", "/api/pipelines/..%2fsecret", {}),
    "run with a null character": ("GET", "/api/runs/hostile%00", {}),
}  # fmt: skip

SOCKETS: dict[str, tuple[str, str | None, str]] = {
    "without origin": ("?token={token}", None, "{own}"),
    "from another site": ("?token={token}", ELSEWHERE, "{own}"),
    "from a sandboxed frame": ("?token={token}", "null", "{own}"),
    "without the token": ("", HERE, "{own}"),
    "with a wrong token": ("?token=wrong", HERE, "{own}"),
    "with a host of another site": ("?token={token}", "http://example.com:{port}", "example.com:{port}"),
}
"""name → query, origin and Host of a WebSocket that must not open."""


INJECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "script as a run": ("/runs/%3Cscript%3Ealert(1)%3C%2Fscript%3E", {}),
    "script as a run that is asked about": ("/api/runs/%3Cscript%3Ealert(1)%3C%2Fscript%3E", {}),
    "script as a page": ("/%3Cscript%3Ealert(1)%3C%2Fscript%3E", {}),
    "script in a search": ("/runs/hostile/episodes?text=%3Cscript%3Ealert(1)%3C%2Fscript%3E", {}),
    "script in a search that fails": ("/api/runs/hostile/episodes?order=%3Cscript%3Ealert(1)%3C%2Fscript%3E", {}),
    "end of an attribute": ("/runs/x%22onload=%22alert(1)", {}),
    "script as the token": ("/?token=%22%3E%3Cscript%3Ealert(1)%3C/script%3E", {}),
    "script as a file": ("/static/%3Cscript%3Ealert(1)%3C%2Fscript%3E.js", {}),
    "script as a host": ("/", {"Host": "<script>alert(1)</script>"}),
    "script as an origin": ("/", {"Origin": "<script>alert(1)</script>"}),
    "second header": ("/runs/x%0d%0aSet-Cookie:%20a=b", {}),
    "another site to go to": ("//evil.example/..%2f", {}),
}
"""name → path and headers that would be markup, a header or another site, if they were put into an answer."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("lab")
    hostile_run(folder / "secret")
    hostile_run(folder / "runs" / "hostile")
    with opened(folder / "runs") as lab:
        yield lab


def filled(text: str, lab: Opened) -> str:
    return text.format(own=f"127.0.0.1:{lab.port}", port=lab.port, token=lab.token)


def send(lab: Opened, method: str, path: str, headers: dict[str, Any]) -> tuple[int, str, str]:
    """(status, headers in lower case, body) of a request that is sent byte for byte as it is written."""
    lines = [f"{method} {filled(path, lab)} HTTP/1.1"]
    for name, value in {"Host": "{own}", "Connection": "close", **headers}.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        lines += [f"{name}: {filled(one, lab)}" for one in values]
    with socket.create_connection(("127.0.0.1", lab.port), timeout=600) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while part := sock.recv(65536):
            answer += part
    head, _, body = answer.decode("utf-8", "replace").partition("\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


@pytest.mark.parametrize("name", CORPUS)
def test_a_request_that_is_not_from_the_labs_own_page_is_rejected(lab: Opened, name: str) -> None:
    status, head, body = send(lab, *CORPUS[name])
    assert status in (400, 403, 404, 413), head
    assert "access-control-" not in head and "grpo" not in body and "import" not in body and "root:" not in body
    assert lab.token not in body, "a page was served"


@pytest.mark.parametrize("name", SOCKETS)
def test_a_websocket_of_another_site_does_not_open(lab: Opened, name: str) -> None:
    query, origin, host = SOCKETS[name]
    made = socket.create_connection(("127.0.0.1", lab.port), timeout=600)
    address = f"ws://{filled(host, lab)}/live/hostile{filled(query, lab)}"
    with pytest.raises(InvalidStatus, match="403"), connect(address, origin=origin and filled(origin, lab), sock=made):  # type: ignore[arg-type]
        pass


def test_the_labs_own_requests_are_answered(lab: Opened) -> None:
    assert send(lab, "GET", "/api/runs/hostile", {})[0] == 200
    assert send(lab, "GET", "/", {"Host": "localhost:{port}"})[0] == 200
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert send(lab, "GET", "/", followed)[0] == 200, "a link from elsewhere may open a page"
    assert send(lab, "POST", "/api/runs", {**WRITE, "Content-Length": "0"})[0] == 405, "past the guard, no such write"
    with connect(filled("ws://{own}/live/hostile?token={token}", lab), origin=filled(HERE, lab)) as sock:  # type: ignore[arg-type]
        assert '"whole": true' in str(sock.recv(timeout=600))


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/main.js", "/nothing", "/api/runs/nothing"])
def test_every_answer_forbids_what_the_lab_does_not_need(lab: Opened, path: str) -> None:
    _, head, _ = send(lab, "GET", path, {})
    policy = head.partition("content-security-policy: ")[2].partition("\r\n")[0]
    assert policy.startswith("default-src 'none'; script-src 'self';") and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert "x-content-type-options: nosniff" in head and "referrer-policy: no-referrer" in head
    assert "server:" not in head and "access-control-" not in head


@pytest.mark.parametrize("name", INJECTIONS)
def test_what_an_address_holds_is_never_put_into_a_document(lab: Opened, name: str) -> None:
    path, headers = INJECTIONS[name]
    _, head, body = send(lab, "GET", path, headers)
    if "text/html" in head:
        assert "alert(1)" not in body and "evil.example" not in body
    else:
        assert "content-type: application/json" in head or "content-type: text/plain" in head or not body
    assert "x-content-type-options: nosniff" in head and "\nset-cookie" not in head and "evil.example" not in head


@pytest.fixture(scope="module")
def writing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Every route of the application that writes or that is a WebSocket, with an example for each part of its path."""
    found: dict[str, list[str]] = {}
    for route in make_app(tmp_path_factory.mktemp("routes"), frozenset(), "token").routes:
        if isinstance(route, Route | WebSocketRoute):
            values = {
                name: 1 if isinstance(kind, IntegerConvertor) else "hostile"
                for name, kind in route.param_convertors.items()
            }
            methods = sorted({*(route.methods or ())} - {"GET", "HEAD"}) if isinstance(route, Route) else ["WEBSOCKET"]
            if methods:
                found[route.path_format.format(**values)] = methods
        else:
            raise AssertionError(f"{route} is of a kind that this law does not look into")
    return found


REFUSED: dict[str, dict[str, Any]] = {
    "without the token": {"Origin": HERE},
    "with a wrong token": {"Origin": HERE, "X-Lab-Token": "x" * 43},
    "with the token as a cookie": {"Origin": HERE, "Cookie": "lab_token={token}"},
    "without an origin": {"X-Lab-Token": "{token}"},
    "from another site": {**WRITE, "Origin": ELSEWHERE},
    "from a sandboxed frame": {**WRITE, "Origin": "null"},
    "that the browser calls cross-site": {**WRITE, "Sec-Fetch-Site": "cross-site"},
    "to another host": {**WRITE, "Host": "example.com:{port}", "Origin": "http://example.com:{port}"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_route_takes_a_write_that_is_not_from_the_labs_own_page(
    lab: Opened, writing: dict[str, list[str]], name: str
) -> None:
    asked = {path: methods for path, methods in writing.items() if methods != ["WEBSOCKET"]}
    assert asked, "there are routes that write"
    for path, methods in asked.items():
        for method in methods:
            status, _, body = send(lab, method, path, {"Content-Length": "0", **REFUSED[name]})
            assert status == 403 and lab.token not in body, f"{method} {path} {name}"


def test_no_websocket_opens_for_a_page_that_is_not_the_labs_own(lab: Opened, writing: dict[str, list[str]]) -> None:
    paths = [path for path, methods in writing.items() if methods == ["WEBSOCKET"]]
    assert "/live/hostile" in paths
    for path in paths:
        for query, origin, host in SOCKETS.values():
            made = socket.create_connection(("127.0.0.1", lab.port), timeout=600)
            address = f"ws://{filled(host, lab)}{path}{filled(query, lab)}"
            given = Origin(filled(origin, lab)) if origin else None
            with pytest.raises(InvalidStatus, match="403"), connect(address, origin=given, sock=made):
                pass


def test_what_a_model_wrote_is_only_ever_json(lab: Opened) -> None:
    _, head, body = send(lab, "GET", "/api/runs/hostile/episodes", {})
    assert "content-type: application/json" in head and "<script>" in body
    for path in ("/runs/%3Cscript%3Ealert(1)%3C%2Fscript%3E", "/runs/hostile/episodes?text=%3Cscript%3Ealert(1)"):
        _, head, body = send(lab, "GET", path, {})
        assert "text/html" in head and "alert(1)" not in body, "an address is never put into the page"


def test_the_token_is_another_one_at_every_launch(lab: Opened, tmp_path: Path) -> None:
    with opened(tmp_path) as other:
        assert len(other.token) >= 43 and other.token != lab.token


def test_other_machines_are_only_let_in_by_a_flag_and_with_the_token(tmp_path: Path) -> None:
    refused = CliRunner().invoke(cli.main, ["lab", str(tmp_path), "--host", "0.0.0.0"])
    assert (
        refused.exit_code == 2
        and "--expose" in refused.output
        and "prompts, completions and settings" in refused.output
    )
    with opened(tmp_path, "--host", "0.0.0.0", "--expose") as lab:
        assert send(lab, "GET", "/", {})[0] == 403 and send(lab, "GET", "/api/runs", {})[0] == 403
        status, head, _ = send(lab, "GET", "/?token={token}", {})
        assert status == 303 and "httponly" in head and "samesite=strict" in head and "location: /\r\n" in head
        assert send(lab, "GET", "/", {"Cookie": "lab_token={token}"})[0] == 200
        assert send(lab, "GET", "/", {"Cookie": "lab_token={token}", "Host": "example.com:{port}"})[0] == 403
        assert send(lab, "POST", "/", {"Cookie": "lab_token={token}", "Origin": HERE})[0] == 403


NAMES = {"127.0.0.1": True, "localhost": True, "::1": True, "127.8.0.1": True, "0.0.0.0": False, "192.168.0.2": False,
         "example.com": False}  # fmt: skip


@pytest.mark.parametrize(("host", "own"), NAMES.items())
def test_what_counts_as_this_machine(host: str, own: bool) -> None:
    assert is_loopback(host) is own
    assert ("localhost:80" in hosts(host, 80)) is (own or host == "0.0.0.0")


def test_a_port_that_is_taken_is_one_line(lab: Opened, tmp_path: Path) -> None:
    taken = CliRunner().invoke(cli.main, ["lab", str(tmp_path), "--port", str(lab.port)])
    assert (
        taken.exit_code == 2 and "Choose another port with --port" in taken.output and "Traceback" not in taken.output
    )
