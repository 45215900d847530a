"""The names of all commands, what each says of itself, without importing any, and how one is
advised."""

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
)  # modules of the folder that are no commands
SHORT = {
    "train_t2v": "train",
    "cache_vtp_images": "cache-images",
    "cache_vtp_latents": "cache-latents",
}


def commands() -> dict[str, str]:
    """Return the name of every subcommand and of the module in `mmdit.scripts` that it runs."""
    modules = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem not in HELPERS)
    return {SHORT.get(module, module.replace("_", "-")): module for module in modules}


@cache
def summary(module: str) -> str:
    """Return the first sentence of what a command says of itself, without importing it."""
    tree = ast.parse((SCRIPTS / f"{module}.py").read_text(encoding="utf-8"))
    paragraph = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def advised(*words: object) -> str:
    """Return the command `mmdit WORDS` for a person to type, who fills in what is `…`."""
    quoted = [word if word == "…" else shlex.quote(str(word)) for word in words]
    return " ".join(["mmdit", *map(str, quoted)])


def advised_caching(path: object, pictures: bool) -> str:
    """Return the command that caches the pictures, or the clips, of a JSONL file."""
    command = "cache-images" if pictures else "cache-latents"
    return advised(command, "--config", "…", "--meta_jsonl", path, "--out_dir", "…")
