"""The lab's web application: pages, JSON API and live curves, all read from run folders."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from posttrain import __version__
from posttrain.evaluation.diagnose import diagnose_run
from posttrain.lab import asking, cards, chat, episodes, folders, inspector
from posttrain.lab.course import exercises
from posttrain.lab.course import routes as course
from posttrain.lab.curves import Feed
from posttrain.lab.explore import algorithms, grpo, hacking, preferences, search, stages
from posttrain.lab.files import static
from posttrain.lab.folders import Place
from posttrain.lab.inspector import EPISODE
from posttrain.lab.label import routes as label
from posttrain.lab.routing import NO_STORE, Routes, get, named
from posttrain.lab.safety import Guard
from posttrain.store import workers
from posttrain.store.run import Run
from posttrain.types import Json, PosttrainError

STATIC = Path(__file__).parent / "static"
POLL = 0.5  # seconds between polls of a run that a page watches
PAGES = (
    "/",
    "/learn",
    "/learn/{chapter}",
    "/explore",
    "/explore/stages",
    "/explore/algorithms",
    "/explore/hacking",
    "/explore/grpo",
    "/explore/preferences",
    "/explore/search",
    "/runs",
    "/runs/{run}",
    "/runs/{run}/episodes",
    EPISODE,
    "/pipelines/{pipeline}",
    "/label",
    "/label/{queue}",
    "/chat",
)
PARTS: tuple[Routes, ...] = (
    inspector.routes,
    cards.routes,
    course.routes,
    exercises.routes,
    chat.routes,
    grpo.routes,
    algorithms.routes,
    hacking.routes,
    stages.routes,
    label.routes,
    preferences.routes,
    search.routes,
)
"""One function per part of the lab; each adds its routes under /api."""


class Lab:
    """The routes and their shared state: the folder, this launch's token and one feed per run."""

    def __init__(self, place: Place, token: str) -> None:
        self.place = place
        self.token = token
        self._feeds: dict[Path, Feed] = {}
        self._lock = threading.Lock()
        self._judging = threading.Lock()

    def routes(self) -> list[Any]:
        """All routes, in matching order."""
        asked = [
            get("/api/home", self.home),
            get("/api/runs", lambda request: folders.list_runs(self.place)),
            get("/api/runs/{run}", self.run),
            get("/api/runs/{run}/verdicts", self.verdicts),
            get("/api/runs/{run}/episodes", self.episodes),
            get("/api/pipelines/{pipeline}", lambda asked: folders.read_pipeline(self.place, named(asked, "pipeline"))),
            WebSocketRoute("/live/{run}", self.live),
            *(route for part in PARTS for route in part(self.place)),
        ]
        return [*(Route(path, self.page) for path in PAGES), *asked, asking.socket(asked), static(STATIC)]

    async def page(self, request: Request) -> Response:
        """The single HTML document of all pages; its script picks the page from the URL."""
        return self.document(200)

    def document(self, status: int) -> Response:
        """The HTML document with this launch's token, which only pages of the lab can read."""
        text = (STATIC / "index.html").read_text(encoding="utf-8").replace("{token}", self.token)
        return HTMLResponse(text, status_code=status, headers=NO_STORE)

    def home(self, request: Request) -> Json:
        """Summary of the folder for the home page."""
        found = folders.list_runs(self.place)
        return {
            "folder": str(self.place.root),
            "version": __version__,
            "runs": found[:6],
            "count": len(found),
            "running": sum(run["status"] == "running" for run in found),
            "pipelines": [folders.read_pipeline(self.place, name) for name in self.place.pipelines()],
        }

    def run(self, request: Request) -> Json:
        """A run's settings, status and logged events."""
        folder = self.folder(request)
        with Run.read(folder) as run:
            noted = [{"step": e.step, "level": e.level, "kind": e.kind, "message": e.message} for e in run.events()]
            about: Json = {"status": run.status(), "step": run.last_step(), **folders.facts(run)}
            recipe = run.header.get("recipe", {})
        kinds = episodes.kinds(folder)
        about["parts"] = episodes.part_names(folder)
        about["processes"] = processes(folder)
        name = named(request, "run")
        return {"name": name, "folder": str(folder), **about, "events": noted, "episodes": kinds, "recipe": recipe}

    def verdicts(self, request: Request) -> list[Json]:
        """The verdicts of `posttrain doctor`. It reads completions and takes seconds, so it runs once per step."""
        folder = self.folder(request)
        with Run.read(folder) as run:
            step, status = run.last_step(), run.status()
        with self._judging:
            return _judged(folder, step, status)

    def episodes(self, request: Request) -> Json:
        """One page of an episode search."""
        query = episodes.Query.of(dict(request.query_params))
        return episodes.search(self.folder(request), query).as_dict()

    def folder(self, request: Request | WebSocket) -> Path:
        """The folder of the run named in the URL."""
        return self.place.run(named(request, "run"))

    def feed(self, folder: Path) -> Feed:
        """The shared feed of a run."""
        with self._lock:
            return self._feeds.setdefault(folder, Feed(folder))

    async def live(self, socket: WebSocket) -> None:
        """Sends a run's curves, then new steps, until the page is closed."""
        await socket.accept()
        watching = asyncio.create_task(self._watch(socket))
        with suppress(WebSocketDisconnect):
            while not watching.done():
                await socket.receive_text()  # no message is expected; this detects that the page was closed
        watching.cancel()
        with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
            await watching

    async def _watch(self, socket: WebSocket) -> None:
        try:
            folder = await to_thread.run_sync(self.folder, socket)
            feed = self.feed(folder)
            asked = [name for name in socket.query_params.get("metrics", "").split(",") if name]
            sent: Json = {}
            while True:
                message = await to_thread.run_sync(_news, folder, feed, asked, sent)
                if message:
                    await socket.send_text(message)
                await asyncio.sleep(POLL)
        except (PosttrainError, OSError) as error:
            await socket.send_text(json.dumps({"error": str(error)}))
            await socket.close(1011)


