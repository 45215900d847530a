"""Text in files is UTF-8 wherever the machine's own encoding is another: every reading and writing
says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "mmdit").rglob("*.py"), *(ROOT / "VTP").rglob("*.py")])
FOREIGN = {"Image", "av", "os", "webbrowser", "self"}  # whose open is not the one of files


def unnamed(tree: ast.AST):
    """Yield the line of every call that opens, reads or writes text and names no encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        called, given = node.func, list(node.args)
        if isinstance(called, ast.Attribute):
            if isinstance(called.value, ast.Name) and called.value.id in FOREIGN:
                continue
            name, mode = called.attr, given[0] if given else None
        elif isinstance(called, ast.Name) and called.id != "read_text":  # of mmdit.files: UTF-8
            name, mode = called.id, given[1] if len(given) > 1 else None
        else:
            continue
        words = {word.arg: word.value for word in node.keywords}
        mode = words.get("mode", mode)
        binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        if name in ("read_text", "write_text") or (name in ("open", "fdopen") and not binary):
            yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_names_its_encoding(path):
    lines = list(unnamed(ast.parse(path.read_text(encoding="utf-8"))))
    assert not lines, f"{path}:{lines}: give encoding='utf-8'"


@pytest.mark.parametrize(
    "wrong",
    [
        "p.read_text()",
        "p.write_text(t)",
        "open(p)",
        "open(p, 'w')",
        "p.open()",
        "p.open('a')",
        "open(p, mode='r')",
        "(a / b).write_text(json.dumps(x))",
    ],
)
def test_what_names_none_is_found(wrong):
    assert list(unnamed(ast.parse(wrong))) == [1]
    assert not list(unnamed(ast.parse(f"{wrong[:-1]}, encoding='utf-8')".replace("(, ", "("))))


def test_binary_files_need_none():
    assert not list(
        unnamed(ast.parse("open(p, 'rb'); p.open('ab'); Image.open(p); open(p, mode='xb')"))
    )
