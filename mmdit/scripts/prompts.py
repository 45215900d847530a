"""Prompts, as commands take them: words of the command line and lines of a file."""

import argparse
import os
import re
from pathlib import Path

from mmdit.config import parse_yaml
from mmdit.files import lines_of
from mmdit.shipped import find
from mmdit.training.requests import Request, read_request

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=\S*")


def _text(path: str) -> str:
    """Return the text of a file. ValueError: it is not in UTF-8."""
    try:
        return find(path).read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); save it so") from None


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file that hold words. ValueError: it is not in UTF-8."""
    return [line.strip() for line in lines_of(_text(path)) if line.strip()]


def read_requests(path: str) -> list[Request]:
    """Return what a file asks for: of text a prompt a line; of `.jsonl` a JSON object a line; of
    `.yaml` the list `prompts:`, of texts and of sections. ValueError names the line."""
    kind_of_file = Path(path).suffix.lower()
    if kind_of_file == ".jsonl":
        lines = enumerate(lines_of(_text(path)), 1)
        return [read_request(line.strip(), f"{path}:{i}") for i, line in lines if line.strip()]
    if kind_of_file not in (".yaml", ".yml"):
        return [Request(line) for line in read_lines(path)]
    mapping, numbers = parse_yaml(_text(path), path)
    listed = mapping.get("prompts")
    if not isinstance(listed, list) or len(mapping) > 1:
        raise ValueError(
            f"{path} holds {', '.join(mapping) or 'nothing'}, must hold one list, prompts: [text"
            " or section, …]"
        )
    return [
        Request.read(value, f"{path}:{numbers[f'prompts[{i}]']}") for i, value in enumerate(listed)
    ]


def asked_for(args: argparse.Namespace) -> list[Request]:
    """Return the prompts of the command line, then those of the file. ValueError: there are none,
    or one is no text."""
    requests = []
    for prompt in args.prompts:
        if OVERRIDE.fullmatch(prompt):
            raise ValueError(
                f"--prompts took {prompt!r}, which reads like an override: write "
                "overrides before --prompts"
            )
        try:
            # a locale of ASCII leaves bytes as they were
            requests.append(Request(os.fsencode(prompt).decode()))
        except UnicodeError:
            raise ValueError(f"the prompt {prompt!r} is no text in UTF-8; write it anew") from None
    if args.prompts_file:
        requests += read_requests(args.prompts_file)
    if not requests:
        raise ValueError('no prompt: give --prompts "…", --prompts_file FILE or --interactive')
    return requests