def processes(folder: Path) -> list[Json]:
    """Who worked for a run, where it had learners, samplers or judges of their own."""
    found = workers.read(folder) or {"workers": []}
    return [{**row, "unit": workers.DONE[row["role"]]} for row in found["workers"]]


@lru_cache(maxsize=32)
def _judged(folder: Path, step: int | None, status: str) -> list[Json]:
    return [verdict.as_dict() for verdict in diagnose_run(folder)]


def _news(folder: Path, feed: Feed, asked: list[str], sent: Json) -> str:
    """What the page does not have yet, as JSON, or an empty string; updates `sent`."""
    feed.refresh()
    with Run.read(folder) as run:
        status = run.status()
    names = list(dict.fromkeys([*feed.shown, *(name for name in asked if name in feed.names)]))
    now = {"step": feed.step, "version": feed.version, "status": status, "names": names}
    if now == sent:
        return ""
    news: Json = {"step": feed.step, "status": status, "changes": feed.changes()}
    if (feed.version, names) != (sent.get("version"), sent.get("names")):
        news |= {"whole": True, "names": feed.names, "curves": feed.curves(names)}
    else:
        news |= {"whole": False, "curves": feed.since(names, sent["step"])}
    sent.update(now)
    return json.dumps(news, allow_nan=False)


def make_app(root: Path, hosts: frozenset[str], token: str, exposed: bool = False) -> Starlette:
    """The application behind its security middleware."""
    lab = Lab(Place(root), token)

    async def missing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        asks_for_page = request.method == "GET" and not request.url.path.startswith(("/api/", "/static/"))
        return lab.document(status) if asks_for_page else Response(status_code=status)

    guard = Middleware(Guard, hosts=hosts, token=token, exposed=exposed)
    return Starlette(routes=lab.routes(), middleware=[guard], exception_handlers={HTTPException: missing})
