"""Fetch a model from a repository of the Hugging Face hub, at one commit: only files that mmdit
reads, each checked against its check sum. Nothing of it is executed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from mmdit.commands.exported import Exported, commands_for
from mmdit.commands.hub import READ, check_repository, explain_hub_errors, open_hub, size_in_words
from mmdit.commands.push import front_matter
from mmdit.files import flush_to_disk, hashed, lock, refuse_link, remove
from mmdit.foreign import read_json
from mmdit.interop.wan_weights import expert_in_name
from mmdit.terminal import shown
from mmdit.training.samples import check_writable
from mmdit.weights import INDEX

PART = ".pulling-{}.part"  # name of an unfinished file, with its check sum
WEIGHTS = (".safetensors", INDEX)
SHOWN = 8


@dataclass
class Pull:
    """A repository at one `commit`: `files` that will be fetched, by name, with the hub's
    information on each, and the names of those `left_out`."""

    repository: str
    out: Path
    revision: str = "main"
    commit: str = field(default="", init=False)
    files: dict[str, Any] = field(default_factory=dict, init=False)
    left_out: list[str] = field(default_factory=list, init=False)

    def __post_init__(self):
        check_repository(self.repository)
        self.hub = open_hub()
        with explain_hub_errors(self.hub, self.repository):
            self.commit = self.hub.model_info(self.repository, revision=self.revision).sha
            tree = self.hub.list_repo_tree(self.repository, recursive=True, revision=self.commit)
            for entry in tree:
                if not hasattr(entry, "blob_id"):
                    continue  # an entry for a folder
                if is_read(entry.path):
                    self.files[entry.path] = entry
                else:
                    self.left_out.append(shown(entry.path))
        if not self.files:
            raise ValueError(f"{self.repository} holds none of the files that mmdit reads")

    def fetch(self, replace: bool) -> Iterator[str]:
        """Fetch the files that are not here yet, and yield a line for each. ValueError if a file of
        another content is here and may not be replaced, or one arrived damaged."""
        missing = [name for name in self.files if not self._is_there(name)]
        taken = [name for name in missing if (self.out / name).exists()]
        if taken and not replace:
            raise ValueError(
                f"{self.out} holds {len(taken)} files of other content ({', '.join(taken[:3])}):"
                " choose another --out, or give --replace"
            )
        for name in missing:
            self._fetch(name)
            yield f"  {size_in_words(self.files[name].size):>10}  {name}"
        if kept := len(self.files) - len(missing):
            yield f"  {kept} files were there already"
        for part in self.out.glob(PART.format("*")):  # left by fetching other commits
            with contextlib.suppress(ValueError), refuse_link(part).open("ab") as file:
                lock(file)  # fails if another call is fetching it
                remove(part)

    def others(self) -> list[str]:
        """Return the names of weight files and indices that lie beside those of this commit but do
        not belong to it: they are of another revision, or of somebody else."""
        folders = {(self.out / name).parent for name in self.files if name.endswith(WEIGHTS)}
        there = [path for folder in folders for path in folder.iterdir() if not path.is_dir()]
        names = [path.relative_to(self.out).as_posix() for path in there]
        return sorted(name for name in names if name.endswith(WEIGHTS) and name not in self.files)

    def _fetch(self, name: str) -> None:
        """Fetch one file, continuing where an earlier call was interrupted. It gets its name only
        when it is complete and its check sum is that of the hub."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        entry, target = self.files[name], self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = refuse_link(self.out / PART.format(_expected(entry)[:32]))
        url = hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.hub.endpoint)
        with part.open("ab") as file:
            lock(file, f"another process is fetching {name} into {self.out}: wait for it")
            begun = file.tell() if file.tell() <= entry.size else 0
            file.truncate(begun)
            with explain_hub_errors(self.hub, self.repository):
                http_get(
                    url,
                    file,
                    resume_size=begun,
                    headers=build_hf_headers(library_name="mmdit"),
                    expected_size=entry.size,
                    displayed_filename=name,
                )
        if not _is_whole(part, entry):
            remove(part)
            raise ValueError(
                f"{name} arrived with another check sum than {self.repository} says: it is thrown"
                " away; try again"
            )
        flush_to_disk(part)
        os.replace(part, target)

    def _is_there(self, name: str) -> bool:
        """Return whether a file is here with the content that the hub has. ValueError: a link is in
        the way, a folder where the file belongs, or a file where a folder does."""
        path = self.out
        for part in PurePosixPath(name).parts:
            if path.is_file():
                raise ValueError(f"{path} is a file, but {name} belongs there: remove it")
            path = refuse_link(path / part)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, but a file belongs there: remove it")
        return path.is_file() and _is_whole(path, self.files[name])


def _expected(entry: Any) -> str:
    """Return the check sum of a file on the hub: the SHA-256 for large files, git's for others."""
    return entry.lfs.sha256 if entry.lfs is not None else entry.blob_id


