"""What the documents say can be typed: commands parse, keys, flags and files exist, Python runs.

A block that cannot be run or parsed says why in an HTML comment on the line before it:
`<!-- not run: REASON -->`. A block of YAML that needs other sections names them as overrides:
`<!-- with: lora.enabled=true train.init_from=runs/x -->`.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import typing
from pathlib import Path

import pytest
import torch

from mmdit.adapters import LoRAConfig, inject
from mmdit.config import apply_overrides, decode, encode, parse_yaml
from mmdit.experiment.config import ExperimentConfig, load_experiment_config
from tests.helpers.wan_release import DIT, make_release, random_dit

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / name for name in ("README.md", "VTP/README.md", "data/README.md", "assets/README.md")
]
DOCUMENTS += sorted(
    [*(ROOT / "docs").glob("*.md"), *(ROOT / "VTP/checkpoints").glob("*/README.md")]
)
CONFIGS = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "VTP/configs").glob("*.yaml")])
OURS = re.compile(r"(?:mmdit\.scripts\.\w+|vtp\.(?:train|evaluate))")
PLACEHOLDERS = ("my.yaml", "my_", "FOLDER", "…")  # names that a reader puts his own into


@dataclasses.dataclass(frozen=True)
class Block:
    where: str
    language: str
    text: str
    marker: str  # the HTML comment before it

    def __str__(self):
        return self.where


def blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        lines, start = path.read_text(encoding="utf-8").splitlines(), None
        for number, line in enumerate(lines):
            fence = re.fullmatch(r"\s*```(\w*)\s*", line)
            if fence and start is None:
                start, language = number, fence[1]
            elif fence:
                before = lines[start - 1].strip() if start else ""
                marker = re.fullmatch(r"<!-- (.*) -->", before)
                text = "\n".join(part.strip() for part in lines[start + 1 : number])
                if language in ("python", "yaml"):
                    indent = len(lines[start]) - len(lines[start].lstrip())
                    text = "\n".join(part[indent:] for part in lines[start + 1 : number])
                where = f"{path.relative_to(ROOT)}:{start + 1}"
                found.append(Block(where, language, text, marker[1] if marker else ""))
                start = None
        assert start is None, f"{path}: a block is not closed"
    return found


BLOCKS = blocks()
of_language = lambda *names: [b for b in BLOCKS if b.language in names]  # noqa: E731


def commands_of(text: str) -> list[str]:
    """The commands in shell lines: without comments, optional parts written out, `&&` taken
    apart."""
    text = text.replace("\\\n", " ")
    lines = [re.sub(r"\s# .*|^# .*", "", line).strip() for line in text.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def all_commands() -> list[tuple[str, str]]:
    """(where, command) of every block, every `code` in a sentence, and every config's head."""
    found = [(b.where, command) for b in of_language("bash", "") for command in commands_of(b.text)]
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            code = " ".join(code.split())
            if OURS.search(code) and re.match(r"(PYTHONPATH=\S+ )?(python -m|torchrun) ", code):
                found.append((str(path.relative_to(ROOT)), code))
    for path in CONFIGS:
        head = [
            line[1:].strip()
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        ]
        joined = re.sub(r"\s*\\\n", " ", "\n".join(head))
        for line in joined.splitlines():
            if (
                OURS.search(line)
                and re.search(r"(python|torchrun).* -m ", line)
                and " … " not in line
            ):
                start = re.search(r"(PYTHONPATH=\S+ )?(python|torchrun) ", line).start()
                ending = re.split(r"\s{2,}|\s# |; | && |\) ", line[start:])[0]
                found.append((str(path.relative_to(ROOT)), ending))
    return found


COMMANDS = all_commands()
RUNS_OURS = [
    (where, command)
    for where, command in COMMANDS
    if OURS.search(command) and not re.fullmatch(r"python -m [\w.]+", command)
]


class Parsed(Exception):
    def __init__(self, namespace):
        self.namespace = namespace


