"""Read the prompts of a command, from words of the command line and lines of a file."""

import argparse
import re
from pathlib import Path

from mmdit.config import parse_yaml
from mmdit.files import lines_of
from mmdit.posttrain.prompt_lists import read_prompt_list
from mmdit.shipped import find
from mmdit.terminal import typed_text
from mmdit.training.requests import Request, read_request

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=.*", re.DOTALL)


def _text(path: str) -> str:
    """Return the text of a file. ValueError if it is not UTF-8."""
    try:
        return find(path).read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); save it so") from None


def read_requests(path: str) -> list[Request]:
    """Return the requests in a file. A text file holds one prompt per line, `.jsonl` one JSON
    object per line, `.yaml` the list `prompts:` of texts and sections, `.json` a list as for
    post-training. ValueError names the line."""
    kind_of_file = Path(path).suffix.lower()
    if kind_of_file == ".jsonl":
        numbered = enumerate(map(str.strip, lines_of(_text(path))), 1)
        return [_of_json(line, f"{path}:{number}") for number, line in numbered if line]
    if kind_of_file == ".json":
        return [Request(caption) for caption in read_prompt_list(Path(path), "--prompts_file")]
    if kind_of_file not in (".yaml", ".yml"):
        lines = map(str.strip, lines_of(_text(path)))
        return [Request(line) for line in lines if line]
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


def _of_json(line: str, where: str) -> Request:
    """Return the request in a line of a `.jsonl` file. ValueError if the line holds no JSON
    object."""
    if not line.startswith("{"):
        raise ValueError(
            f'{where}: is no JSON object, like {{"prompt": "…"}}; a file with one prompt a line'
            " must end in .txt"
        )
    return read_request(line, where)


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file. ValueError if one has settings besides its text, or there are
    none. See `read_requests`."""
    requests = read_requests(path)
    for number, request in enumerate(requests):
        if request.overrides:
            raise ValueError(
                f"{path}: prompt {number} has settings of its own ({', '.join(request.overrides)}),"
                " which are not used here; leave them out"
            )
    if not requests:
        raise ValueError(f"{path} holds no prompt")
    return [request.prompt for request in requests]


def asked_for(args: argparse.Namespace) -> list[Request]:
    """Return the prompts of the command line, then those of the file. ValueError if there are none,
    or one is not text."""
    requests = []
    for prompt in args.prompts:
        if OVERRIDE.fullmatch(prompt):
            raise ValueError(
                f"--prompts took {prompt!r}, which reads like an override: write "
                "overrides before --prompts"
            )
        requests.append(Request(typed_text(prompt)))
    if args.prompts_file:
        requests += read_requests(args.prompts_file)
        if not requests:
            raise ValueError(f"there is no prompt in {args.prompts_file}")
    if not requests:
        raise ValueError('no prompt: give --prompts "…", --prompts_file FILE or --interactive')
    return requests
