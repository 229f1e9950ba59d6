"""What the package can say: the texts in its source."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import ivshmem

HOME = Path(ivshmem.__file__).parent
SOURCE = Path(__file__).parents[2] / "src/ivshmem"  # has the files in Cython, too


def texts(path: Path) -> Iterator[str]:
    """What a module can say: its strings, with X where a value goes, without its docstrings."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
                else "X"
                for part in node.values
            )
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.value
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            todo.extend(ast.iter_child_nodes(node))


@functools.cache  # not at import: each worker imports this file, and to read takes a second
def said() -> list[tuple[Path, str]]:
    """What the modules can say, and where."""
    return [
        (path.relative_to(HOME), text)
        for path in sorted(HOME.rglob("*.py"))
        for text in texts(path)
        if " " in text
    ]


@functools.cache
def said_in_cython() -> list[str]:
    """The same of the modules in Cython: strings that follow one another, as one."""
    return [
        re.sub(r"\{[^}]*\}", "X", "".join(re.findall(r'"([^"]*)"', run)))
        for path in SOURCE.rglob("*.pyx")
        for run in re.findall(r'(?:f?"[^"\n]*"\s*)+', path.read_text())
    ]
