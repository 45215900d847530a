"""Configs: unknown keys, wrong types and impossible combinations stop with file, line and dotted
path."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

import pytest

from mmdit.config import (
    ConfigError,
    Section,
    apply_overrides,
    check_sections,
    decode,
    differences,
    encode,
    in_one_line,
    load,
    parse_yaml,
    to_yaml,
)
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.scripts import with_home
from mmdit.vtp_training.pretrain_config import PretrainConfig


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


@pytest.mark.parametrize(
    "text", ["1e5", "1e-4", "09", "+1e3", ".5e3", "\u0663", "a\x85b", "two\nlines\n", "~", "1:30"]
)
def test_a_text_that_looks_like_something_else_is_that_text_again(text):
    """A run named "1e5" writes config.yaml, which commands read."""
    assert decode(Root, parse_yaml(to_yaml(Root(text)))[0]).name == text
    line = in_one_line(Root(text))
    assert "\n" not in line and decode(Root, parse_yaml(line)[0]).name == text


@pytest.mark.parametrize("steps", [0, 10**6, 10**50])
def test_a_number_of_sampling_steps_that_cannot_be_meant_is_refused_by_its_key(steps):
    with pytest.raises(ConfigError, match="train.sample_num_steps: is 1?0+; must be"):
        decode(ExperimentConfig, {"experiment_name": "x", "train": {"sample_num_steps": steps}})


def test_a_list_of_sections_says_what_they_hold():
    base = {"experiment_name": "x", "lora": {"per_module": {"ffn.0": 2}}}
    with pytest.raises(ConfigError, match="a list of sections, each with modules, rank, alpha"):
        decode(ExperimentConfig, base)


def test_digits_of_other_scripts_are_text():
    assert parse_yaml("name: \uff13")[0] == {"name": "\uff13"}


def test_round_trip():
    root = Root("x", Square(side=4), ((64, 32), (32, 64)), 0.5, True, "b")
    assert decode(Root, parse_yaml(to_yaml(root))[0]) == root
    assert differences(root, Root("x", Square(side=5), ((64, 32), (32, 64)), 0.5, True, "b")) == [
        "shape.side: 4 → 5"
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: x\nspeed: 3", ["c.yaml:2", "speed", "unknown key"]),
        ("name: x\nlimt: 3", ["limt", "did you mean 'limit'"]),
        (
            "name: x\nshape:\n  type: square\n  side: big",
            ["c.yaml:4", "shape.side", "'big'", "whole number"],
        ),
        (
            "name: x\nshape:\n  type: square\n  side: 0",
            ["c.yaml:4", "shape.side", "is 0", "positive"],
        ),
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
        ("name: !!map a", ["c.yaml:1", "not allowed"]),
        ("name: !!str {a: 1}", ["not allowed"]),
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
    # a section that is left out, as config.yaml of a run has it
    assert apply_overrides({"shape": None}, ["shape.side=2"]) == {"shape": {"side": 2}}


def test_a_whole_section_takes_no_override_back():
    words = ["shape={type: square}", "shape.side=7"]
    assert apply_overrides({"shape": {"kept": 1}}, words)["shape"] == {"type": "square", "side": 7}
    with pytest.raises(ConfigError, match="'shape.side=7' before it would be lost"):
        apply_overrides({}, words[::-1])
    assert apply_overrides({}, ["shapes.side=7", "shape={}"]) == {
        "shapes": {"side": 7},
        "shape": {},
    }


@pytest.mark.parametrize("text", ["run #2", "#2", '"run" # 2', "é #z", "[a, b] # c"])
def test_an_override_loses_nothing_to_a_comment(text):
    with pytest.raises(ConfigError, match="as a comment"):
        apply_overrides({}, [f"name={text}"])
    for kept in ('"run #2"', "run#2", "[a#b, c]"):
        assert "#" in str(apply_overrides({}, [f"name={kept}"])["name"])


def test_letters_are_whole(tmp_path):
    """JSON, which is YAML, writes an emoji as two halves; a text that was cut may end in one."""
    path = write(tmp_path, 'name: "a \\ud83d\\ude00 é"\nshape: {type: square, side: 1}')
    assert load(Root, path).name == "a 😀 é"
    path.write_text('shape: {type: square, side: 1}\nname: "a \\ud83d"')
    with pytest.raises(ConfigError, match=r":2: 'a \\ud83d' holds half a surrogate pair"):
        load(Root, path)
    with pytest.raises(ConfigError, match="override 'name=caf.udce9' is not UTF-8 text"):
        apply_overrides({}, ["name=caf\udce9"])  # of a shell in another encoding


@pytest.mark.parametrize("name", ["", "..", "a/b", "two\nlines", "red\x1b[31m", "a\x7f"])
def test_the_name_of_a_run_is_that_of_a_folder_and_can_be_printed(name):
    with pytest.raises(ConfigError, match="experiment_name: is .* must be a folder name"):
        decode(ExperimentConfig, {"experiment_name": name})


def test_a_number_that_begins_with_zeros_is_not_taken_to_another_base(tmp_path):
    with pytest.raises(ConfigError, match=r":2: 010 begins with 0, .* base of 8"):
        load(Root, write(tmp_path, "name: x\nshape: {type: square, side: 010}"))
    assert apply_overrides({}, ["limit=0.5", "side=0"]) == {"limit": 0.5, "side": 0}


def test_alias_bombs_are_refused(tmp_path):
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(ConfigError, match="too many"):
        parse_yaml(text)
    with pytest.raises(ConfigError, match="too many or too deeply"):
        parse_yaml("a: &a [*a]")


def test_encode_is_plain_data():
    assert encode(Root("x", Square(side=3)))["shape"] == {"type": "square", "side": 3}


# Numbers of which any is meant: seeds, guidance (below 1 leads away from a prompt), weights of
# rewards (below 0: less of it), a check.
ANY = {
    "seed",
    "sample_seed",
    "sample_cfg_scale",
    "sample_cfg_scale_low",
    "guidance",
    "guidance_low",
    "logit_mean",
    "weight",
    "partial",
    "dim",
}


def sections(kind, found: dict) -> dict:
    """Every dataclass that `kind` is made of, by name."""
    if dataclasses.is_dataclass(kind) and kind.__name__ not in found:
        found[kind.__name__] = kind
        for hint in typing.get_type_hints(kind).values():
            sections(hint, found)
    for part in typing.get_args(kind):
        sections(part, found)
    return found


SECTIONS = sections(PretrainConfig, sections(ExperimentConfig, {}))
NEEDED = {
    "UMT5Config": {"freeze": False, "dtype": "float32"},
    "ModuleRank": {"rank": 1, "alpha": 1.0},
    "PhaseConfig": {"alpha": 1.0},
}
NUMBERS = [
    (name, field.name)
    for name, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if {int, float} & {(hint := typing.get_type_hints(kind)[field.name]), *typing.get_args(hint)}
    and field.name not in ANY
    and typing.get_origin(hint) is not tuple
]


@pytest.mark.parametrize("section, name", NUMBERS)
def test_a_number_below_zero_is_refused_wherever_none_is_meant(section, name):
    kind = SECTIONS[section]
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    values = dict.fromkeys(
        [*required, *({"name_or_path"} & {field.name for field in dataclasses.fields(kind)})], "x"
    )
    with pytest.raises(ConfigError):
        kind(**{**values, **NEEDED.get(section, {}), name: -3})


def test_every_section_is_asked_whether_it_goes_with_the_others():
    """A dataclass among the root's fields that is no Section would never be asked."""
    hints = typing.get_type_hints(ExperimentConfig).values()
    parts = [part for hint in hints for part in (typing.get_args(hint) or (hint,))]
    assert all(issubclass(part, Section) for part in parts if dataclasses.is_dataclass(part))


