"""Prompts of post-training: generated moving-shapes captions with their facts, or a file of
people's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmdit.config import ConfigError, parse_yaml
from mmdit.data.moving_shapes.captions import PROMPTS, caption, prompts
from mmdit.data.moving_shapes.facts import Facts, draw
from mmdit.rng import key

GENERATED = "moving_shapes"  # the source of prompts that come with their facts


@dataclass(frozen=True)
class Prompts:
    captions: list[str]
    facts: list[Facts] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def at(self, places: list[int]) -> Prompts:
        return Prompts(
            [self.captions[i] for i in places], self.facts and [self.facts[i] for i in places]
        )


def load_prompts(
    source: str, count: int, seed: int, video: bool, width: int, height: int, held: int
) -> tuple[Prompts, dict[str, Prompts]]:
    """To train on, and by name to evaluate on: `seen` and `held_out`, at most `held` of each. Of a
    file every eighth prompt is held out, when it has 16 or more."""
    size = {"video": video, "width": width, "height": height}
    if source == GENERATED:
        drawn = key("posttrain prompts", seed)
        facts = draw(drawn, range(count), split="train", **size)
        train = Prompts(
            [caption(item, drawn, i, complete=True) for i, item in enumerate(facts)], facts
        )
        fixed = {name: prompts(name, **size)[: min(held, PROMPTS)] for name in ("seen", "held_out")}
        fixed = fixed if held else {}
        return train, {
            name: Prompts([p.caption for p in some], [p.facts for p in some])
            for name, some in fixed.items()
        }
    captions = read_prompts(Path(source))
    if len(captions) < 16 or not held:
        return Prompts(captions), {"seen": Prompts(captions[:held])} if held else {}
    kept, out = [c for i, c in enumerate(captions) if i % 8], captions[::8]
    return Prompts(kept), {"seen": Prompts(kept[:held]), "held_out": Prompts(out[:held])}


def read_prompts(path: Path) -> list[str]:
    """YAML `prompts: [text, …]` or JSON `[{"caption": text}, …]`."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            captions = [row["caption"] for row in json.loads(text)]
        else:
            captions = parse_yaml(text, str(path))[0]["prompts"]
        assert isinstance(captions, list) and captions and all(isinstance(c, str) for c in captions)
    except (
        OSError,
        UnicodeError,
        ValueError,
        KeyError,
        TypeError,
        AssertionError,
        RecursionError,
    ) as error:
        raise ConfigError(
            "posttrain.prompts",
            f"is {str(path)!r}, which cannot be read ({error!r:.200}); must be "
            "moving_shapes, a YAML "
            'file with prompts: [text, …], or a JSON file [{"caption": text}, …]',
        ) from None
    return captions
