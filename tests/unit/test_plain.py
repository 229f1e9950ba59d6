"""Words of strangers: what a terminal would obey is written out, and nothing else is touched."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import unicodedata

import pytest

from ivshmem.text import MARK, MOST, command, paragraph, plain, quoted

WRITTEN_OUT: dict[str, tuple[str | bytes, str]] = {
    "escape sequence": ("a\x1b[31mred", r"a\x1b[31mred"),
    "newline": ("a\nfix: rm -rf /", r"a\nfix: rm -rf /"),
    "carriage return": ("a\rok", r"a\rok"),
    "tab": ("a\tb", r"a\tb"),
    "bell": ("\a", r"\x07"),
    "backspace": ("ab\b\bok", r"ab\x08\x08ok"),
    "NUL": ("a\0b", r"a\x00b"),
    "delete": ("\x7f", r"\x7f"),
    "C1: CSI in one character": ("\x9b31m", r"\u009b31m"),
    "C1: next line": ("a\x85b", r"a\u0085b"),
    "OSC, title": ("\x1b]0;owned\a", r"\x1b]0;owned\x07"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "paragraph separator": ("a\u2029b", r"a\u2029b"),
    "bidi override": ("\u202egpj.exe", r"\u202egpj.exe"),
    "bidi embedding": ("\u202a\u202b\u202c", r"\u202a\u202b\u202c"),
    "bidi isolates": ("\u2066\u2067\u2068\u2069", r"\u2066\u2067\u2068\u2069"),
    "bidi marks": ("\u200e\u200f\u061c", r"\u200e\u200f\u061c"),
    "zero width": ("ro\u200bot\u200c\u200d\u2060\ufeff", r"ro\u200bot\u200c\u200d\u2060\ufeff"),
    "soft hyphen": ("ro\xadot", r"ro\u00adot"),
    "spaces that are none": ("a\xa0\u3000b", r"a\u00a0\u3000b"),
    "variation selector": ("a\ufe0f", r"a\ufe0f"),
    "variation selector, supplement": ("a\U000e0101", r"a\U000e0101"),
    "Hangul filler": ("\u3164", r"\u3164"),
    "Braille blank": ("\u2800", r"\u2800"),
    "tag characters": ("\U000e0041", r"\U000e0041"),
    "private use": ("\ue000", r"\ue000"),
    "unassigned": ("\U000fffff\u0378", r"\U000fffff\u0378"),
    "byte that is not UTF-8": ("a\udcff", r"a\xff"),
    "lone surrogate": ("\ud800", r"\ud800"),
    "bytes": (b"x\xc3\xa9\xff\x1b", "x\xe9\\xff\\x1b"),
}

LEFT_ALONE = [
    "",
    "qemu-system-x86_64 -name vm1,process=web",
    "/tmp/a b,c'd\"e\\f",
    "Gr\xfc\xdfe, \u4e16\u754c, \u05e9\u05dc\u05d5\u05dd, \u0e20\u0e32\u0e29\u0e32, \U0001f680",
    "e\u0301",  # a letter and its accent
]


@pytest.mark.parametrize("case", WRITTEN_OUT)
def test_it_is_written_out(case: str) -> None:
    text, shown = WRITTEN_OUT[case]
    assert plain(text) == shown
    assert plain(shown) == shown


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_it_is_left_alone(text: str) -> None:
    assert plain(text) == text
    assert quoted(text) == shlex.quote(text)


def test_of_all_characters_only_visible_ones_are_left() -> None:
    bad = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    for code in [*range(0x3400), *range(0xD7A0, 0x10000), *range(0x10000, sys.maxunicode, 997)]:
        shown = plain(chr(code))
        assert shown.isprintable()
        shown.encode()
        if unicodedata.category(chr(code)) in bad:
            assert shown.isascii()
            assert shown.startswith("\\")


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("x" * 10, 10, "x" * 10),
        ("x" * 11, 10, "x" * 7 + MARK),
        ("\xe9" * 10, 10, "\xe9" * 10),
        ("\xe9" * 11, 10, "\xe9" * 7 + MARK),
        ("\x1b" * 2, 8, r"\x1b\x1b"),
        ("\x1b" * 3, 8, r"\x1b" + MARK),  # no escape is cut in two
        (b"\xff" * 100, 11, r"\xff\xff" + MARK),
    ],
)
def test_what_is_too_long_is_marked(text: str | bytes, most: int, shown: str) -> None:
    assert plain(text, most) == shown
    assert len(shown) <= most
    assert plain(shown, most) == shown


def test_a_megabyte_is_bounded() -> None:
    for text in ("a" * 10**6, "\x1b" * 10**6, "\u4e16" * 10**6, b"\xff" * 10**6):
        assert MOST - 10 <= len(plain(text)) <= MOST


@pytest.mark.parametrize("word", [*LEFT_ALONE, "a\x1b[1m'\\\n\u202e\xe9", "a\udcff'", "$(id)\t"])
@pytest.mark.skipif(not shutil.which("bash"), reason="bash reads $'..' back")
def test_a_shell_reads_it_back(word: str) -> None:
    line = command(["printf", "%s", word])
    assert plain(line) == line
    done = subprocess.run(["bash", "-c", line], check=True, stdout=subprocess.PIPE)
    assert done.stdout == word.encode(errors="surrogateescape")


def test_only_the_first_line_of_a_paragraph_can_be_taken_for_ours() -> None:
    text = "failed\nTraceback\n  File\x1b\nivshmem: peer 3 joined"
    assert paragraph(text).split("\n") == [
        "failed",
        "    Traceback",
        r"      File\x1b",
        "    ivshmem: peer 3 joined",
    ]
