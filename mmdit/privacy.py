"""Find what a file must not say when it is handed on: paths of this machine, and secrets.

`portable_config` and `without_paths` take such paths out of what is written; `private_parts` finds
what is left, before something is sent.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# Keys whose paths are needed to load a model again: these paths stay, with `~` for the home folder.
NEEDED = (
    "tokenizer.name_or_path",
    "tokenizer.repo_path",
    "tokenizer.latent_stats",
    "text_encoder.name_or_path",
    "text_encoder.tokenizer_path",
    "model.name_or_path",
    "model.clip",
)
# Keys that hold words. These decide what is drawn, and are no paths even if they begin like one.
WORDS = (
    "captions.trigger",
    "captions.separator",
    "captions.trim_keywords",
    "train.sample_prompts",
    "train.sample_negative_prompt",
)
ABSOLUTE = re.compile(r"/(?!/)|~|[A-Za-z]:[\\/]|\\\\|file:/")
_PART = r"[^\s/\\\"'`<>|:;,()\[\]{}*?$&]"
_POSIX = rf"(?:/{_PART}+)+/?"
_WINDOWS = rf"[A-Za-z]:(?:[\\/]+{_PART}+)+[\\/]*"
# A path within a text; a match must not begin inside an address, a date, a fraction or a word with
# a slash.
PATH = re.compile(rf"(?<![\w/.:<~*)&;\\-])(?:(?:file://|~)?{_POSIX}|{_WINDOWS})")
ROOTS = re.compile(  # top-level folders of common machines
    "home|root|Users|Volumes|private|mnt|media|data|scratch|lustre|gpfs|nfs|tmp|var|opt|srv|usr|etc"
    "|work|workspaces?|projects?|content|kaggle|storage"
)
HOMES = ("/home", "/Users", "C:\\Users")
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_\w{30,}"
    r"|github_pat_\w{30,}|xox[abprs]-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|wandb_v1_\w{20,})"
    r"|\b[a-z]+://[^\s/:@]+:[^\s/@]+@"
)
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY")
SHORTEST_SECRET = 12  # shorter values of such variables are ordinary words


def is_local(text: str) -> bool:
    """Return whether the whole of a text is an absolute path of some machine, or a path that begins
    at a home folder."""
    return ABSOLUTE.match(text) is not None


def last_part(path: str) -> str:
    """Return the last part of a path of any operating system; of a home folder not its name, but
    "folder"."""
    windows = re.match(r"[A-Za-z]:|\\\\", path)
    place = PureWindowsPath(path) if windows else PurePosixPath(path)
    return "folder" if str(place.parent) in HOMES else place.name or "folder"


def local_values(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of every value in plain data for which `is_local` holds,
    except those of `WORDS`."""
    if path in WORDS:
        return
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from local_values(value, f"{path}.{key}".lstrip("."))
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            yield from local_values(value, f"{path}[{number}]")
    elif isinstance(config, str) and is_local(config):
        yield path, config


def portable_config(config: dict, needed: tuple[str, ...] = ()) -> dict:
    """Return a config, as plain data, without the places where files lie on this machine: only the
    last part of each path stays. The paths of the keys `needed` stay whole, with `~` for the home
    folder, so `local_values` still finds them. The texts of `WORDS` stay as they are."""
    return _portable(config, "", needed)


def _portable(value: Any, path: str, needed: tuple[str, ...]) -> Any:
    if path in WORDS:
        return value
    if isinstance(value, Mapping):
        return {
            key: _portable(item, f"{path}.{key}".lstrip("."), needed) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_portable(item, path, needed) for item in value]
    if not isinstance(value, str) or not is_local(value):
        return value
    return from_home(value) if path in needed else last_part(value)


def from_home(text: str) -> str:
    """Return a text with `~` in place of the path of the home folder."""
    home = os.path.expanduser("~")
    if home in ("~", "/"):
        return text
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)


def without_paths(text: str) -> str:
    """Return a text in which every absolute path is cut to its last part."""
    return PATH.sub(lambda match: last_part(match[0]), from_home(text))


def portable_command(command: str) -> str:
    """Return a shell command in which every absolute path is cut to its last part; it can still be
    typed."""
    return shlex.join(_portable_word(word) for word in shlex.split(command))


def _portable_word(word: str) -> str:
    option, equals, value = word.rpartition("=")
    if is_local(value):
        return f"{option}{equals}{last_part(value)}"
    return without_paths(word)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secrets() -> list[str]:
    """Return the values of the environment variables that are secret by their names."""
    return [
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name.upper()) and len(value) >= SHORTEST_SECRET and value[0] != "/"
    ]


def without_secrets(text: str) -> str:
    """Return a text with `<secret>` in place of tokens and of the values of secret environment
    variables."""
    for secret in secrets():
        text = text.replace(secret, "<secret>")
    return TOKEN.sub("<secret>", text)


def private_parts(text: str, known_secrets: list[str]) -> list[str]:
    """Return what a text gives away, each in words: paths of this machine, tokens (which are not
    repeated), and any of `known_secrets`."""
    said = []
    if TOKEN.search(text):
        said.append("what looks like a token or a password")
    if any(secret in text for secret in known_secrets):
        said.append("the value of an environment variable that is secret by its name")
    home = os.path.expanduser("~")
    if home not in ("~", "/") and re.search(rf"{re.escape(home)}(?![\w-])", text):
        said.append("your home folder")
    for match in PATH.finditer(text):
        path = match[0].removeprefix("file://")
        if path.startswith("~") or (path.startswith("/") and not _is_here(path)):
            continue
        said.append(f"the path {path[:200]}")
        break
    return said


def _is_here(path: str) -> bool:
    """Return whether an absolute path may belong to this machine, or to one like it."""
    first, *rest = path.strip("/").split("/")
    return bool(rest) and bool(ROOTS.fullmatch(first) or Path(f"/{first}").is_dir())