def _is_whole(path: Path, entry: Any) -> bool:
    if path.stat().st_size != entry.size:
        return False
    begun = hashlib.sha1(f"blob {entry.size}\0".encode()) if entry.lfs is None else hashlib.sha256()
    with path.open("rb") as file:
        return hashed(begun, file).hexdigest() == _expected(entry)


OF_EXPERT = re.compile(r"\bthe (high|low)-noise expert of ")  # in cards of `mmdit export`


def is_read(name: str) -> bool:
    """Return whether a file of a repository is fetched: mmdit reads files of this type, and its
    name cannot lead out of the folder."""
    path = PurePosixPath(name)
    odd = "\\" in name or ":" in name or name != shown(name) or path.is_absolute()
    hidden = any(part.startswith(".") for part in path.parts)
    return not odd and not hidden and path.suffix.lower() in READ


def recognise(path: Path) -> Exported | None:
    """Return what a file or a folder is, as far as commands depend on it; None if it is nothing
    that can be used by itself, or cannot be read."""
    try:
        return _recognised(path)
    except (SafetensorError, ValueError, OSError, AttributeError, TypeError, RecursionError):
        return None


def _recognised(path: Path) -> Exported | None:
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and any(path.glob("adapter_model.*")):
            return Exported(path, "peft", {}, None, None, 0, is_lora=True)
        if (path / "transformer/config.json").is_file():
            return _transformer(path, path / "transformer/config.json", "release")
        return _transformer(path, path / "config.json", "official")
    with safe_open(path, "pt") as stored:
        said, names = (stored.metadata() or {}).get("mmdit"), list(stored.keys())
    if said is not None:
        config = json.loads(said)["config"]
        sections = {key: value for key, value in config.items() if isinstance(value, dict)}
        return Exported(path, "mmdit", sections, None, None, 0)
    lora = any("lora" in name or "lokr" in name for name in names)
    return Exported(path, "lora", {}, None, None, 0, is_lora=True) if lora else None


def _transformer(path: Path, config: Path, form: str) -> Exported | None:
    """Return what the folder `path` is, from the config of its transformer; None if that is not
    Wan's. ValueError if it cannot be read."""
    row = read_json(config, "config of a network")
    if row.get("_class_name") not in ("WanModel", "WanTransformer3DModel"):
        return None
    picture = ""
    if row.get("in_channels", 0) > row.get("out_channels", math.inf):
        picture = "first_last" if row.get("pos_embed_seq_len") else "first"
    return Exported(path, form, {"tokenizer": {"picture": picture}}, None, None, 0)


def uses_of(out: Path, others: Container[str] = ()) -> list[str]:
    """Return commands that use what was fetched into a folder; `others` are files there that were
    not fetched."""
    card, base, expert = out / "README.md", "", None
    if card.is_file():
        with contextlib.suppress(ValueError):  # somebody else's card, which is then ignored
            text = card.read_text(encoding="utf-8", errors="replace")
            base = front_matter(text).get("base_model", "")
            expert = OF_EXPERT.search(text)
    lines: list[str] = []
    fetched = [path for path in sorted(out.glob("*.safetensors")) if path.name not in others]
    for path in [out, *fetched]:
        what = recognise(path)
        if what is not None and expert:
            what = replace(what, expert=expert[1])
        elif what is not None and what.is_lora and "A14B" in str(base):
            what = replace(what, expert=expert_in_name(path))
        if what is not None:
            lines += commands_for(what, base, "a prompt", str(path))
            if path == out:
                break  # the files belong to it
    return lines


def pull(repository: str, out: Path | None, revision: str, replace: bool) -> Iterator[str]:
    """Fetch a repository, and yield lines to print meanwhile."""
    check_repository(repository)
    out = refuse_link(out or Path(repository.rpartition("/")[2]))
    check_writable(out, folder=True)
    wanted = Pull(repository, out, revision)
    total = size_in_words(sum(entry.size for entry in wanted.files.values()))
    yield (
        f"{repository} at commit {wanted.commit} ({revision}): {len(wanted.files)} files, {total},"
        f" into {out}"
    )
    if wanted.left_out:
        names = ", ".join(wanted.left_out[:SHOWN])
        yield f"  left out, for mmdit does not read them: {names}"
    if not any(name.endswith(WEIGHTS) for name in wanted.files):
        yield "  no weights come: none of its files is one of safetensors, the only ones fetched"
    yield from wanted.fetch(replace)
    if others := wanted.others():
        yield (
            f"  {len(others)} files of weights there are not of this commit:"
            f" {', '.join(map(shown, others[:SHOWN]))}; they may be read in place of what came, or"
            " beside it: remove them, or choose another --out"
        )
    yield from (f"next: {line}" for line in uses_of(out, others))