@pytest.fixture
def parse(monkeypatch):
    """`parse(module, words)`: what the command's own parser makes of them; it goes no further."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(self, *arguments, original=original, **more):
            if inside[0]:
                return original(self, *arguments, **more)
            inside[0] = True
            try:
                raise Parsed(original(self, *arguments, **more))
            finally:
                inside[0] = False

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    inside = [False]

    def run(module, words):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                importlib.import_module(module).main(words)
            except Parsed as parsed:
                return parsed.namespace
            except SystemExit:
                raise AssertionError(said.getvalue()) from None
        raise AssertionError(f"{module} parsed nothing")

    return run


def words_of(command: str) -> tuple[str, list[str]]:
    """Module and words. `[--resume]` and the like are written out; an ellipsis is one more word."""
    command = re.sub(r"\[([^\[\]]*)\](?=\s|$)", r"\1", command).replace("<name>", "name")
    command = re.sub(r"\$\{[^}]*\}|\$\w+", "64", command)  # variables of a loop over sizes
    words = shlex.split(re.sub(r"(?<=\s)…(?=\s|$)", "", command))
    at = next(i for i, word in enumerate(words) if OURS.fullmatch(word))
    assert words[at - 1] == "-m", command
    return words[at], words[at + 1 :]


def test_there_is_something_to_look_at():
    assert len(BLOCKS) > 12 and len(RUNS_OURS) > 60
    named = {OURS.search(command)[0] for _, command in COMMANDS if OURS.search(command)}
    missing = [name for name in named if not importlib.util.find_spec(name)]
    assert missing in ([], ["mmdit.scripts.NAME"])  # NAME: any of them
    modules = {words_of(command)[0] for _, command in RUNS_OURS}
    assert {"mmdit.scripts.sample", "mmdit.scripts.train_t2v", "mmdit.scripts.train_vtp"} <= modules


@pytest.mark.parametrize(
    "where, command", RUNS_OURS, ids=[f"{w}-{i}" for i, (w, _) in enumerate(RUNS_OURS)]
)
def test_a_command_parses_and_names_files_and_keys_that_exist(where, command, parse):
    module, words = words_of(command)
    given = vars(parse(module, words))
    config = given.get("config")
    own = config is None or config.startswith(PLACEHOLDERS)
    if not own:
        assert (ROOT / config).is_file(), f"{config} is not there"
    overrides = given.get("overrides") or []
    if module != "mmdit.scripts.train_vtp":
        if own:
            mapping = encode(ExperimentConfig("x")) | {"model": {}}
            decode(ExperimentConfig, apply_overrides(mapping, overrides))
        else:
            load_experiment_config(ROOT / config, overrides)
    for word in re.findall(
        r"(?:assets|configs|tests|VTP/(?:configs|checkpoints))/[\w./-]+", command
    ):
        made = given.get("out") == word
        assert made or (ROOT / word).exists(), f"{word} is not there"


@pytest.mark.parametrize("block", of_language("bash", ""), ids=str)
def test_every_other_command_is_known_or_says_why_it_is_not_run(block):
    """pip installs what is here, pytest runs what is here; anything else needs its comment."""
    for command in commands_of(block.text):
        if OURS.search(command) or block.marker.startswith("not run: "):
            continue
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            assert (ROOT / words[words.index("-r") + 1]).is_file()
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        else:
            raise AssertionError(f"{block}: {command!r} is neither ours nor marked")


@pytest.mark.parametrize("block", of_language("yaml"), ids=str)
def test_yaml_is_a_config(block):
    mapping, _ = parse_yaml(block.text, block.where)
    needed = (
        shlex.split(block.marker.removeprefix("with: "))
        if block.marker.startswith("with: ")
        else []
    )
    decode(ExperimentConfig, apply_overrides({"experiment_name": "x"} | mapping, needed))


@pytest.mark.parametrize("block", of_language("json"), ids=str)
def test_json_is_a_record(block):
    for line in block.text.splitlines():
        row = json.loads(line)
        assert {"id", "caption"} <= row.keys() and row.keys() & {
            "image_path",
            "frames_dir",
            "video_path",
        }


# ── Python ──
def wan(folder: Path) -> dict:
    """A pair of tiny experts and a LoRA file, under the names of the example."""
    from mmdit.interop.lora_formats import save_lora

    make_release(folder / "Wan2.2-T2V-A14B", pair=True)
    model = random_dit(DIT)
    inject(model, LoRAConfig(enabled=True, rank=2, target_modules=("self_attn.q",)))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    save_lora(model, folder / "style.safetensors", "peft")
    x = torch.randn(1, DIT.in_dim, 2, 4, 4)
    return {"x": x, "t": torch.tensor([500.0]), "text": torch.randn(1, 5, DIT.text_dim)}


def check_wan(folder: Path, names: dict) -> None:
    """The folder that the example writes is the base with the LoRA in it."""
    from mmdit.interop.wan import load_dit

    base = load_dit(folder / "Wan2.2-T2V-A14B", torch.bfloat16, expert="high")
    written = load_dit(folder / "out", torch.bfloat16)
    pairs = zip(written.named_parameters(), base.parameters(), strict=True)
    moved = {name for (name, value), before in pairs if not torch.equal(value, before)}
    assert moved and all("self_attn.q" in name for name in moved)
    assert (
        names["velocity"].shape == names["x"].shape
        and (folder / "style_kohya.safetensors").is_file()
    )


def vtp(folder: Path) -> dict:
    (folder / "VTP").symlink_to(ROOT / "VTP")
    return {"video": torch.rand(1, 2, 3, 32, 48)}


def check_vtp(folder: Path, names: dict) -> None:
    found = names.get("decoded", names.get("video"))
    assert found.isfinite().all() and 0 <= found.min() and found.max() <= 1


EXAMPLES = {"load_dit": (wan, check_wan), "VTP": (vtp, check_vtp)}


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_runs_on_tiny_weights(block, tmp_path, monkeypatch):
    """As it stands, but on a CPU, with the names that its comments describe."""
    if block.marker.startswith("not run: "):
        return
    make, check = next(pair for word, pair in EXAMPLES.items() if word in block.text)
    names = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text.replace('"cuda"', '"cpu"'), block.where, "exec"), names)  # noqa: S102
    check(tmp_path, names)


# ── words in sentences ──
def codes() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        found += [
            (str(path.relative_to(ROOT)), " ".join(code.split()))
            for code in re.findall(r"`([^`]+)`", text)
        ]
    return found


def options() -> set[str]:
    """Every option of every command."""
    found = set()
    names = [f"mmdit.scripts.{path.stem}" for path in (ROOT / "mmdit/scripts").glob("*.py")]
    for name in names:
        module = importlib.import_module(name)
        if hasattr(module, "main") and hasattr(module, "run"):
            with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
                module.main(["--help"])
            found |= set(re.findall(r"--[\w-]+", out.getvalue()))
    return found


def has_key(kind, path: list[str]) -> bool:
    """Whether the dotted path leads somewhere in a config class, in any member of a union."""
    if not path:
        return True
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return path[0] in {f.name for f in dataclasses.fields(kind)} and has_key(
            hints[path[0]], path[1:]
        )
    return any(has_key(part, path) for part in typing.get_args(kind))


def test_options_in_sentences_exist():
    known = options() | {"--nproc_per_node", "--help", "--shm-size", "--local-dir", "--dist"}
    for path in (ROOT / "tests").rglob("*.py"):  # some of them are commands, too
        if path != Path(__file__):
            known |= set(re.findall(r"--[\w-]+", path.read_text(encoding="utf-8")))
    option = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
    named = [(where, word) for where, code in codes() for word in option.findall(code)]
    wrong = [(where, word) for where, word in named if word not in known]
    assert not wrong


def test_keys_in_sentences_exist():
    sections = {f.name for f in dataclasses.fields(ExperimentConfig)}
    wrong = []
    for where, code in codes():
        for word in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)(?=[=:,;)\s]|$)", code):
            parts = word.split(".")
            file = parts[-1] in (
                "py",
                "json",
                "jsonl",
                "yaml",
                "md",
                "png",
                "mp4",
                "pt",
                "safetensors",
                "html",
                "txt",
                "npy",
            )
            if parts[0] in sections and not file and not has_key(ExperimentConfig, parts):
                wrong.append((where, word))
    assert not wrong


def test_files_in_sentences_exist():
    wrong = []
    for where, code in codes():
        for word in re.findall(
            r"(?<![\w./-])((?:mmdit|tests|configs|assets|docs|VTP)/[\w./*-]+)", code
        ):
            word = word.rstrip(".")
            bases = (ROOT, ROOT / "mmdit", ROOT / "VTP")
            if not any(
                base.joinpath(word).exists() or list(base.glob(word.rstrip("/"))) for base in bases
            ):
                wrong.append((where, word))
    assert not wrong
