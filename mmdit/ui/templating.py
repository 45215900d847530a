"""Pages from templates: every value is escaped, and every page knows the secret of its forms."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mmdit.ui.access import Guard


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

    def page(self, request: Request, name: str, status: int = 200, **values: Any) -> Response:
        """Return a page made of the template `name`."""
        common = {
            "form_secret": self.guard.form_secret,
            "needs_token": bool(self.guard.token),
            "here": request.url.path,
        }
        text = self.environment.get_template(name).render(common | values)
        return HTMLResponse(text, status)

    def problem(self, request: Request, message: str, status: int = 400) -> Response:
        """Return a page that says what is wrong."""
        return self.page(request, "problem.html", status, message=message)


def one(fields: dict[str, list[str]], name: str, usual: str = "") -> str:
    """Return the value of a field of a form, without blanks around it."""
    return fields.get(name, [usual])[0].strip()
