"""The layers of DESIGN.md section 4 import downward only; siblings do not know each other."""

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    ["__main__"],
    ["scripts"],
    ["ui"],
    ["commands"],
    ["experiment"],
    ["posttrain", "diagnostics", "vtp_training"],
    ["training"],
    ["interop"],
    ["models", "tokenizers", "text_encoders", "adapters", "data"],
    ["diffusion", "nn"],
    ["interfaces", "config", "rng", "weights", "terminal", "foreign", "files", "pixels", "shipped"]
    + ["privacy", "signals"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / "mmdit").rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file, which is read once for all tests."""
    return ast.parse(path.read_text())


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Return all nodes of the syntax tree of a file."""
    return list(ast.walk(tree_of(path)))


def part_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT / "mmdit").with_suffix("").parts
    return None if parts == ("__init__",) else parts[0]


def imports(path: Path):
    """(line, imported mmdit part) for every import in the file, relative ones included."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in nodes_of(path):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mmdit" and len(parts) > 1 and parts[1] in RANK:
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    part = part_of(path)
    if part is None:
        assert not list(imports(path)), (
            "the package itself imports nothing: importing mmdit must stay light"
        )
        return
    assert part in RANK, f"{part} has no layer: add it to LAYERS and to DESIGN"
    for line, imported in imports(path):
        allowed = (
            imported == part
            or RANK[imported] > RANK[part]
            or RANK[part] == RANK[imported] == len(LAYERS) - 1
        )
        assert allowed, f"{path}:{line}: {part} imports {imported}"


@pytest.mark.parametrize("path", sorted((ROOT / "VTP").rglob("*.py")), ids=lambda p: p.name)
def test_the_tokenizer_network_stands_alone(path):
    """`VTP/vtp` imports nothing of mmdit: a clone of the public release may stand in its place."""
    assert not list(imports(path))


def counted(nodes: Iterable[ast.AST]) -> int:
    """Return how many statements there are, those of inner blocks included."""
    return sum(isinstance(node, ast.stmt) for node in nodes)


@pytest.mark.parametrize(
    "path", FILES + sorted((ROOT / "VTP").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_modules_and_functions_hold_few_statements(path):
    """A limit of statements, not of lines: a limit of lines rewards packing several thoughts into
    one."""
    nodes = nodes_of(path)
    assert counted(nodes) <= (70 if path.parent.name == "scripts" else 320)
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            assert counted(ast.walk(node)) <= 66, (
                f"{path}:{node.lineno}: {node.name} is too long to be read at once"
            )


def test_optional_packages_are_not_imported_at_package_import():
    """torchvision, timm, transformers, av … are imported where they are used (DESIGN section 7)."""
    optional = {
        "torchvision",
        "timm",
        "transformers",
        "av",
        "accelerate",
        "pyarrow",
        "tensorboard",
        "wandb",
        "trackio",
        "flash_attn",
        "peft",
        "huggingface_hub",
    }
    for path in FILES + sorted((ROOT / "VTP").rglob("*.py")):
        for node in tree_of(path).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found = {name.split(".")[0] for name in names} & optional
            assert not found, f"{path}:{node.lineno} imports {found} at module level"


# ── names ─────────────────────────────────────────────────────────────────────────────────────────
def named_modules() -> dict[str, list[str]]:
    """Return the modules of mmdit by their name alone; scripts are named as their commands."""
    modules: dict[str, list[str]] = {}
    for path in FILES:
        if path.parent.name != "scripts" and not path.stem.startswith("__"):
            modules.setdefault(path.stem, []).append(path.relative_to(ROOT).as_posix())
    return modules


def test_no_two_modules_have_one_name():
    assert not [paths for paths in named_modules().values() if len(paths) > 1]


# Packages whose name is no section of the config: `training.trainer` can only mean a module.
PACKAGES = [
    "adapters",
    "commands",
    "diagnostics",
    "experiment",
    "interop",
    "mmdit",
    "models",
    "scripts",
    "text_encoders",
    "tokenizers",
    "training",
    "ui",
]


EVERYTHING = [
    f"/{path.relative_to(ROOT).as_posix()}"
    for folder in ("mmdit", "tests", "benchmarks", "examples", "VTP")
    for path in (ROOT / folder).rglob("*.py")
]


def missing_names(text: str) -> list[str]:
    """Return the modules that a source names and that do not exist: paths such as `nn/tiles.py`,
    dotted names in backquotes such as `training.trainer`."""
    missing = []
    for name in re.findall(r"(?<![\w/.*<{-])((?:\w+/)*\w+\.py)\b", text):
        if not any(file.endswith(f"/{name}") for file in EVERYTHING):
            missing.append(name)
    for package, module in re.findall(rf"`(?:mmdit\.)?({'|'.join(PACKAGES)})\.(\w+)[\w.]*`", text):
        if package == "mmdit":
            continue
        place = ROOT / "mmdit" / package
        is_module = (place / f"{module}.py").is_file() or (place / module).is_dir()
        if not is_module and not re.search(rf"\b{module}\b", (place / "__init__.py").read_text()):
            missing.append(f"{package}.{module}")
    return missing


def docstrings(path: Path) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in nodes_of(path) if isinstance(node, documented)]
    return "\n".join(ast.get_docstring(node) or "" for node in nodes)


def test_a_name_of_a_module_that_is_not_there_is_seen():
    text = "see nn/tiles.py, nn/gone.py, `training.trainer`, `training.stored`, `mmdit.models.gone`"
    assert missing_names(text) == ["nn/gone.py", "training.stored", "models.gone"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_modules_that_exist(path):
    assert not missing_names(docstrings(path))
