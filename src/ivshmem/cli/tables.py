"""Lines and tables as wide as a terminal is.

Knows: how many columns a text takes, what is left out where there is no room. Does not know:
terminals, what the text says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MARK = ">"  # at the end of a line, or of a table's head: there is more than is shown


def width(text: str) -> int:
    """Return the columns of a text that is plain (see text.py): wide characters take two."""
    if text.isascii():
        return len(text)
    # Here: it is an extension module of its own, and most tables are ASCII.
    from unicodedata import category, east_asian_width

    # Not all that takes no column has a combining class: vowel signs of Thai have none, for one.
    return sum(
        0
        if category(character) in ("Mn", "Me") or "\u1160" <= character <= "\u11ff"
        else 2
        if east_asian_width(character) in "WF"
        else 1
        for character in text
    )


def cut(text: str, columns: int) -> str:
    """Return as much of a text as fits, with a mark at its end if that is not all."""
    if width(text) <= columns:
        return text
    while text and width(text) > columns - len(MARK):
        text = text[:-1]
    return f"{text}{MARK}"[: max(columns, 0)]


def wrapped(text: str, columns: int) -> list[str]:
    """Return a text as lines, broken between words; a word that is too long stays whole."""
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}" if lines[-1] else word
        if width(line) <= columns or not lines[-1]:
            lines[-1] = line
        else:
            lines.append(word)
    return lines


def table(
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[int] = (),
    columns: int | None = None,
    expendable: Sequence[int] = (),
) -> list[str]:
    """Return rows, the first one being the head, in columns two spaces apart.

    Args:
        right: numbers of the columns that are flush right.
        columns: of the terminal; None: as many as it takes.
        expendable: numbers of the columns that are left out if there is no room, the first ones
            first. A mark at the end of the head says that some are.
    """
    cells = [list(row) for row in rows]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    shown = list(range(len(widths)))
    dropped = list(expendable)
    while columns is not None and dropped and _total(widths, shown) > columns:
        shown.remove(dropped.pop(0))
    flush_right = set(right)
    lines = [
        "  ".join(_padded(row[at], widths[at], right=at in flush_right) for at in shown).rstrip()
        for row in cells
    ]
    if len(shown) < len(widths):
        lines[0] += f"  {MARK}"
    return lines if columns is None else [cut(line, columns) for line in lines]


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    mark = 0 if len(shown) == len(widths) else len(MARK) + 2
    return sum(widths[at] for at in shown) + 2 * (len(shown) - 1) + mark


def _padded(text: str, columns: int, *, right: bool) -> str:
    room = " " * (columns - width(text))
    return room + text if right else text + room
