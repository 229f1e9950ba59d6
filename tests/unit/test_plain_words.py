"""Messages and `--help` are in plain technical English: foreign turns do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).parents[2] / "src/ivshmem"

# A turn, and what to write instead.
TURNS = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bmeanwhile\b": "while",
    r"(?<!there )\b(is|are|was|were) no\b(?! longer)(?! more)": "is not a",
    r"\bbut for\b": "except",
    r"\b(to|can|cannot) be had\b": "is available, works",
    r"\bwho(m|so)?ever\b": "every process that",
    r"\b(go|goes|going|went|gone) on\b": "continue",
    r"\b(is|are) wanted\b": "not a ..: what was seen (what is allowed)",
    r"\banew\b": "again",
    r"\bmade (it )?afresh\b": "again",
    r"\b(leave|leaves|left) [^.:;]{0,40}\b(away|out)\b": "omit",
    r"\bhang(s)? up on\b": "disconnect",
    r"\bno news\b|\bnews (again|of)\b": "messages",
    r"\bis to be made\b": "will be created",
    r"\bof another (make|kind)\b": "another server program",
    r"\bamid\b": "during",
    r"\bdo(es)? without\b": "does not need",
}


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that people may read: no docstrings, except those of a shell's commands."""
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            command = isinstance(node, ast.FunctionDef) and node.name.startswith("do_")
            if isinstance(first, ast.Expr) and not command:
                prose.add(first.value)
    yield from _literals(tree, prose)


def _literals(tree: ast.AST, prose: set[ast.expr]) -> Iterator[tuple[int, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.lineno, node.value
        else:
            yield from _literals(node, prose)


def turns(text: str) -> list[str]:
    return [instead for turn, instead in TURNS.items() if re.search(turn, text)]


def test_messages_are_in_plain_english() -> None:
    wrong: list[str] = []
    read = 0
    for path in sorted(HOME.rglob("*.py")):
        for line, text in literals(ast.parse(path.read_text())):
            read += " " in text
            if " " in text and (instead := turns(text)):
                wrong.append(f"{path.relative_to(HOME)}:{line}: {text!r}: write {instead}")
    for path in sorted(HOME.rglob("*.pyx")):
        for line, code in enumerate(path.read_text().splitlines(), 1):
            wrong += [
                f"{path.relative_to(HOME)}:{line}: {text!r}: write {instead}"
                for text in re.findall(r"""["'](.* .*)["']""", code)
                if (instead := turns(text))
            ]
    assert read > 1000
    assert not wrong, "\n".join(wrong)


def test_the_reader_can_fail() -> None:
    source = (
        'def f():\n    """Whoever reads this."""\n    raise E(f"{x!r} is no time" " at all")\n'
        "def do_x():\n    '''x: hang up on a peer'''\n"
    )
    found = dict(literals(ast.parse(source)))
    assert found == {3: "... is no time at all", 5: "x: hang up on a peer"}
    assert [turns(text) for text in found.values()] == [["is not a"], ["disconnect"]]
    assert turns("it goes on") == ["continue"]
    assert not turns("what was there is no longer used")
