"""docs/configuration.md says what the code does: every key with its type, default and meaning."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def make():
    path = ROOT / "docs/make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says(make):
    assert make.PAGE.read_text(encoding="utf-8") == make.page(), (
        "a key, a default or a comment has changed: run python docs/make_configuration.py"
    )


def test_a_key_that_nobody_has_described_is_an_error(make):
    @dataclasses.dataclass(frozen=True)
    class Section:
        # Says something.
        described: int = 1

        silent: int = 2

    assert make.comment(Section, "described") == "Says something."
    with pytest.raises(ValueError, match="Section.silent has no comment"):
        make.comment(Section, "silent")
