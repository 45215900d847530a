"""Prompts, as commands take them: words of the command line and lines of a file."""

import argparse
import os
import re

from mmdit.shipped import find

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=\S*")


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file that hold words. ValueError: it is not in UTF-8."""
    try:
        text = find(path).read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); save it so") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line, then those of the file. ValueError: there are none,
    or one is no text."""
    prompts = []
    for prompt in args.prompts:
        if OVERRIDE.fullmatch(prompt):
            raise ValueError(
                f"--prompts took {prompt!r}, which reads like an override: write "
                "overrides before --prompts"
            )
        try:
            prompts.append(
                os.fsencode(prompt).decode()
            )  # a locale of ASCII leaves bytes as they were
        except UnicodeError:
            raise ValueError(f"the prompt {prompt!r} is no text in UTF-8; write it anew") from None
    if args.prompts_file:
        prompts += read_lines(args.prompts_file)
    if not prompts:
        raise ValueError('no prompt: give --prompts "…" or --prompts_file FILE')
    return prompts
