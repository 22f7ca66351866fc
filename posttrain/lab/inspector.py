"""Routes for one episode: the episode itself, its tokens' KL and entropy, and the verifier's reason."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain.lab import tokens
from posttrain.lab.folders import Place
from posttrain.lab.rejudge import Regraded, judge_again
from posttrain.lab.rescore import TokenScores, score_tokens
from posttrain.lab.routing import get, named
from posttrain.types import ConfigError

EPISODE = "/runs/{run}/episodes/{kind}/{step:int}/{group:int}/{index:int}"


def routes(place: Place) -> list[BaseRoute]:
    """The routes below /api/runs/RUN/episodes/KIND/STEP/GROUP/INDEX."""

    def at(request: Request) -> tuple[Path, str, int, int, int]:
        asked = request.path_params
        return place.run(named(request, "run")), asked["kind"], asked["step"], asked["group"], asked["index"]

    def scores(request: Request) -> TokenScores:
        return score_tokens(at(request)[0], tokens.read_row(*at(request)))

    def reason(request: Request) -> Regraded | dict[str, str]:
        try:
            return judge_again(at(request)[0], tokens.read_row(*at(request)))
        except ConfigError as error:  # not an error: the page shows the reason
            return {"refused": str(error)}

    return [
        get(f"/api{EPISODE}", lambda request: tokens.read_episode(*at(request))),
        get(f"/api{EPISODE}/scores", scores),
        get(f"/api{EPISODE}/reason", reason),
    ]
