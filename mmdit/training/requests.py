"""Read requests for samples: a prompt, and settings that differ from the command's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmdit.config import ConfigError, decode, holds_half_a_pair, least, most
from mmdit.data.dataset.records import JSON
from mmdit.training.pipeline import SampleSettings

MOST_PIXELS = 1 << 16  # the longest side, and the most frames, that may be asked for


@dataclass(frozen=True)
class Request:
    """A request for one sample. A field that is None takes the command's setting."""

    prompt: str
    seed: int | None = None  # the sample then gets the noise of this seed's first sample
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    negative: str | None = None
    guidance: float | None = None  # for a pair of experts, of both

    def __post_init__(self):
        least(self, 1, "width", "height", "frames")
        most(self, MOST_PIXELS, "width", "height", "frames")
        for name in ("prompt", "negative"):
            if holds_half_a_pair(getattr(self, name) or ""):
                raise ConfigError(name, "holds half a surrogate pair, no text; write it anew")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ConfigError("guidance", f"is {self.guidance}, must be a finite number")

    @staticmethod
    def read(value: str | Mapping[str, Any], where: str) -> Request:
        """Return the request that a prompt, or a mapping of the names above, makes. ValueError
        names `where` it stands, the key and what is wrong."""
        if not isinstance(value, str | Mapping):
            raise ValueError(f"{where}: is {value!r:.100}, must be text (in quotes) or a section")
        try:
            return Request(value) if isinstance(value, str) else decode(Request, value)
        except ConfigError as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def overrides(self) -> dict[str, Any]:
        """Return the settings that the request gives, by name."""
        rest = {name: value for name, value in asdict(self).items() if value is not None}
        del rest["prompt"]
        return rest

    @property
    def batch_key(self) -> tuple:
        """Return the settings that samples of one batch must share: all except prompt and seed."""
        return self.width, self.height, self.frames, self.negative, self.guidance

    def size(self, common: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return width, height and frames; `common` are the command's."""
        width, height, frames = common
        return self.width or width, self.height or height, self.frames or frames

    def settings(self, common: SampleSettings) -> SampleSettings:
        """Return the settings with which it is drawn, apart from the seed; `common` are the
        command's."""
        if self.negative is not None:
            common = replace(common, negative_prompt=self.negative)
        if self.guidance is not None:
            common = replace(common, cfg_scale=self.guidance, cfg_scale_low=None)
        return common


def batches(requests: Mapping[int, Request], batch_size: int) -> Iterable[list[int]]:
    """Yield the numbers of the requests that are drawn together: at most `batch_size` of equal
    `batch_key`, in the order of the first request of each group."""
    groups: dict[tuple, list[int]] = {}
    for number, request in requests.items():
        groups.setdefault(request.batch_key, []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


def read_request(line: str, where: str) -> Request:
    """Return the request on a line, a JSON object or a plain prompt. ValueError names `where` it
    is."""
    if not line.startswith("{"):
        return Request(line)
    try:
        value = JSON.decode(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    return Request.read(value, where)
