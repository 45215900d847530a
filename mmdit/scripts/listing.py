"""List the names of all commands and their summaries, without importing any, and write commands for
the user to type."""

from __future__ import annotations

import ast
import shlex
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
HELPERS = (
    "__init__",
    "arguments",
    "data_arguments",
    "idle",
    "metric_arguments",
    "listing",
    "parsers",
    "prompts",
)  # modules in the folder that are not commands
SHORT = {
    "train_t2v": "train",
    "cache_vtp_images": "cache-images",
    "cache_vtp_latents": "cache-latents",
}


def commands() -> dict[str, str]:
    """Return the names of all subcommands, each with the module in `mmdit.scripts` that it runs."""
    modules = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem not in HELPERS)
    return {SHORT.get(module, module.replace("_", "-")): module for module in modules}


@cache
def summary(module: str) -> str:
    """Return the first sentence of a command's docstring, without importing the module."""
    tree = ast.parse((SCRIPTS / f"{module}.py").read_text(encoding="utf-8"))
    paragraph = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def advised(*words: object) -> str:
    """Return the command `mmdit WORDS` for the user to type; `…` stands for what the user must fill
    in."""
    quoted = [word if word == "…" else shlex.quote(str(word)) for word in words]
    return " ".join(["mmdit", *map(str, quoted)])


def advised_caching(path: object, pictures: bool) -> str:
    """Return the command that caches the pictures, or the clips, of a JSONL file."""
    command = "cache-images" if pictures else "cache-latents"
    return advised(command, "--config", "…", "--meta_jsonl", path, "--out_dir", "…")
