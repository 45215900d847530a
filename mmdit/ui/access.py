"""Decide who may ask what of the server: the token, the host names that it accepts, and forms from
its own pages only.

A page of another site must not reach the server through the browser of its user. So each request
must name a host that the server knows (against DNS rebinding); a request that changes something
must come from a page of this server and carry the secret of its forms; and responses say what a
browser may load.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmdit.privacy import is_loopback

COOKIE = "mmdit_ui"
SIGN_IN = "/sign-in"
DATA = ("/api/", "/files/", "/job-files/")  # addresses of data, which are no pages
FORM_TYPE = "application/x-www-form-urlencoded"
MAX_FORM_BYTES, MAX_FORM_FIELDS = 1 << 20, 5000
LEAST_TOKEN = 16
REFUSAL_SECONDS = 0.5
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self';"
        " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def check_token(token: str, host: str) -> None:
    """Raise ValueError if others can reach the address `host` but there is no token, or if the
    token is too short."""
    if not token and not is_loopback(host):
        raise ValueError(
            f"--host is {host}, which other machines can reach: set the environment variable"
            f" MMDIT_UI_TOKEN to a secret of at least {LEAST_TOKEN} characters, or leave out --host"
        )
    if token and len(token) < LEAST_TOKEN:
        raise ValueError(
            f"MMDIT_UI_TOKEN has {len(token)} characters, must have at least {LEAST_TOKEN}"
        )


def same(given: str, expected: str) -> bool:
    """Return whether two texts are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


@dataclass(frozen=True)
class Guard:
    """The rules of one server. Without a `token`, only this machine may ask, by a name of the
    loopback interface. With one, requests may also use an IP address, to which no name can be
    rebound, and the host names in `names`."""

    token: str = ""
    names: frozenset[str] = frozenset()
    # The secret that forms of this server carry; new at each start.
    form_secret: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    def cookie(self) -> str:
        """Return the cookie of a signed-in browser, from which nobody can learn the token."""
        key = self.token.encode()
        return hmac.new(key, b"signed in to the mmdit ui", hashlib.sha256).hexdigest()

    def is_token(self, given: str) -> bool:
        """Return whether `given` is the token."""
        return bool(self.token) and same(given, self.token)

    def is_signed_in(self, request: Request) -> bool:
        """Return whether a request carries the cookie, or the token in its `Authorization` header;
        True if there is no token."""
        if not self.token:
            return True
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        return same(request.cookies.get(COOKIE, ""), self.cookie()) or self.is_token(bearer)

    def knows_host(self, header: str) -> bool:
        """Return whether the header `Host` names this server, and not a foreign domain that was
        pointed at it."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").lower()
        except ValueError:
            return False
        if is_loopback(name) or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return bool(self.token)

    def is_from_here(self, request: Request) -> bool:
        """Return whether a request comes from a page of this server, or from a program that is no
        browser."""
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return False
        origin = request.headers.get("origin")
        if origin is None:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and parts.netloc == request.headers["host"]


class Access:
    """The application `app` behind a guard. Forms are read here, and passed on in `scope["form"]`
    as lists by field name."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no WebSockets
        request = Request(scope, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [
                    *message["headers"],
                    *(pair for pair in extra if pair[0] not in known),
                ]
                if b"cache-control" not in known:
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        answer = await self._refusal(request)
        if answer is None:
            answer = self.app
        await answer(scope, receive, send_with_headers)

    async def _refusal(self, request: Request) -> Response | None:
        """Return the response to a request that is refused; None lets it through."""
        guard, path = self.guard, request.url.path
        if not guard.knows_host(request.headers.get("host", "")):
            return PlainTextResponse(
                "This server is not known by that name; start it with --name to allow it.\n", 421
            )
        changes = request.method not in ("GET", "HEAD")
        if changes and not guard.is_from_here(request):
            return PlainTextResponse("Refused: the request comes from another site.\n", 403)
        if not changes and request.headers.get("sec-fetch-site") == "cross-site":
            mode = request.headers.get("sec-fetch-mode")
            if mode != "navigate" or request.headers.get("sec-fetch-dest") != "document":
                return PlainTextResponse("Refused: another site embeds this address.\n", 403)
        if path == SIGN_IN:
            return await self._read_form(request) if changes else None
        if not path.startswith("/static/") and not guard.is_signed_in(request):
            if changes or path.startswith(DATA):
                return PlainTextResponse("Sign in first: the token is missing or wrong.\n", 401)
            return RedirectResponse(SIGN_IN, 303)
        if not changes:
            return None
        if request.method != "POST":
            return PlainTextResponse("Only GET and POST are answered.\n", 405)
        refusal = await self._read_form(request)
        if refusal is not None:
            return refusal
        secret = request.scope["form"].get("form_secret", [""])[0]
        if not same(secret, guard.form_secret):
            return PlainTextResponse(
                "Refused: this form is older than the server. Reload its page and send it again.\n",
                403,
            )
        return None

    @staticmethod
    async def _read_form(request: Request) -> Response | None:
        """Read the form into `scope["form"]`; return a refusal if there is no form, or it is too
        large."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != FORM_TYPE:
            return PlainTextResponse(f"A form must be sent as {FORM_TYPE}.\n", 415)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FORM_BYTES:
                return PlainTextResponse("The form is too large.\n", 413)
        try:
            fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
        except ValueError:
            return PlainTextResponse("The form cannot be read.\n", 400)
        request.scope["form"] = fields
        return None


async def sign_in(guard: Guard, request: Request) -> Response | None:
    """Return the response to a sign-in form: one that sets a cookie if the token is right, else
    None, after a delay."""
    if not guard.is_token(request.scope["form"].get("token", [""])[0]):
        await asyncio.sleep(REFUSAL_SECONDS)  # slows down guessing
        return None
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        COOKIE,
        guard.cookie(),
        max_age=30 * 24 * 3600,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


def guard_for(token: str, names: Iterable[str]) -> Guard:
    """Return the guard of a server that can be reached under `names`, besides loopback."""
    return Guard(token, frozenset(name.lower() for name in names))
