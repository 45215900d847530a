"""Restrict the files that the server reads, and that it lets commands read and write, to those
inside the folders that its user named, after following all links."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdit.config import FilePath, parse_yaml
from mmdit.data.dataset import records
from mmdit.data.dataset.inputs import NAMES
from mmdit.experiment.config_keys import options, sections
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.files import expanded, open_regular, real_path
from mmdit.shipped import find, shipped_path


class AllowedFolders:
    """The folders that are allowed. What ships with the package is allowed, too."""

    def __init__(self, folders: list[Path]):
        """Resolve the folders, which need not exist yet. ValueError if one is something else than a
        folder."""
        for folder in map(expanded, folders):
            if os.path.lexists(folder) and not folder.is_dir():
                raise ValueError(f"{folder} is no folder; name one with --runs and --allow")
        self.folders = [real_path(expanded(folder)) for folder in folders]

    def check(self, text: str, what: str = "the path") -> Path:
        """Return the path that a user wrote; it need not exist. ValueError if it, or a file that
        its records name, lies outside. `what` names it in errors."""
        if "\0" in text or not text:
            raise ValueError(f"{what} is {text!r}, must be the name of a file or folder")
        path = expanded(text)
        real = real_path(path)
        if any(real.is_relative_to(folder) for folder in self.folders):
            for metadata in metadata_at(real):
                self.check_records(metadata, what)
            return path
        shipped = shipped_path(path)
        if shipped and ".." not in path.parts and find(path).resolve() == shipped.resolve():
            return path
        allowed = ", ".join(map(str, self.folders))
        raise ValueError(
            f"{what} is {text}, which lies outside of the folders of this server ({allowed}): start"
            " `mmdit ui` with --allow FOLDER to let it in"
        )

    def check_records(self, path: Path, what: str) -> None:
        """Check the files that the lines of a metadata file name. ValueError if one lies outside.
        Any other fault is left to the command."""
        folders: set[str] = set()  # those already checked
        for number, key, text in named_files(path):
            named = os.path.join(path.parent, os.path.expanduser(text))
            folder = os.path.dirname(named)
            if folder not in folders or os.path.islink(named):
                self.check(named, f"{what}, line {number}: {key}")
            folders.add(folder)

    def check_text(self, text: str, what: str) -> None:
        """Check a path, or each path in `name=text,name=path`, the form of options that read files.
        (In options that write a file, the whole text is the path.)"""
        if "=" not in text or os.path.exists(text):
            self.check(text, what)
            return
        for part in text.split(","):
            held = part.rpartition("=")[2]
            if may_be_path(held):
                self.check(held, what)

    def check_config(self, config: Any) -> None:
        """Check every path in a decoded config. ValueError names the key."""
        for key, text in paths_in(config):
            self.check(text, key)

    def check_override(self, word: str) -> None:
        """Check an override `section.key=value` of a stored config. ValueError if it names a path
        outside, or is no override."""
        key, equals, text = word.partition("=")
        if not equals or not all(part.isidentifier() for part in key.split(".")):
            raise ValueError(f"{word!r} is not of the form section.key=value")
        value = parse_yaml(f"value: {text}")[0]["value"] if text else None
        for name, held in named_texts(key.rpartition(".")[2], value):
            if name in PATH_KEYS and may_be_path(held):
                self.check(held, key)


def metadata_at(path: Path) -> list[Path]:
    """Return the files of records that a command may read if it is given a path: the file itself,
    whatever its suffix, or the files in a folder that it finds by their names."""
    if os.path.isdir(path):
        return sorted(file for name in NAMES.values() for file in path.glob(f"*_{name}.jsonl"))
    if not os.path.isfile(path):
        return []
    with open_regular(path) as file:
        begins = file.read(1 << 12).lstrip(records.BLANK)
    return [path] if path.suffix == ".jsonl" or begins.startswith(b"{") else []


def named_files(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the paths that the records of a metadata file name, as (line number, key, path)."""
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            for key in RECORD_KEYS:
                if isinstance(row, dict) and isinstance(row.get(key), str):
                    yield number, key, row[key]


def may_be_path(text: str) -> bool:
    """Return whether a text may name a file, as opposed to a word with another meaning."""
    return bool(text) and (os.sep in text or text.startswith("~") or os.path.exists(text))


def paths_in(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of every path in a config."""
    if isinstance(config, tuple):
        for number, item in enumerate(config):
            yield from paths_in(item, f"{path}[{number}]")
    if not dataclasses.is_dataclass(config):
        return
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{path}.{field.name}".lstrip(".")
        if isinstance(value, str):
            if value and FilePath in options(hints[field.name]):
                yield key, value
        else:
            yield from paths_in(value, key)


def path_keys(cls: type, known: set[type] | None = None) -> set[str]:
    """Return the names of the keys that hold paths, in a section and in all sections that it can
    hold."""
    known = set() if known is None else known
    if cls in known:
        return set()
    known.add(cls)
    names: set[str] = set()
    for name, hint in typing.get_type_hints(cls).items():
        if FilePath in options(hint):
            names.add(name)
        for part in sections(hint):
            names |= path_keys(part, known)
    return names


def named_texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield every text in plain YAML data, with the name of its key."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from named_texts(name, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_texts(key, item)


PATH_KEYS = path_keys(ExperimentConfig)
RECORD_KEYS = [key for keys in records.PATH_KEYS.values() for key in keys]
