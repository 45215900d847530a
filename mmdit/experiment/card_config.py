"""The section `card:`, for the model card beside an export."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmdit.config import ConfigError, Section

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
REPOSITORY = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")


@dataclass(frozen=True)
class CardConfig(Section):
    """The section `card:`: what only a person knows of a model, for its model card."""

    # The licence of the weights, by its name on the Hugging Face hub: mit, apache-2.0, other …;
    # empty: the card says that none is stated.
    license: str = ""
    # What the training data are and where they come from.
    data: str = ""
    # The licence of the training data, in words.
    data_license: str = ""
    # Which data sets of the hub are among them, as owner/name.
    datasets: tuple[str, ...] = ()
    # The model that adapters change, as owner/name on the hub; empty: known of releases of Wan.
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
