"""What keys do to tables, on screens of all sizes. (test_cli_top.py presses them on a terminal.)"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem.cli.browser import Browser, Content
from ivshmem.cli.screen import Style
from ivshmem.cli.tables import Row, Sortable, width

NAMES = ["pear", "fig", "Apple"]
KEYS = [
    *("q", "Q", "h", "?", "/", "esc", "r", "u", "s", "S", ">", "<", "left", "right", "up", "down"),
    *("k", "j", "pageup", "pagedown", "b", " ", "home", "end", "g", "G", "enter", "backspace", "x"),
]


def fruits(count: int = 3) -> Content:
    rows = [
        Row((NAMES[at % 3], str(at)), (NAMES[at % 3], at or None), alarm=at == 1)
        for at in range(count)
    ]
    return ["title", "", Sortable(("NAME", "SIZE"), rows, right=(1,), indent=2)]


class Seen:
    """A browser, and what it shows of some fruits."""

    def __init__(self, content: Content | None = None, columns: int = 40, rows: int = 24) -> None:
        self.browser = Browser()
        self.content = content or fruits()
        self.size = columns, rows
        self.lines()

    def lines(self) -> list[str]:
        return [line.text for line in self.browser.lines(self.content, *self.size)]

    def press(self, *keys: str) -> list[str]:
        for key in keys:
            assert self.browser.press(key)
            self.lines()  # as on a screen: what can be sorted by is known from what is shown
        return self.rows()

    def rows(self) -> list[str]:
        return [line.split()[0] for line in self.lines()[3:-1] if line]

    @property
    def foot(self) -> str:
        return self.lines()[-1]


def test_as_it_comes() -> None:
    seen = Seen()
    lines = seen.lines()
    assert len(lines) == 24
    assert lines[:4] == ["title", "", "  NAME   SIZE", "  pear      0"]
    assert seen.rows() == NAMES
    assert lines[-1] == "q end  h help  s sort: as it comes  / filter"
    styles = [line.style for line in seen.browser.lines(seen.content, 40, 24)]
    assert styles[:6] == [
        *(Style.TITLE, Style.PLAIN, Style.BAR),
        *(Style.PLAIN, Style.ALARM, Style.PLAIN),
    ]
    assert styles[-1] is Style.BAR


@pytest.mark.parametrize("key", ["q", "Q"])
def test_the_end(key: str) -> None:
    assert not Browser().press(key)


def test_sorting() -> None:
    seen = Seen()
    assert seen.press("s") == ["Apple", "fig", "pear"]
    assert "sort: NAME ascending" in seen.foot
    assert seen.press("r") == ["pear", "fig", "Apple"]
    assert "sort: NAME descending" in seen.foot
    assert seen.press(">") == ["Apple", "fig", "pear"]  # numbers: the largest first
    assert "sort: SIZE descending" in seen.foot
    assert seen.press("r") == ["pear", "fig", "Apple"]  # None is the least
    assert seen.press("right") == NAMES
    assert seen.press("left", "<", "S") == NAMES
    assert seen.press("r") == NAMES[::-1]
    assert "as it comes reversed" in seen.foot
    assert seen.press("s", "u") == NAMES


def test_a_column_that_is_gone_sorts_nothing() -> None:
    seen = Seen()
    seen.press("s")
    seen.content = ["title", "", Sortable(("ID",), [Row(("b",), ("b",)), Row(("a",), ("a",))])]
    assert seen.rows() == ["b", "a"]
    assert seen.press("s") == ["a", "b"]


def test_a_filter() -> None:
    seen = Seen()
    assert seen.press("/", "A", "p") == ["Apple"]
    assert seen.foot == "show only rows with: Ap_"
    assert seen.press("backspace", "backspace", "e", "a") == ["pear"]
    assert seen.press("enter") == ["pear"]
    assert "/ only: ea (Esc: all)" in seen.foot
    assert seen.press("esc") == NAMES
    assert seen.press("/", "q", "h", "up") == []  # letters are letters here
    assert seen.press("esc") == NAMES
    assert seen.press("/", *"x" * 100, "enter") == []
    assert len(seen.browser.filter) == 64


def test_help() -> None:
    seen = Seen()
    for key, back in itertools.product(("h", "?"), ("q", "x", "h")):
        seen.press(key)
        assert seen.lines()[1].split() == ["q", "end"]
        assert seen.press(back) == NAMES


def test_each_key_is_in_the_help() -> None:
    seen = Seen()
    seen.press("h")
    text = " ".join(seen.lines()[1:-1]).replace("PgUp", "pageup").replace("PgDn", "pagedown")
    words = {
        " ": "Space",
        "enter": "Enter",
        "esc": "Esc",
        "Q": "q",
        "backspace": "type",
        "x": "any",
    }
    for key in KEYS:
        word = words.get(key, key)
        assert word in text or word.capitalize() in text, key


def test_scrolling() -> None:
    seen = Seen(fruits(100), rows=13)
    assert "1-11 of 102  q end" in seen.foot
    first = seen.lines()[1:3]
    assert first == ["", "  NAME   SIZE"]
    for keys, line in (
        (("down", "j"), "  NAME   SIZE"),  # the head stays
        (("up", "k"), ""),
        (("up",), ""),
        (("end",), "  NAME   SIZE"),
        (("home",), ""),
        (("G", "g"), ""),
    ):
        seen.press(*keys)
        assert seen.lines()[1] == line, keys
    seen.press("pagedown", " ", "b")
    assert seen.foot.startswith("11-21 of 102")
    seen.press("pageup")
    assert seen.foot.startswith("1-11 of 102")
    seen.press("end")
    assert seen.lines()[-2] == "  pear     99"
    assert seen.foot.startswith("92-102 of 102")
    seen.content = fruits(3)  # fewer than before
    assert seen.rows() == NAMES


def test_two_tables_keep_their_own_heads() -> None:
    tables = [Sortable((name,), [Row((f"{name}{at}",), (at,)) for at in range(5)]) for name in "AB"]
    seen = Seen(["title", *tables], rows=6)
    heads = []
    for _ in range(9):
        heads.append(seen.lines()[1])
        seen.press("down")
    assert heads == [*["A"] * 6, *["B"] * 3]


content = st.integers(0, 30).map(fruits)


@given(
    content, st.lists(st.sampled_from(KEYS), max_size=12), st.integers(1, 60), st.integers(1, 30)
)
def test_any_keys_on_any_screen(content: Content, keys: list[str], columns: int, rows: int) -> None:
    """There are never more lines than rows, and nothing is raised."""
    browser = Browser()
    for key in keys:
        browser.press(key)
        lines = browser.lines(content, columns, rows)
        assert 1 <= len(lines) <= rows
        assert lines[0].text == "title"
        tables = [line for line in lines[1:-1] if line.text.startswith("  ")]
        assert all(width(line.text) <= max(columns, 3) for line in tables)
