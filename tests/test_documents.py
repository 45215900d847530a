"""What the documents say can be typed: commands parse, keys, flags, files and links exist, Python
runs.

A block that cannot be run says why in an HTML comment on the line before it:
`<!-- not run: REASON -->`. A block of YAML that needs other sections names them as overrides:
`<!-- with: lora.enabled=true train.init_from=runs/x -->`.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

from mmdit.__main__ import commands as subcommands
from mmdit.adapters import LoRAConfig, inject
from mmdit.config import apply_overrides, decode, encode, parse_yaml
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.posttrain import rewards
from mmdit.rng import Draws
from tests.helpers.wan_release import DIT, make_release, random_dit
from tests.test_style import VAGUE

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "docs/*.md", "VTP/*.md", "VTP/checkpoints/*/*.md", "data/*.md", "assets/*.md")
PATTERNS += ("integrations/*/*.md", "records/*.md")
DOCUMENTS = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
HEADS = [*sorted(ROOT.glob("configs/**/*.yaml")), *sorted(ROOT.glob("VTP/configs/*.yaml"))]
HEADS += sorted(ROOT.glob("mmdit/scripts/*.py"))
START = re.compile(r"(?:PYTHONPATH=\S+ )?(?:mmdit [a-z]|(?:python|torchrun) .*-m mmdit\.scripts\.)")
PLACEHOLDERS = ("my.yaml", "my_")  # configs that a reader puts his own in place of
FILES = r"(?:mmdit|tests|configs|assets|docs|VTP|benchmarks|examples|integrations|records)"
PARTS = r"(?:nn|diffusion|training|adapters|posttrain|interop|tokenizers|text_encoders|experiment)"
EXAMPLE = ("x.py", "test_x.py")  # files that a reader adds
ENDINGS = ("py", "json", "jsonl", "yaml", "md", "png", "mp4", "pt", "safetensors", "html", "txt")


# ── what stands in the documents ──
@dataclasses.dataclass(frozen=True)
class Block:
    where: str
    language: str
    text: str
    marker: str  # the HTML comment before it

    def __str__(self):
        return self.where


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks() -> list[Block]:
    fence = re.compile(
        r"(?:^ *<!-- (?P<marker>[^\n]*) -->\n)?"
        r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
        re.DOTALL | re.MULTILINE,
    )
    read = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in fence.finditer(text):
            line = 1 + text[: match.start("indent")].count("\n")
            inside = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
            where = f"{name_of(path)}:{line}"
            read.append(Block(where, match["language"], inside, match["marker"] or ""))
    return read


def sentences(path: Path) -> str:
    """Return a document without its blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def codes() -> list[tuple[str, str]]:
    """Return (document, `code`) for every piece of code in a sentence."""
    return [
        (name_of(path), " ".join(code.split()))
        for path in DOCUMENTS
        for code in re.findall(r"`([^`]+)`", sentences(path))
    ]


def commands_of(text: str) -> list[str]:
    """Return the commands in shell lines, without comments, and with `&&` taken apart."""
    text = text.replace("\\\n", " ")
    lines = [re.sub(r"(?:^|\s)# .*", "", line).strip() for line in text.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def head_of(path: Path) -> str:
    """Return the comment that opens a config, or the docstring that opens a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    return "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))


def commands_of_head(head: str) -> list[str]:
    written = []
    for line in re.sub(r"\s*\\\n\s*", " ", head).splitlines():
        start = START.search(line)
        if start and " … " not in line:
            written.append(re.split(r"\s{2,}|\s# |; | && |\) |`", line[start.start() :])[0])
    return written


BLOCKS = blocks()


def of_language(*names: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in names]


def our_commands() -> list[tuple[str, str]]:
    """Return (where, command) for every command of ours, with its arguments."""
    written = [
        (block.where, line) for block in of_language("bash") for line in commands_of(block.text)
    ]
    written += codes()
    for path in HEADS:
        written += [(name_of(path), line) for line in commands_of_head(head_of(path))]
    with_arguments = re.compile(r"(mmdit \S+|.*-m [\w.]+) \S")
    return [
        (where, line) for where, line in written if START.match(line) and with_arguments.match(line)
    ]


OURS = our_commands()


# ── commands ──
class Parsed(Exception):
    def __init__(self, namespace):
        self.namespace = namespace


@pytest.fixture
def parse(monkeypatch):
    """`parse(module, words)`: what the command's parser makes of them; it goes no further."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(self, *arguments, original=original):
            raise Parsed(original(self, *arguments))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)

    def run(module, words):
        with contextlib.redirect_stderr(io.StringIO()) as message:
            try:
                importlib.import_module(module).main(words)
            except Parsed as parsed:
                return parsed.namespace
            except SystemExit:
                raise AssertionError(message.getvalue()) from None
        raise AssertionError(f"{module} parsed nothing")

    return run


