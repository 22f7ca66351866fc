"""The lab's static files. They are many and small, so each is read directly instead of in a thread.

A file is looked up among those that existed when the lab started, and its name is never joined to a path, so that no
URL leads out of the folder.
"""

from __future__ import annotations

import mimetypes
from email.utils import formatdate
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {".js": "text/javascript", ".css": "text/css", ".json": "application/json", ".woff2": "font/woff2"}


def static(folder: Path) -> Route:
    """The route for a folder's files, /static/NAME."""
    known = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    async def answer(request: Request) -> Response:
        path = known.get(str(request.path_params["name"]))
        if path is None:
            raise HTTPException(404)
        found = path.stat()
        mark = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        headers = {"etag": mark, "last-modified": formatdate(found.st_mtime, usegmt=True)}
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304, headers=headers)
        kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return Response(path.read_bytes(), headers=headers, media_type=kind)

    return Route("/static/{name:path}", answer)
