"""Lists of prompts for post-training, and reading those that a user has written into a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit.config import ConfigError, holds_half_a_pair, parse_yaml
from mmdit.foreign import explain_errors


@dataclass(frozen=True)
class Prompts:
    """A list of prompts. `facts`: what a generated data set knows about each prompt, for rewards
    that need it. `written`: the whole list of the file, of which these are the prompts to train on;
    None if they are all of it."""

    captions: list[str]
    facts: list[Any] | None = None
    written: list[str] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def at(self, places: list[int]) -> Prompts:
        """Return the prompts at these places of the list."""
        facts = [self.facts[i] for i in places] if self.facts else None
        return Prompts([self.captions[i] for i in places], facts)


def written_prompts(path: Path, held: int) -> tuple[Prompts, dict[str, Prompts]]:
    """Return the prompts of a file to train on, and by name those to evaluate on: `seen` and
    `held_out`, at most `held` of each. If there are 16 different prompts or more, every eighth of
    these is held out, wherever it occurs. A prompt that occurs twice is trained on twice."""
    captions = read_prompt_list(path)
    if not held:
        return Prompts(captions), {}
    different = list(dict.fromkeys(captions))
    if len(different) < 16:
        return Prompts(captions), {"seen": Prompts(different[:held])}
    held_out = dict.fromkeys(different[::8])
    trained = [caption for caption in captions if caption not in held_out]
    seen = list(dict.fromkeys(trained))
    return Prompts(trained, written=captions), {
        "seen": Prompts(seen[:held]),
        "held_out": Prompts(list(held_out)[:held]),
    }


def read_prompt_list(path: Path, key: str = "posttrain.prompts") -> list[str]:
    """Return the prompts of a file: YAML `prompts: [text, …]` or JSON `[{"caption": text}, …]`.
    ConfigError for any other content; `key` is the config key or option that named the file."""
    try:
        with explain_errors(path, "list of prompts"):
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".json":
                captions = [row["caption"] for row in json.loads(text)]
            else:
                mapping = parse_yaml(text, str(path))[0]
                captions = mapping.pop("prompts", None)
                if mapping:
                    raise ValueError(f"beside prompts it holds {', '.join(mapping)}: remove that")
            if not (isinstance(captions, list) and captions):
                raise ValueError("it holds no list")
            for place, caption in enumerate(captions):
                if not isinstance(caption, str):
                    raise ValueError(f"prompt {place} is {caption!r}, must be text (in quotes)")
                if holds_half_a_pair(caption):
                    raise ValueError(f"prompt {place} holds half a surrogate pair; write it anew")
    except ValueError as error:
        raise ConfigError(
            key,
            f"is {str(path)!r}, which cannot be read ({error}); must be a YAML file with prompts:"
            ' [text, …], or a JSON file [{"caption": text}, …]',
        ) from None
    return captions
