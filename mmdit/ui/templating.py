"""Render pages from templates: every value is escaped, and every page knows the secret of its
forms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.filters import do_urlencode
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mmdit.ui.access import Guard


def utf8(text: str) -> str:
    """Return a text with "?" in place of characters that UTF-8 cannot encode, which names of files
    may contain."""
    return text.encode("utf-8", "replace").decode()


def address_part(value: str | dict[str, str]) -> str:
    """Return a text encoded as a part of an address, or a mapping as its query."""
    if isinstance(value, dict):
        return do_urlencode({name: utf8(text) for name, text in value.items()})
    return do_urlencode(utf8(value))


class NotThere(Exception):
    """Raised if the thing that an address names does not exist."""


@contextlib.contextmanager
def or_not_there() -> Iterator[None]:
    """Turn a ValueError about what a request names into NotThere."""
    try:
        yield
    except ValueError as error:
        raise NotThere(str(error)) from None


class Templates:
    """The templates of the package, rendered for one server."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self.environment = Environment(
            loader=PackageLoader("mmdit.ui", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters["urlencode"] = address_part

    def page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        """Return a page rendered from the template `name`."""
        common = {
            "form_secret": self.guard.form_secret,
            "needs_token": bool(self.guard.token),
            "here": request.url.path,
        }
        text = self.environment.get_template(name).render(common | values)
        return HTMLResponse(utf8(text), status)

    def problem(self, request: Request, message: str, status: int = 400) -> Response:
        """Return a page that says what is wrong."""
        return self.page(request, "problem.html", status, message=message)
