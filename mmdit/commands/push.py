"""Send an export to a repository of the Hugging Face hub, after checking each file: nothing is sent
that could run code, is of use only here, or is private."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from safetensors import SafetensorError, safe_open

from mmdit.commands.export_card import card_path, export_name
from mmdit.commands.hub import READ, check_repository, explain_hub_errors, open_hub, size_in_words
from mmdit.files import refuse_link
from mmdit.privacy import local_values, private_parts, secrets, without_secrets
from mmdit.training.media import words_in
from mmdit.weights import PICKLES

PICKLED = (*PICKLES, ".ckpt", ".pkl", ".pickle", ".npy", ".joblib")
OF_RUNS = ("optimizer.safetensors", "signs.safetensors", "checkpoint.json", "monitor.json")
OF_RUNS += ("metrics.jsonl", "starts.jsonl")
TEXTS = (".json", ".yaml", ".yml", ".md", ".txt", ".py")
PIPELINE = "model_index.json"  # beside it there may be code, which users choose to run
LARGEST_TEXT = 64 << 20
LARGEST_HEAD = 1 << 18  # of a card's head: the parser takes seconds for it
TEXT = "tag:yaml.org,2002:str"
SHOWN = 12  # problems that one message lists, at most


@dataclass
class Push:
    """The files of an export, by the names that they get in the repository. ValueError if there is
    nothing to send, no card, or a file that must not be sent."""

    target: Path
    files: dict[str, Path] = field(default_factory=dict, init=False)
    left_out: list[str] = field(default_factory=list, init=False)
    license: str = field(default="", init=False)

    def __post_init__(self):
        if self.target.is_dir():
            self._take_folder()
        elif self.target.is_file():
            self._take_file()
        else:
            raise ValueError(f"{self.target} is not there: give a file or a folder of mmdit export")
        self._look_at_files()
        if "README.md" not in self.files:
            raise ValueError(
                f"{self.target} has no model card ({card_path(self.target)}), which says how it was"
                " made and under which licence it stands: mmdit export writes one"
            )
        self.license = self._read_license()

    def _look_at_files(self) -> None:
        """Raise ValueError if there are files that must not be sent."""
        known, pipeline = secrets(), PIPELINE in self.files
        problems = [
            f"{name}: {problem}"
            for name, path in self.files.items()
            for problem in problems_of(name, path, known, pipeline)
        ]
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            listed = "\n  ".join([*problems[:SHOWN], *more])
            raise ValueError(f"nothing is sent, for there is in {self.target}\n  {listed}")

    def _take_file(self) -> None:
        """Collect a file, its card, and the pictures that the card shows. Other pictures with such
        names belong to an earlier export, perhaps of another model."""
        self.files[self.target.name] = self.target
        card, text = card_path(self.target), ""
        if card.is_file():
            self.files["README.md"] = card
            text = unquote(card.read_text(encoding="utf-8", errors="replace"))
        for ending in ("curves.png", "samples.webp", "clips.webp"):
            beside = self.target.with_name(f"{export_name(self.target)}-{ending}")
            if beside.is_file() and beside.name in text:
                self.files[beside.name] = beside
        for path in self.files.values():
            refuse_link(path)

    def _take_folder(self) -> None:
        """Collect all files of a folder, except hidden ones."""
        for path in sorted(self.target.rglob("*")):
            name = path.relative_to(self.target).as_posix()
            if any(part.startswith(".") for part in Path(name).parts):
                self.left_out.append(name)
                continue
            refuse_link(path)
            if path.is_file():
                self.files[name] = path

    def _read_license(self) -> str:
        """Return the licence that the card states, or "not stated" if it says so. ValueError if it
        says neither."""
        text = self.files["README.md"].read_text(encoding="utf-8")
        front = front_matter(text)
        if "license" in front:
            return front["license"]
        if "not stated" in text:
            return "not stated"
        raise ValueError(
            f"{self.files['README.md']} states no licence: export with card.license=NAME, write"
            " `license: NAME` into its head, or say in it that the licence is not stated"
        )

    def lines(self) -> Iterator[str]:
        """Yield lines on what is sent."""
        for name, path in self.files.items():
            origin = "" if path.name == Path(name).name else f"  (from {path.name})"
            yield f"  {size_in_words(path.stat().st_size):>10}  {name}{origin}"
        yield f"  licence: {self.license}"
        if self.left_out:
            yield f"  left out, for they are hidden: {', '.join(self.left_out[:SHOWN])}"
        if code := [name for name in self.files if name.endswith(".py")]:
            yield f"  {code[0]} is code, which runs where somebody chooses to trust it"

    def send(self, repository: str, public: bool, message: str) -> str:
        """Send all files as one commit, and return its address. The repository is created if it
        does not exist. ValueError if it is public but `public` is false, or the reverse, or if the
        hub refuses."""
        check_repository(repository)
        hub = open_hub()
        from huggingface_hub import CommitOperationAdd

        with explain_hub_errors(hub, repository):
            hub.create_repo(repository, private=not public, exist_ok=True)
            is_public = not hub.repo_info(repository).private
            if is_public and not public:
                raise ValueError(
                    f"{repository} is public: give --public to send it there, or choose another"
                )
            if public and not is_public:
                raise ValueError(
                    f"{repository} is private: leave out --public, or make it public on its page"
                )
            operations = [CommitOperationAdd(name, str(path)) for name, path in self.files.items()]
            made = hub.create_commit(repository, operations, commit_message=message)
            return without_secrets(str(made.commit_url))


def front_matter(text: str) -> dict[str, str]:
    """Return the texts in the head of a card by their keys. Numbers, lists and the like are left
    out, and never constructed, as they could be anything. ValueError if the head cannot be read."""
    if not text.startswith("---\n") or "\n---\n" not in text[3:]:
        return {}
    head = text[4 : text.index("\n---\n", 3) + 1]
    if len(head) > LARGEST_HEAD:
        raise ValueError(f"the head of the card has more than {LARGEST_HEAD} letters")
    try:
        node = yaml.compose(head, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"the head of the card is no YAML: {str(error)[:1000]}") from None
    rows = node.value if isinstance(node, yaml.MappingNode) else []
    return {
        key.value: value.value
        for key, value in rows
        if key.id == value.id == "scalar" and value.tag == TEXT
    }


def problems_of(name: str, path: Path, known: list[str], pipeline: bool) -> list[str]:
    """Return the reasons why a file must not be sent; empty if there are none. `known`: secrets to
    search for; `pipeline`: it lies in a folder of Diffusers, which may hold code."""
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        return ["is a pickle, which may run code where it is loaded; export it as safetensors"]
    if path.name in OF_RUNS or "optimizer" in Path(name).parts:
        return ["is of a run or a checkpoint with the state of its training: send an export"]
    if path.name in ("manifest.json", "items.jsonl") or suffix in (".tar", ".parquet", ".jsonl"):
        return ["is of a cache or a data set, which are not models"]
    if suffix not in READ and path.name != "LICENSE" and not (pipeline and suffix == ".py"):
        return [f"is none of the files that a model consists of ({', '.join(READ)})"]
    if suffix == ".safetensors":
        return _problems_of_weights(path, known)
    if suffix in TEXTS or path.name == "LICENSE":
        try:
            return private_parts(_text_of(path), known)
        except UnicodeDecodeError as error:  # nothing could be found in it
            return [f"is no text in UTF-8 (byte {error.start}); write it anew"]
    try:
        return private_parts("\n".join(words_in(path)), known)
    except (OSError, ValueError, SyntaxError) as error:
        return [f"cannot be read: {error}"]


def _problems_of_weights(path: Path, known: list[str]) -> list[str]:
    try:
        with safe_open(path, "pt") as stored:
            metadata, names = stored.metadata() or {}, list(stored.keys())
    except (SafetensorError, OSError) as error:
        return [f"cannot be read as safetensors: {error}"]
    if any(name.endswith((".exp_avg", ".exp_avg_sq", ".momentum_buffer")) for name in names):
        return ["holds the state of an optimizer: send an export"]
    problems = []
    for key, value in metadata.items():
        said = private_parts(value, known)
        if key == "mmdit":
            places = list(local_values(_config_of(value)))
            said = [
                f"{place} = {text}, which others do not have: export it with {place}=PLACE"
                for place, text in places
            ] or said
        problems += [f"its metadata hold {what}" for what in said]
    return problems


def _config_of(text: str) -> Any:
    try:
        return json.loads(text).get("config", {})
    except (ValueError, AttributeError, RecursionError):
        return {}


def _text_of(path: Path) -> str:
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path} has more than {LARGEST_TEXT} bytes, too many for a text")
    return path.read_bytes().decode("utf-8")


def push(
    target: Path, repository: str, public: bool, message: str, dry_run: bool = False
) -> Iterator[str]:
    """Check an export, show what is sent, and send it; yield lines to print meanwhile."""
    check_repository(repository)
    sent = Push(target)
    where = "public" if public else "private"
    yield "\n".join([f"{target} to {repository} ({where}):", *sent.lines()])
    if dry_run:
        yield "nothing is sent (--dry_run)"
        return
    yield f"sent: {sent.send(repository, public, message)}"
