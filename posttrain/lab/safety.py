"""Security middleware: checks every request before any route sees it.

The lab has no passwords; it is safe because only the user's own browser, on a page that the lab served, can talk to it.
Other sites are kept out by the list of allowed hosts (which also stops DNS rebinding), by the browser's Origin and
Sec-Fetch headers, and by a token that is new at every launch. No cross-origin request is allowed. Pages show model
text as text only; the content security policy is a second line of defence.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER, COOKIE = "x-lab-token", "lab_token"
READS = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
LONGEST_BODY = 1 << 20
MESSAGES = {
    "host": "The lab does not serve this address. Use the one that it printed.",
    "origin": "The lab does not accept requests from other sites.",
    "token": "This request lacks this launch's token. Open the address that the lab printed again.",
    "size": "This request is larger than the lab accepts.",
}


class Guard:
    """ASGI middleware around the whole application.

    `hosts` are the accepted values of the Host header. Writes and WebSockets need `token`; if the lab is open to other
    machines (`exposed`), so does every other request, as a cookie that the printed address sets.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str, exposed: bool = False) -> None:
        self.app = app
        self.hosts = hosts
        self.token = token
        self.exposed = exposed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rejects the request, or passes it on and adds the security headers to the response."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        wrong = self._wrong(scope, headers)
        if self.exposed and wrong == "token" and scope["type"] == "http" and self._is_invitation(scope, headers):
            answer = RedirectResponse(scope["path"], status_code=303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            await answer(scope, receive, marked)
        elif wrong is None:
            await self.app(scope, receive, marked)
        elif scope["type"] == "websocket":  # closed before it is accepted, which the client sees as HTTP 403
            await send({"type": "websocket.close", "code": 1008, "reason": wrong})
        else:
            await PlainTextResponse(MESSAGES[wrong] + "\n", status_code=413 if wrong == "size" else 403)(
                scope, receive, marked
            )

    def _wrong(self, scope: Scope, headers: Headers) -> str | None:
        """The rule that a request breaks, or None."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return "host"
        writes = scope["type"] == "websocket" or scope["method"] not in READS
        if self._is_foreign(scope, headers, hosts[0].lower(), writes):
            return "origin"
        if (writes or self.exposed) and not self._has_token(scope, headers):
            return "token"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LONGEST_BODY or ("transfer-encoding" in headers and writes):
            return "size"
        return None

    def _is_foreign(self, scope: Scope, headers: Headers, host: str, writes: bool) -> bool:
        origins = headers.getlist("origin")
        if writes and len(origins) != 1:
            return True
        if origins and origins != [f"http://{host}"]:
            return True
        site = headers.get("sec-fetch-site", "same-origin")
        opened = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        return site not in ("same-origin", "none") and (writes or not opened)  # a link from elsewhere may open a page

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        given = headers.get(TOKEN_HEADER, "")
        if scope["type"] == "websocket":  # browsers cannot set custom headers on these
            given = _query(scope, "token")
        if self._equal(given):
            return True
        reads = scope["type"] == "http" and scope["method"] in READS
        return self.exposed and reads and self._equal(_cookie(headers))

    def _is_invitation(self, scope: Scope, headers: Headers) -> bool:
        return scope["method"] == "GET" and scope["path"] == "/" and self._equal(_query(scope, "token"))

    def _equal(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _query(scope: Scope, name: str) -> str:
    try:
        return parse_qs(scope["query_string"].decode("ascii")).get(name, [""])[0]
    except ValueError:  # not ASCII, or too many fields
        return ""


def _cookie(headers: Headers) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""
