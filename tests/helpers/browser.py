"""A browser interface in this process, asked without a socket."""

import re
from pathlib import Path

from starlette.testclient import TestClient

from mmdit.scripts import ui
from mmdit.ui.access import guard_for
from mmdit.ui.allowed_folders import AllowedFolders
from mmdit.ui.job_files import JobStore
from mmdit.ui.job_requests import Workplace
from mmdit.ui.server import Settings, build_app


def workplace(runs: Path) -> Workplace:
    """Return the jobs of a server that may use the folder around its runs."""
    return Workplace(JobStore(runs), AllowedFolders([runs, runs.parent]), ui.offers())


def browser(runs: Path, token: str = "", names=()) -> TestClient:
    """Return a browser that has opened nothing yet."""
    settings = Settings(runs, guard_for(token, names), workplace(runs))
    app = build_app(settings)
    return TestClient(app, base_url="http://127.0.0.1:7861", follow_redirects=False)


def secret_of(page: str) -> str:
    """Return the secret of the forms in a page."""
    return re.search(r'name="form_secret" value="([^"]+)"', page)[1]


def send(client: TestClient, path: str, **fields):
    """Send a form as a page of the server does."""
    secret = secret_of(client.get("/playground").text)
    return client.post(path, data=fields | {"form_secret": secret})
