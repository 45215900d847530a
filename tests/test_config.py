"""Configs: unknown keys, wrong types and impossible combinations stop with file, line and dotted path."""

from dataclasses import dataclass
from typing import Literal

import pytest

from mmdit.config import ConfigError, apply_overrides, decode, differences, encode, load, parse_yaml, to_yaml


@dataclass(frozen=True)
class Circle:
    type: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True)
class Square:
    type: Literal["square"] = "square"
    side: int = 2

    def __post_init__(self):
        if self.side <= 0:
            raise ConfigError("side", f"is {self.side}, must be positive")


@dataclass(frozen=True)
class Root:
    name: str
    shape: Circle | Square = Circle()
    sizes: tuple[tuple[int, int], ...] = ()
    limit: float | None = None
    fast: bool = False
    mode: Literal["a", "b"] = "a"


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_numbers_as_people_write_them():
    root = decode(Root, parse_yaml("name: x\nlimit: 1e-4\nshape: {type: circle, radius: 3}\n")[0])
    assert root.limit == 1e-4 and root.shape == Circle(radius=3.0)
    assert decode(Root, parse_yaml('name: "1e-4"')[0]).name == "1e-4"  # a quoted number stays text


def test_round_trip():
    root = Root("x", Square(side=4), ((64, 32), (32, 64)), 0.5, True, "b")
    assert decode(Root, parse_yaml(to_yaml(root))[0]) == root
    assert differences(root, Root("x", Square(side=5), ((64, 32), (32, 64)), 0.5, True, "b")) == ["shape.side: 4 → 5"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: x\nspeed: 3", ["c.yaml:2", "speed", "unknown key"]),
        ("name: x\nlimt: 3", ["limt", "did you mean 'limit'"]),
        ("name: x\nshape:\n  type: square\n  side: big", ["c.yaml:4", "shape.side", "'big'", "whole number"]),
        ("name: x\nshape:\n  type: square\n  side: 0", ["c.yaml:4", "shape.side", "is 0", "positive"]),
        ("name: x\nshape: {type: triangle}", ["shape.type", "triangle", "circle, square"]),
        ("name: x\nshape: {type: circle, side: 3}", ["shape.side", "unknown key"]),
        ("name: x\nfast: 1", ["fast", "true or false"]),
        ("name: x\nlimit: true", ["limit", "true"]),
        ("name: x\nsizes: [[1, 2, 3]]", ["sizes[0]", "3 values", "2"]),
        ("name: x\nmode: c", ["mode", "'a', 'b'"]),
        ("limit: 3", ["name", "missing"]),
        ("name: x\nname: y", ["name", "written twice"]),
        ("name: x\nlimit: .nan", ["limit", "nan"]),
        ("- a", ["sections"]),
        ("name: [", ["not valid YAML"]),
        ("name: !!python/object/apply:os.system [echo]", ["not allowed"]),
        ("name: !!binary aGk=", ["not allowed"]),
        ("name: 2020-01-01", ["not allowed"]),
        ("name: \x00", ["not valid YAML"]),
    ],
)
def test_mistakes_say_where_and_what(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        load(Root, write(tmp_path, text))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_overrides(tmp_path):
    path = write(tmp_path, "name: x\nshape: {type: square, side: 3}")
    assert load(Root, path, ["shape.side=7", "limit=2e-3"]) == Root("x", Square(side=7), limit=2e-3)
    with pytest.raises(ConfigError, match="command line: shape.side"):
        load(Root, path, ["shape.side=wide"])
    with pytest.raises(ConfigError, match="section.key=value"):
        load(Root, path, ["shape.side"])
    original = {"shape": {"side": 1}}
    apply_overrides(original, ["shape.side=2"])
    assert original == {"shape": {"side": 1}}


def test_alias_bombs_are_refused(tmp_path):
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(ConfigError, match="too many"):
        parse_yaml(text)
    with pytest.raises(ConfigError, match="too many or too deeply"):
        parse_yaml("a: &a [*a]")


def test_encode_is_plain_data():
    assert encode(Root("x", Square(side=3)))["shape"] == {"type": "square", "side": 3}
