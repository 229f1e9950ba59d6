"""No code stands in two modules: seven equal lines, of which a change would miss some.

Comments, docstrings, imports, signatures and lines without a word do not count.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).parents[2] / "src/ivshmem"
LINES = 7


def code(source: str) -> list[tuple[int, str]]:
    """The lines that count, with their numbers."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left_out.update(range(node.lineno, node.body[0].lineno))
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip().partition("  #")[0]
        if number not in left_out and not text.startswith("#") and re.search(r"\w", text):
            found.append((number, text))
    return found


def twice(sources: dict[str, str]) -> Iterator[str]:
    """Where code stands that another module has, too."""
    first: dict[tuple[str, ...], str] = {}
    for name, source in sources.items():
        lines = code(source)
        for at in range(len(lines) - LINES + 1):
            place = f"{name}:{lines[at][0]}"
            here = tuple(text for _, text in lines[at : at + LINES])
            there = first.setdefault(here, place)
            if there.partition(":")[0] != name:
                yield f"{place} is as {there}"


def test_code_stands_once() -> None:
    sources = {str(path.relative_to(HOME)): path.read_text() for path in HOME.rglob("*.py")}
    assert len(sources) > 100
    assert not list(twice(sources))


def test_the_reader_can_fail() -> None:
    same = "\n".join(f"    x{number} = f()  # {{}}" for number in range(7))
    one = f'import os\ndef f():\n    """Docs."""\n{same}\n'
    other = f"class A:\n{same}\n    y = 1\n"
    assert list(twice({"a": one.format(*"1234567"), "b": other})) == ["b:2 is as a:4"]
    assert not list(twice({"a": one, "b": other.replace("x6", "z6")}))
    signature = "def f(\n" + "\n".join(f"    a{n}," for n in range(9)) + "\n):\n    pass\n"
    assert not list(twice({"a": signature, "b": signature}))