def module_and_words(command: str) -> tuple[str, list[str]]:
    """Return the module that a command runs and its arguments. `[--resume]` and the like are
    written out, and an ellipsis stands for nothing."""
    command = re.sub(r"\[([^\[\]]*)\](?=\s|$)", r"\1", command).replace("<name>", "name")
    command = re.sub(r"\$\{[^}]*\}|\$\w+", "64", command)  # variables of a loop over sizes
    words = shlex.split(re.sub(r"(?<=\s)…(?=\s|$)", "", command))
    if words[0] == "mmdit":
        return f"mmdit.scripts.{subcommands()[words[1]]}", words[2:]
    at = words.index("-m") + 1
    return words[at], words[at + 1 :]


def test_there_is_something_to_look_at():
    modules = {module_and_words(command)[0] for _, command in OURS}
    assert len(BLOCKS) > 30 and len(OURS) > 80
    assert {"mmdit.scripts.sample", "mmdit.scripts.train_t2v", "mmdit.scripts.train_vtp"} <= modules


@pytest.mark.parametrize("number", range(len(OURS)), ids=lambda n: f"{OURS[n][0]}-{n}")
def test_a_command_parses_and_names_files_and_keys_that_exist(number, parse):
    _, command = OURS[number]
    module, words = module_and_words(command)
    arguments = vars(parse(module, words))
    config, overrides = arguments.get("config"), arguments.get("overrides") or []
    if config and not config.startswith(PLACEHOLDERS):
        assert (ROOT / config).is_file(), f"{config} is not there"
        if module != "mmdit.scripts.train_vtp":
            load_experiment_config(ROOT / config, overrides)
    else:
        mapping = encode(ExperimentConfig("x")) | {"model": {}}
        decode(ExperimentConfig, apply_overrides(mapping, overrides))
    for word in re.findall(
        r"(?:assets|configs|tests|VTP/(?:configs|checkpoints))/[\w./-]+", command
    ):
        assert arguments.get("out") == word or (ROOT / word).exists(), f"{word} is not there"


@pytest.mark.parametrize("block", of_language("bash", ""), ids=str)
def test_every_other_command_is_known_or_says_why_it_is_not_run(block):
    """pip installs what is here, pytest and our programs run what is here."""
    for command in commands_of(block.text):
        if block.marker.startswith("not run: "):
            continue
        if START.match(command):
            assert importlib.util.find_spec(module_and_words(command)[0])
            continue
        words = shlex.split(command)
        if words[:3] == ["pip", "install", "-e"]:
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[3])[1] or ""
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(f"\n{extra} = [" in project for extra in extras.split(",") if extra)
        elif words[:3] == ["python", "-m", "pytest"] or words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        else:
            assert words[:2] == ["mmdit", "--help"], f"{block}: {command!r} is unknown, unmarked"


def test_every_subcommand_is_listed_with_its_module():
    """The table of commands in docs/install.md is the list of modules in mmdit/scripts."""
    listed = {}
    for row in (ROOT / "docs/install.md").read_text(encoding="utf-8").splitlines():
        if row.startswith("| `mmdit "):
            names, modules = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[1:3])
            listed |= dict(zip([name.split()[1] for name in names], modules, strict=True))
    assert listed == subcommands()


# ── other blocks ──
@pytest.mark.parametrize("block", of_language("yaml"), ids=str)
def test_yaml_is_a_config(block):
    mapping, _ = parse_yaml(block.text, block.where)
    needed = []
    if block.marker.startswith("with: "):
        needed = shlex.split(block.marker.removeprefix("with: "))
    decode(ExperimentConfig, apply_overrides({"experiment_name": "x"} | mapping, needed))


@pytest.mark.parametrize("block", of_language("json"), ids=str)
def test_json_is_a_record(block):
    for line in block.text.splitlines():
        row = json.loads(line)
        assert {"id", "caption"} <= row.keys()
        assert row.keys() & {"image_path", "frames_dir", "video_path"}


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
    from mmdit.interop.wan_weights import load_dit

    base = load_dit(folder / "Wan2.2-T2V-A14B", torch.bfloat16, expert="high")
    written = load_dit(folder / "out", torch.bfloat16)
    pairs = zip(written.named_parameters(), base.parameters(), strict=True)
    moved = {name for (name, value), before in pairs if not torch.equal(value, before)}
    assert moved and all("self_attn.q" in name for name in moved)
    assert names["velocity"].shape == names["x"].shape
    assert (folder / "style_kohya.safetensors").is_file()


def pixels(folder: Path) -> dict:
    for name in ("VTP", "assets"):
        (folder / name).symlink_to(ROOT / name)
    return {"video": torch.rand(1, 2, 3, 32, 48)}


