"""How the code reads: what the formatter cannot see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mmdit", "VTP/vtp", "benchmarks", "examples")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Names that say nothing: CONTRIBUTING.md has a glossary of what to write instead.
VAGUE = {
    *("own", "told", "found", "kind", "kinds", "marks", "course", "rungs", "twin", "aside"),
    *("settle", "climb", "judged", "homes", "lay", "serve", "serves"),
}
NO_VERB = re.compile(
    r"(Of|What|Whether|How|As|That|So|Where|When|The|A|An|One|All|Each|Every|From|For|In|Two|Its|No"
    r"|Which|Who|This|These|If|With|By|At|On|To|Without|Between|Such|Only|Also|Both|Other|Here)\b"
)


def names_bound(nodes: list[ast.AST]):
    """Yield `(line, name)` of all that is defined: functions, arguments, variables, fields."""
    for node in nodes:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def golf(nodes: list[ast.AST]):
    """Yield `(line, what)` for expressions that hold more than one thought."""
    for node in nodes:
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(isinstance(argument, ast.NamedExpr) for argument in arguments):
                yield node.lineno, "a walrus in an argument list"
        if isinstance(node, COMPREHENSIONS):
            inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
            if len(inner) > 1:
                yield node.lineno, "a comprehension inside a comprehension"
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Add, ast.Sub)):
            for side in (node.left, node.right):
                if isinstance(side, (ast.Compare, ast.BoolOp)) or (
                    isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.Not)
                ):
                    yield node.lineno, "a condition used as a number"
        if isinstance(node, ast.Subscript):
            index = node.slice
            if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.Not):
                yield node.lineno, "a condition used as an index"
        if isinstance(node, (ast.JoinedStr, ast.BinOp)) and _conditional_text(node):
            yield node.lineno, "a message put together around a condition"


def _conditional_text(node: ast.AST) -> bool:
    """Return whether a message holds a conditional between two other pieces of text."""
    if isinstance(node, ast.BinOp):
        if not isinstance(node.op, ast.Add):
            return False
        sides = [node.left, node.right]
        text = any(
            isinstance(side, ast.JoinedStr)
            or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in sides
        )
        return text and any(isinstance(side, ast.IfExp) for side in sides)
    return any(
        isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.IfExp)
        for part in node.values
    )


def documented(nodes: list[ast.AST]):
    """Yield `(line, docstring)` of every function that has one."""
    for node in nodes:
        text = ast.get_docstring(node) if isinstance(node, FUNCTIONS) else None
        if text:
            yield node.lineno, text


def findings(path: Path) -> list[str]:
    """Return what a reader would stumble over in one file, as `line: what`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    problems = [f"{line}: the name {name!r}" for line, name in names_bound(nodes) if name in VAGUE]
    problems += [f"{line}: {what}" for line, what in golf(nodes)]
    for line, text in documented(nodes):
        if NO_VERB.match(text):
            problems.append(
                f"{line}: the docstring does not begin with a verb: {text.split('.')[0]}"
            )
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_reads_well(path):
    assert not findings(path)


def test_the_formatter_and_the_linter_have_nothing_to_say():
    for words in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:]


if __name__ == "__main__":  # what is left, file by file: python tests/test_style.py [PATH ...]
    for path in [Path(word).resolve() for word in sys.argv[1:]] or FILES:
        for line in findings(path):
            print(f"{path.relative_to(ROOT)}:{line}")
