"""Routes of the labeler. A label is on disk before the page is told that it is stored."""

from __future__ import annotations

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from posttrain.lab.checkpoints import SHIPPED, list_models
from posttrain.lab.folders import Place
from posttrain.lab.label import agreement, export, scores, sources, store
from posttrain.lab.label.store import Pair, Queue
from posttrain.lab.label.training import STEPS, Trainings, commands, steps_of
from posttrain.lab.routing import NO_STORE, get, named, post
from posttrain.types import Json, PosttrainError, ResumeError

AHEAD = 20
"""Pairs that a page gets in advance, so that labelling can continue while the lab is not responding."""
SHOWN = 200
"""Pairs whose scores a page shows."""


def routes(place: Place) -> list[BaseRoute]:
    """All routes of the labeler."""
    part = Labeler(place)
    return [
        get("/api/label", part.overview),
        post("/api/label", lambda request, body: sources.start(place, str(body.get("source", "")))),
        get("/api/label/{queue}", part.state),
        post("/api/label/{queue}/labels", part.label),
        get("/api/label/{queue}/results", part.results),
        Route("/api/label/{queue}/preferences.jsonl", part.download),
        post("/api/label/{queue}/export", part.export),
        post("/api/label/{queue}/train", part.train),
        get("/api/label/{queue}/models", part.models),
        get("/api/label/{queue}/scores/{run}", part.scores),
    ]


class Labeler:
    """The functions behind the routes, and the training processes they started."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.trainings = Trainings(place)

    def queue(self, request: Request) -> Queue:
        """The queue named in the URL."""
        return Queue.find(self.place.root, named(request, "queue"))

    def overview(self, request: Request) -> Json:
        """Queues with their progress, and the sources for new ones."""
        found: list[Json] = []
        for name, path in store.queues(self.place.root).items():
            queue = Queue(path)
            count, done = queue.progress()
            found.append({"name": name, "pairs": count, "done": done, **queue.about()})
        started = {queue["source"] for queue in found}
        rest = [source for source in sources.list_sources(self.place) if source["source"] not in started]
        return {"folder": str(self.place.root), "queues": found, "sources": rest}

    def state(self, request: Request) -> Json:
        """The next pairs of the annotator `as`, and everybody's progress."""
        queue = self.queue(request)
        who = request.query_params.get("as", "").strip()
        count, done = queue.progress()
        last = next((label for label in reversed(queue.labels()) if label.annotator == who), None)
        pairs = {pair.id: pair for pair in queue.pairs()} if last else {}
        return {
            "name": queue.name,
            **queue.about(),
            "pairs": count,
            "done": done,
            "next": [_shown(queue.name, who, pair) for pair in queue.waiting(who, AHEAD)] if who else [],
            "last": None if last is None else {"id": last.id, "pair": _shown(queue.name, who, pairs[last.pair])},
        }

    def label(self, request: Request, body: Json) -> Json:
        """Stores a label, or undoes the one named by `undo`; responds once that is on disk."""
        queue = self.queue(request)
        undone = body.get("undo")
        return {"stored": queue.undo(undone) if isinstance(undone, str) else queue.add(body)}

    def results(self, request: Request) -> Json:
        """Agreement between annotators, and their habits."""
        labels = self.queue(request).labels()
        return {"habits": agreement.habits(labels), "agreements": agreement.agreements(labels), "labels": len(labels)}

    async def download(self, request: Request) -> Response:
        """The export as a file download."""
        asked = request.query_params

        def text() -> str:
            return export.text_of(self.queue(request), asked.get("who", "each"), asked.get("ties", "keep"))

        try:
            found = await to_thread.run_sync(text)
        except PosttrainError as error:
            return JSONResponse({"error": str(error)}, 404 if isinstance(error, ResumeError) else 400, NO_STORE)
        headers = {**NO_STORE, "content-disposition": 'attachment; filename="preferences.jsonl"'}
        return Response(found, 200, headers, "application/x-ndjson")

    def export(self, request: Request, body: Json) -> Json:
        """Writes the export next to the queue; returns its path, rows, and the commands that train on it."""
        queue = self.queue(request)
        steps, model = steps_of(body.get("steps", STEPS)), str(body.get("model", SHIPPED))
        path, count = export.write(queue, str(body.get("who", "each")), str(body.get("ties", "keep")))
        return {"path": str(path), "rows": count, "commands": commands(self.place, queue, path, model, steps)}

    def train(self, request: Request, body: Json) -> Json:
        """Starts `posttrain reward` on an export."""
        how = str(body.get("who", "each")), str(body.get("ties", "keep")), str(body.get("model", SHIPPED))
        return self.trainings.start(self.queue(request), *how, steps_of(body.get("steps", STEPS)))

    def models(self, request: Request) -> Json:
        """Base models for a reward model, and the reward models trained on this queue."""
        return {"bases": list_models(self.place), "runs": self.trainings.of(self.queue(request)), "steps": STEPS}

    def scores(self, request: Request) -> Json:
        """A reward model's scores of the queue's pairs."""
        queue, name = self.queue(request), named(request, "run")
        line = next((line for line in self.trainings.of(queue) if line["run"] == name), None)
        if line is None or line["status"] != "finished":
            raise ResumeError(f"{name!r} is not a finished reward model trained on queue {queue.name}.")
        data = export.written(self.place.root, queue.name)[line["file"]]
        found = scores.compare(queue, self.place.run(name), data)
        return {**found, "pairs": found["pairs"][:SHOWN], "count": len(found["pairs"])}


def _shown(queue: str, who: str, pair: Pair) -> Json:
    """A pair as an annotator sees it; the sides are random."""
    left = store.left_of(queue, who, pair.id)
    sides = (pair.a, pair.b) if left == "a" else (pair.b, pair.a)
    prompt = [{"role": m.role, "content": m.content} for m in pair.prompt]
    return {"id": pair.id, "prompt": prompt, "left": sides[0], "right": sides[1]}