def check_pixels(folder: Path, names: dict) -> None:
    drawn = [names[name] for name in ("pixels", "decoded", "video") if name in names][0]
    assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1


def reward(folder: Path) -> dict:
    return dict(vars(rewards))


def check_reward(folder: Path, names: dict) -> None:
    """Of a black and a white picture the reward likes the black one."""
    pictures = torch.stack([torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)])
    samples = rewards.Samples(
        captions=["", ""],
        latents=torch.zeros(2, 1),
        groups=torch.zeros(2),
        draws=Draws.of(0, 0, 2),
        pixels=pictures,
    )
    assert names["Darkness"]().call(samples).tolist() == [1.0, 0.0]


EXAMPLES = {"load_dit": (wan, check_wan), "VTP": (pixels, check_pixels)}
EXAMPLES |= {"load_pipeline": EXAMPLES["VTP"], "Darkness": (reward, check_reward)}


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_python_runs_on_tiny_weights(block, tmp_path, monkeypatch):
    """As it stands, but on a CPU, with the names that its comments describe."""
    if block.marker.startswith("not run: "):
        compile(block.text, block.where, "exec")
        return
    make, check = next(pair for word, pair in EXAMPLES.items() if word in block.text)
    names = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text.replace('"cuda"', '"cpu"'), block.where, "exec"), names)
    check(tmp_path, names)


# ── words in sentences ──
def options() -> set[str]:
    """Return every option of every command and of every program in tests/."""
    known = {"--help", "--nproc_per_node", "--strict", "--dist"}
    for module in subcommands().values():
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            importlib.import_module(f"mmdit.scripts.{module}").main(["--help"])
        known |= set(re.findall(r"--[\w-]+", out.getvalue()))
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__):
            known |= set(re.findall(r"--[\w-]+", path.read_text(encoding="utf-8")))
    return known


def has_key(config: type, path: list[str]) -> bool:
    """Return whether the dotted path leads somewhere in a config, in any member of a union."""
    if not path:
        return True
    if not dataclasses.is_dataclass(config):
        return any(has_key(part, path) for part in typing.get_args(config))
    hints = typing.get_type_hints(config)
    names = {field.name for field in dataclasses.fields(config)}
    return path[0] in names and has_key(hints[path[0]], path[1:])


def test_options_in_sentences_exist():
    known, option = options(), re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
    named = [(where, word) for where, code in codes() for word in option.findall(code)]
    assert not [pair for pair in named if pair[1] not in known]


def test_keys_in_sentences_exist():
    sections = {field.name for field in dataclasses.fields(ExperimentConfig)}
    dotted = re.compile(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)(?=[=:,;)\s]|$)")
    named = [(where, word.split(".")) for where, code in codes() for word in dotted.findall(code)]
    keys = [(where, path) for where, path in named if path[0] in sections]
    keys = [(where, path) for where, path in keys if path[-1] not in ENDINGS]
    wrong = [(where, path) for where, path in keys if not has_key(ExperimentConfig, path)]
    assert keys and not wrong


def test_files_in_sentences_exist():
    wrong = []
    file = re.compile(rf"(?<![\w./-])((?:{FILES}|{PARTS})/[\w./*-]*)")
    for where, code in codes():
        for word in file.findall(code):
            if word.endswith(EXAMPLE):
                continue
            bases = (ROOT, ROOT / "mmdit", ROOT / "VTP", ROOT / where.rpartition("/")[0])
            if not any(list(base.glob(word.rstrip("./"))) for base in bases):
                wrong.append((where, word))
    assert not wrong


def test_programs_in_sentences_exist():
    named = {name for _, code in codes() for name in re.findall(r"-m (tests\.[\w.]+)", code)}
    assert len(named) > 5
    assert not [name for name in named if not importlib.util.find_spec(name)]


# ── links ──
def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", sentences(path), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", sentences(path)):
        if ":" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.thorough
def test_the_site_builds_with_its_pictures_and_every_page(tmp_path):
    if not importlib.util.find_spec("material"):
        pytest.skip('the site needs mkdocs-material: pip install -e ".[dev]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("index.html", "wan/index.html", "search/search_index.json", "assets/clips_64.gif"):
        assert (tmp_path / name).is_file(), name


def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path for path in ROOT.glob("docs/*.md") if f"]({name_of(path)})" not in readme]


def test_every_vague_name_has_a_better_one_in_contributing():
    words = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("not used")[2]
    listed = {name for row in words.splitlines() for name in row.split("|")[1:2]}
    assert {name for cell in listed for name in re.findall(r"`(\w+)`", cell)} == VAGUE


def test_readme_is_short_and_has_the_command_of_continuous_integration():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    at = lines.index("<!-- test-command -->")
    assert lines.count("<!-- test-command -->") == 1
    assert lines[at + 1] == "```bash" and "pytest" in lines[at + 2] and lines[at + 3] == "```"