def test_sections_are_asked_in_their_order_and_only_when_all_are_there():
    asked = []

    @dataclass(frozen=True)
    class Part(Section):
        name: str = "part"

        def check(self, run):
            asked.append((self.name, run.other is not None))

    @dataclass(frozen=True)
    class Whole:
        part: Part = Part("first")
        number: int = 3
        other: Part = Part("second")

        def __post_init__(self):
            check_sections(self)

    Whole()
    assert asked == [("first", True), ("second", True)]


def test_a_tilde_in_a_path_is_the_home_folder_and_in_a_text_it_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    words = [
        "output_dir=~/runs",
        "train.init_from=~/runs/a",
        "tokenizer.name_or_path=~/t",
        "captions.trigger=~/x",
    ]
    base = {"experiment_name": "a", "tokenizer": {"type": "vtp"}}
    config = decode(ExperimentConfig, apply_overrides(base, [*words, "train.sample_prompts=[~/a]"]))
    assert (config.output_dir, config.train.init_from) == (
        "/home/someone/runs",
        "/home/someone/runs/a",
    )
    assert config.tokenizer.name_or_path == "/home/someone/t"
    assert (config.captions.trigger, config.train.sample_prompts) == ("~/x", ("~/a",))
    assert decode(ExperimentConfig, encode(config)) == config
    words = ["--out_dir=~/x", "~/y", "--prompt=a ~/b", "a=~/c", "--out", "~"]
    told = ["--out_dir=/home/someone/x", "/home/someone/y", "--prompt=a ~/b", "a=~/c", "--out", "~"]
    assert [with_home(word) for word in words] == told


@pytest.mark.parametrize(
    "key, value, limit",
    [
        ("train.batch_size", 10**20, 2**63 - 1),
        ("seed", -(2**64), 2**63 - 1),
        ("train.max_steps", 1e20, 2**63 - 1),
        ("train.batch_size", 10**18, 2**20),
        ("train.grad_accum_steps", 2_000_000, 2**20),
    ],
)
def test_whole_numbers_that_nothing_holds_are_refused_by_their_key(key, value, limit):
    config = apply_overrides({"experiment_name": "x"}, [f"{key}={value}"])
    with pytest.raises(ConfigError, match=f"{key}: is .*must be at most {limit}"):
        decode(ExperimentConfig, config)
