"""The application: every page behind the guard, and the socket on which it listens."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from mmdit.ui.access import COOKIE, DATA, SIGN_IN, Access, Guard, sign_in
from mmdit.ui.data_pages import DataPages
from mmdit.ui.job_pages import JobPages
from mmdit.ui.job_requests import Workplace
from mmdit.ui.playground import Playground
from mmdit.ui.run_pages import RunPages
from mmdit.ui.templating import NotThere, Templates

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Settings:
    """The settings with which a server was started. `runs`: the folder of the runs."""

    runs: Path
    guard: Guard
    place: Workplace


def build_app(settings: Settings) -> ASGIApp:
    """Return the application of a server."""
    guard = settings.guard
    templates = Templates(guard)
    place, runs = settings.place, settings.runs
    rooms = (
        RunPages(runs, templates, place.store.by_run),
        JobPages(place, templates, runs),
        DataPages(place, templates),
        Playground(place, templates, runs),
    )

    async def show_sign_in(request: Request) -> Response:
        if request.method == "POST":
            answer = await sign_in(guard, request)
            if answer:
                return answer
            return templates.page(request, "sign_in.html", 401, message="This is not the token.")
        return templates.page(request, "sign_in.html", message="")

    def sign_out(request: Request) -> Response:
        answer = RedirectResponse(SIGN_IN, 303)
        answer.delete_cookie(COOKIE)
        return answer

    def missing(request: Request, error: Exception) -> Response:
        return templates.problem(request, "There is no such page.", 404)

    def explained(request: Request, error: Exception) -> Response:
        if request.url.path.startswith(DATA):
            return JSONResponse({"error": str(error)}, 404)
        return templates.problem(request, str(error), 404)

    app = Starlette(
        routes=[
            Route(SIGN_IN, show_sign_in, methods=["GET", "POST"]),
            Route("/sign-out", sign_out, methods=["POST"]),
            *(route for room in rooms for route in room.routes()),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        exception_handlers={404: missing, NotThere: explained},
    )
    return Access(app, guard)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free port. ValueError if the address is not
    available."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error}; choose another with --port"
        ) from None


def address_of(listening: socket.socket) -> str:
    """Return the address to open in a browser."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"


def serve_pages(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until the process is told to end. Requests are not logged."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
