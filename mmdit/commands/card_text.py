"""Make pieces of Markdown from text that others wrote, so that nothing in it becomes a link, a
heading, HTML or the end of a block."""

from __future__ import annotations

import html
import re
import urllib.parse

from mmdit.terminal import plain

INLINE = re.compile(r"[\\`*_\[\]|~$!]|(?<=:)//|(?i:(?<=www)\.)")  # anywhere in a line
BEGINNING = re.compile(r"[#+=:-]|\d+[.)](?=\s|$)")  # at the beginning of a line: a heading, a list
LONGEST = 2000  # letters of a caption or a name, at most


def escaped(text: object) -> str:
    """Return Markdown that shows a text as it is, in one line."""
    line = " ".join(plain(str(text)).split())
    if len(line) > LONGEST:
        line = f"{line[:LONGEST]} …"
    line = INLINE.sub(r"\\\g<0>", line)
    begun = BEGINNING.match(line)
    if begun:
        line = f"{begun[0][:-1]}\\{begun[0][-1]}{line[begun.end() :]}"
    return html.escape(line, quote=True)


def fenced(text: str, language: str = "") -> str:
    """Return a text as a block of code, with a fence longer than any in the text."""
    text = plain(text).strip("\n")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(rows: list[list[str]]) -> str:
    """Return a table in Markdown; the first of `rows` is its header."""
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def picture(title: str, file: str) -> str:
    """Return Markdown for a picture whose file lies beside the page."""
    return f"![{escaped(title)}]({urllib.parse.quote(file)})"
