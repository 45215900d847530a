"""The section `card:`, for the model card beside an export."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmdit.config import ConfigError, Section

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
REPOSITORY = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")


@dataclass(frozen=True)
class CardConfig(Section):
    """The section `card:`: facts for the model card that only a person knows."""

    # The licence of the weights, by its name on the Hugging Face hub: mit, apache-2.0, other …; if
    # it is empty, the card says that no licence is stated.
    license: str = ""
    # A description of the training data, and their origin.
    data: str = ""
    # The licence of the training data, in words.
    data_license: str = ""
    # Data sets of the hub that are among them, as owner/name.
    datasets: tuple[str, ...] = ()
    # The model that adapters change, as owner/name on the hub; it may be empty for releases of Wan,
    # for which it is known.
    base_model: str = ""

    def __post_init__(self):
        if self.license and not LICENSE.fullmatch(self.license):
            raise ConfigError(
                "license",
                f"is {self.license!r}; must be a name as the hub has it, of small letters, such as"
                " mit or apache-2.0",
            )
        for number, name in enumerate(self.datasets):
            _check_repository(f"datasets[{number}]", name)
        if self.base_model:
            _check_repository("base_model", self.base_model)


def _check_repository(key: str, name: str) -> None:
    if not REPOSITORY.fullmatch(name):
        raise ConfigError(key, f"is {name!r}; must be the name of a repository, owner/name")
