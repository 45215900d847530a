"""Share code between `mmdit push` and `mmdit pull`: the client of the Hugging Face hub, the files
that they handle, and errors in words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from mmdit.privacy import without_secrets

# The files that mmdit reads; `pull` takes no others. None of them can be executed.
READ = (".safetensors", ".json", ".yaml", ".yml", ".md", ".txt", ".png", ".webp", ".mp4")
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def open_hub() -> Any:
    """Return the client of the hub (of HF_ENDPOINT, if that is set), with the login of `hf auth
    login` or of HF_TOKEN. ValueError: huggingface_hub is not installed."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError(
            "push and pull need huggingface_hub: pip install 'mmdit[hf]', or pip install"
            " huggingface_hub"
        ) from None
    return HfApi()


def check_repository(name: str) -> None:
    """Raise ValueError unless `name` is a valid name of a repository."""
    if not REPOSITORY.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a repository: must be OWNER/NAME")


@contextlib.contextmanager
def explain_hub_errors(hub: Any, repository: str) -> Iterator[None]:
    """Turn errors of the network and the hub into a ValueError of one sentence, which never holds
    the token."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise ValueError(_login(repository)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise ValueError(_status(status, repository, hub, error)) from None
    except (errors.HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # about a file here: it is clear as it is
        raise ValueError(
            f"{_place(hub)} was not reached, or broke off ({_first_line(error, hub)}); the same"
            " command goes on from where it was"
        ) from None


def _login(repository: str) -> str:
    return (
        f"{repository} needs a login: run `hf auth login` once, or set HF_TOKEN (a token that may"
        " write, for push)"
    )


def _status(status: int, repository: str, hub: Any, error: Exception) -> str:
    if status == 401 and not _token(hub):
        return _login(repository)
    if status in (401, 403):
        return (
            f"your login may not do this with {repository} (status {status}): the token needs the"
            " right to write (push) or to read (pull), and you to be among its owners"
        )
    if status == 404:
        return (
            f"there is no {repository} at {_place(hub)}, or no such revision of it, or it is"
            " private and your login may not see it"
        )
    return f"{_place(hub)} answered with status {status}: {_first_line(error, hub)}"


def _first_line(error: Exception, hub: Any) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    token = _token(hub)
    return without_secrets(line.replace(token, "…") if token else line)[:300]


def _place(hub: Any) -> str:
    """Return the address of the hub, without the password that a mirror may need."""
    return without_secrets(hub.endpoint)


def _token(hub: Any) -> str | None:
    from huggingface_hub import get_token

    return hub.token or get_token()


def size_in_words(size: int) -> str:
    """Return a number of bytes as text."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
