"""Lines and tables as wide as a terminal is.

Knows: how many columns a text takes, what is omitted where there is no room. Does not know:
terminals, what the text says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..system.named_tuple import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MARK = ">"  # at the end of a line, or of a table's head: there is more than is shown

_LEAST = 9  # columns that a column keeps which is squeezed
_LEAST_TEXT = 24  # columns that a text gets beside a name
_NARROW_INDENT = 4  # of a text below a name


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
    widths: Mapping[int, int] | None = None,
    squeezed: int | None = None,
    gap: int = 2,
) -> list[str]:
    """Return rows, the first one being the head, as columns of text.

    Args:
        right: numbers of the columns that are flush right.
        columns: of the terminal; None: as many as the table takes.
        expendable: numbers of the columns that are omitted if there is no room, the first ones
            first. A mark at the end of the head says that some are.
        widths: of columns that are at least so wide, so that several tables are aligned.
        squeezed: number of the column whose text is cut if there is still no room then.
        gap: spaces between two columns.
    """
    cells = [list(row) for row in rows]
    wide = [max(map(width, column)) for column in zip(*cells, strict=True)]
    for at, least in (widths or {}).items():
        wide[at] = max(wide[at], least)
    shown = list(range(len(wide)))
    dropped = list(expendable)
    while columns is not None and dropped and _total(wide, shown, gap) > columns:
        shown.remove(dropped.pop(0))
    if columns is not None and squeezed is not None:
        spare = columns - _total(wide, shown, gap)
        wide[squeezed] = max(wide[squeezed] + min(spare, 0), _LEAST)
        for row in cells:
            row[squeezed] = cut(row[squeezed], wide[squeezed])
    flush_right = set(right)
    space = " " * gap
    lines = [
        space.join(_padded(row[at], wide[at], right=at in flush_right) for at in shown).rstrip()
        for row in cells
    ]
    if len(shown) < len(wide):
        lines[0] += f"  {MARK}"
    return lines if columns is None else [cut(line, columns) for line in lines]


def _total(widths: Sequence[int], shown: Sequence[int], gap: int) -> int:
    mark = 0 if len(shown) == len(widths) else len(MARK) + 2
    return sum(widths[at] for at in shown) + gap * (len(shown) - 1) + mark


class Row(NamedTuple):
    """A row of a table that can be sorted.

    Attributes:
        keys: what its cells are sorted by: a number, a text, or None, which is the least.
        alarm: somebody should look at this row.
    """

    cells: Sequence[str]
    keys: Sequence[Any]
    alarm: bool = False


class Sortable(NamedTuple):
    """Rows under a head, in the order in which they are shown as long as nobody sorts them.

    The other attributes are those of `table`; `indent`: columns that stay free before it.
    """

    head: Sequence[str]
    rows: Sequence[Row]
    right: Iterable[int] = ()
    expendable: Sequence[int] = ()
    squeezed: int | None = None
    indent: int = 0

    def lines(self, columns: int | None) -> list[str]:
        """Return it as `table` does."""
        lines = table(
            [self.head, *(row.cells for row in self.rows)],
            right=self.right,
            columns=None if columns is None else max(columns - self.indent, 1),
            expendable=self.expendable,
            squeezed=self.squeezed,
        )
        return [" " * self.indent + line for line in lines]


def entry(name: str, text: str, *, indent: int, columns: int) -> list[str]:
    """Return a name, and a text beside it from column `indent` on, wrapped; one entry of a list.

    A list whose entries are printed one by one cannot know how wide a table of them would be. If
    `columns` leaves the text no room there, the text stands below the name.
    """
    beside = columns >= indent + _LEAST_TEXT
    left = indent if beside else _NARROW_INDENT
    lines = wrapped(text, columns - left)
    first = [_padded(name, indent, right=False) + lines.pop(0)] if beside else [name]
    return first + [" " * left + line for line in lines]


def _padded(text: str, columns: int, *, right: bool) -> str:
    room = " " * (columns - width(text))
    return room + text if right else text + room


def duration(seconds: float) -> str:
    """So long, in the two units that matter."""
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes, whole = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {whole:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02} h"
