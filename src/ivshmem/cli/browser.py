"""Tables that a person sorts, filters and scrolls by keys, live.

Knows: keys, what is shown of tables on a screen of some size. Does not know: terminals (screen.py),
where the rows come from.

This is our own: with curses, textual or rich more would be written here than this file has. Each
would still need the sorting, the filter and the scrolling; none keeps what screen.py keeps
(signals, a terminal that nobody reads); and a guest would need a library.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..system.time_limits import left_until
from . import screen
from .screen import Line, Style
from .tables import Row, Sortable

_LOOK = 1.0  # seconds after which `ended` is asked again
_MOST_FILTER = 64  # characters

_HELP = """\
q        end
h ?      this help; any key leaves it
s S      sort by the next column, by the one before (also: > <, Right and Left)
r        reverse the order
u        the order without sorting
/        show only rows with a text: type it, then Enter. Esc shows all
Up Down  scroll by a line (also: k j)
PgUp PgDn  scroll by a screen (also: b Space)
Home End   to the begin, to the end (also: g G)
Ctrl-Z   stop; `fg` continues""".splitlines()


Content = Sequence[str | Sortable]  # the first one is a line that always stays


class _Placed(NamedTuple):
    """A line, and the one that is the head of its table."""

    line: Line
    head: int | None = None


class Browser:
    """What a person has chosen to see."""

    def __init__(self) -> None:
        self.sorted_by: str | None = None
        self.filter = ""
        self._reversed = False
        self._top = 0
        self._typing = False
        self._helping = False
        self._columns: list[str] = []  # that can be sorted by
        self._right: set[str] = set()  # those that are numbers
        self._room = 1
        self._length = 0

    # -- keys -------------------------------------------------------------------------------------

    def press(self, key: str) -> bool:
        """Do what a key says; return False if that is to end."""
        if self._typing:
            self._edit(key)
        elif self._helping:
            self._helping = False
        elif key in ("q", "Q"):
            return False
        elif key in ("h", "?"):
            self._helping = True
        elif key == "/":
            self._typing = True
        elif key == "esc":
            self.filter = ""
        elif key == "r":
            self._reversed = not self._reversed
        elif key == "u":
            self.sorted_by, self._reversed = None, False
        elif key in ("s", ">", "right", "S", "<", "left"):
            self._sort(1 if key in ("s", ">", "right") else -1)
        else:
            self._scroll(key)
        return True

    def _edit(self, key: str) -> None:
        if key in ("enter", "esc"):
            self._typing = False
            self.filter = self.filter if key == "enter" else ""
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.filter = (self.filter + key)[:_MOST_FILTER]

    def _sort(self, step: int) -> None:
        around = [None, *self._columns]
        at = around.index(self.sorted_by) if self.sorted_by in around else 0
        self.sorted_by = around[(at + step) % len(around)]
        self._reversed = False

    def _scroll(self, key: str) -> None:
        screenful = max(self._room - 1, 1)
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -screenful, "b": -screenful}
        steps |= {"pagedown": screenful, " ": screenful, "home": -self._top, "g": -self._top}
        steps |= {"end": self._length, "G": self._length}
        self._top = max(self._top + steps.get(key, 0), 0)

    # -- what is shown ----------------------------------------------------------------------------

    def lines(self, content: Content, columns: int, rows: int) -> list[Line]:
        """Return what a screen of this size shows."""
        first, *parts = content
        body = list(self._body(parts, columns))
        if self._helping:
            body = [_Placed(Line(line)) for line in _HELP]
        foot = rows > 3  # or it would take the place of what is asked for
        self._room = max(rows - 1 - foot, 0)
        self._length = len(body)
        self._top = min(self._top, max(len(body) - self._room, 0))
        top = 0 if self._helping else self._top
        shown = body[top : top + self._room]
        if shown and shown[0].head is not None and shown[0].head < top:
            shown[0] = body[shown[0].head]  # what the columns are can always be seen
        lines = [Line(str(first), Style.TITLE), *(placed.line for placed in shown)]
        if foot:
            lines += [Line("")] * (rows - 1 - len(lines))
            lines.append(Line(self._foot(top, len(body)), Style.BAR))
        return lines[:rows]

    def _body(self, parts: Sequence[str | Sortable], columns: int) -> Iterator[_Placed]:
        self._columns, self._right = [], set()
        number = 0
        for part in parts:
            if isinstance(part, str):
                yield _Placed(Line(part))
                number += 1
                continue
            self._columns += [name for name in part.head if name not in self._columns]
            self._right |= {part.head[at] for at in part.right}
            chosen = self._chosen(part)
            head, *texts = part._replace(rows=chosen).lines(columns)
            at = number
            yield _Placed(Line(head, Style.BAR), at)
            for row, text in zip(chosen, texts, strict=True):
                yield _Placed(Line(text, Style.ALARM if row.alarm else Style.PLAIN), at)
            number += 1 + len(texts)

    def _chosen(self, part: Sortable) -> list[Row]:
        """The rows that are shown, in their order."""
        wanted = self.filter.lower()
        rows = [row for row in part.rows if any(wanted in cell.lower() for cell in row.cells)]
        if self.sorted_by is not None and self.sorted_by in part.head:
            at = list(part.head).index(self.sorted_by)
            rows.sort(
                key=lambda row: (row.keys[at] is not None, row.keys[at] or type(row.keys[at])()),
                reverse=self._descends(),
            )
        elif self._reversed:
            rows.reverse()
        return rows

    def _descends(self) -> bool:
        """Of numbers, those come first that are the largest."""
        return (self.sorted_by in self._right) != self._reversed

    def _foot(self, top: int, length: int) -> str:
        if self._typing:
            return f"show only rows with: {self.filter}_"
        order = "as it comes" if self.sorted_by is None else self.sorted_by
        if self.sorted_by is not None:
            order += " descending" if self._descends() else " ascending"
        elif self._reversed:
            order += " reversed"
        parts = ["q end", "h help", f"s sort: {order}"]
        parts.append(f"/ only: {self.filter} (Esc: all)" if self.filter else "/ filter")
        if length > self._room:
            parts.insert(0, f"{top + 1}-{min(top + self._room, length)} of {length}")
        return "  ".join(parts)


def browse(
    first: Content,
    following: Callable[[], Content],
    interval: float,
    *,
    count: int | None = None,
    ended: Callable[[], bool] | None = None,
) -> None:
    """Show contents until q, Ctrl-C, or the last of `count` contents after the first.

    Args:
        following: asked for the next content after each interval, in seconds.
        ended: whether the next content is to be asked for at once.

    Raises:
        ValueError: standard input and output are not a terminal.
        SystemExit: as of `screen.shown`.
    """
    browser, content, shown_times = Browser(), first, 0
    with contextlib.suppress(KeyboardInterrupt), screen.shown() as shown:
        due = time.monotonic() + interval
        while True:
            shown.draw(browser.lines(content, *shown.size()))
            left = left_until(due)
            key = shown.key(left if ended is None else min(left, _LOOK))
            if (key and not browser.press(key)) or shown_times == count:
                break
            if time.monotonic() >= due or (ended is not None and ended()):
                content = following()
                due = time.monotonic() + interval
                shown_times += 1
