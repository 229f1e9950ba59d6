"""Tables and text on terminals of all widths."""

from __future__ import annotations

from array import array

import pytest

from ivshmem.bench.noise import Noise
from ivshmem.bench.result import ResultGroup
from ivshmem.cli import bench, status_text, tables, terminal, top
from ivshmem.cli import doctor as doctor_command
from ivshmem.cli.browser import Browser
from ivshmem.doctor.check import Check

ROWS = [["NAME", "A", "SIZE", "B"], ["one", "1", "4096", "x"], ["three", "22", "64", "yy"]]


def test_as_wide_as_it_is() -> None:
    assert tables.table(ROWS, right=[1, 2]) == [
        "NAME    A  SIZE  B",
        "one     1  4096  x",
        "three  22    64  yy",
    ]


@pytest.mark.parametrize("room", range(1, 40))
def test_the_least_important_columns_go_with_a_mark(room: int) -> None:
    lines = tables.table(ROWS, columns=room, expendable=[3, 1])
    assert all(len(line) <= room for line in lines)
    heads = lines[0].split()
    if room >= 19:
        assert heads == ["NAME", "A", "SIZE", "B"]
    elif room == 18:
        assert heads == ["NAME", "A", "SIZE", tables.MARK]
    elif room >= 14:
        assert heads == ["NAME", "SIZE", tables.MARK]


def test_wide_characters_take_two() -> None:
    assert tables.width("\u4e16\u754c") == 4
    assert tables.width("e\u0301") == 1
    assert tables.width("\u0e19\u0e49\u0e33") == 2  # a tone mark of Thai
    assert tables.width("\u0e01\u0e34") == 1  # a vowel sign of Thai, without a combining class
    assert tables.width("\u1100\u1161") == 2  # a syllable of Hangul, in two letters
    assert tables.cut("\u4e16\u754c", 3) == "\u4e16>"
    assert tables.cut("\u4e16\u754c", 2) == ">"
    first, second = tables.table([["\u4e16", "x"], ["ab", "y"]])
    assert tables.width(first) == tables.width(second)


@pytest.mark.parametrize("room", [0, 24, 40, 80])
def test_text_is_broken_between_words(room: int) -> None:
    text = "one two three four five six seven eight nine ten " + "x" * 60
    lines = tables.wrapped(text, room)
    assert " ".join(lines) == text
    assert all(len(line) <= room or " " not in line for line in lines)


def test_a_line_that_is_cut_has_a_mark() -> None:
    for room in range(12):
        for text in ("", "0123456789", "01234"):
            shown = tables.cut(text, room)
            assert len(shown) <= room
            assert shown == text if len(text) <= room else shown[-1:] in (tables.MARK, "")


PEER = {
    "id": 1,
    "pid": 1000,
    "uid": 0,
    "process": "qemu-system-x86_64",
    "names": ["web"],
    "vectors": 2,
    "since": 0.0,
    "readonly": False,
    "set_up": True,
    "pending": 3,
    "stalled_since": None,
    "interrupts": [0, 1],
}


@pytest.mark.parametrize("room", [12, 20, 30, 40, 50, 60, 80, 100, 200])
def test_top_and_status(room: int) -> None:
    head, row = status_text.table([status_text.peer_row(PEER, 60.0)], room)
    assert max(len(head), len(row)) <= room
    assert "ID" in head
    assert "web" in row or room < 30
    assert head.endswith(tables.MARK) == (room < 100)


def test_top_asks_how_wide_the_screen_is() -> None:
    status = {
        "server": {
            "pid": 1,
            "version": "0",
            "time": 1.0,
            "since": 0.0,
            "fds": {"open": 1, "limit": None},
            "resident": 1,
            "cpu": 0.0,
        },
        "regions": [
            {
                "name": "default",
                "size": 4096,
                "source": "posix",
                "memory": "m",
                "socket": "/s",
                "vectors": 2,
                "paused": "",
                "counts": {},
                "peers": [PEER],
            }
        ],
    }
    content = list(top.content_of(status, None, {}))
    lines = [line.text for line in Browser().lines(content, 60, 24)]
    (head,) = (line for line in lines if line.lstrip().startswith("ID"))
    assert len(head) <= 60
    assert head.endswith(tables.MARK)


# -- bench ----------------------------------------------------------------------------------------


def group(*, spoilt: bool = False, compared: bool = True) -> ResultGroup:
    noise = Noise(1.0 if spoilt else 0.0, ())
    found = ResultGroup("round trip of two processes")
    first = found.add("eventfds alone", size=4096)
    first.add(array("Q", [10_000] * 200), noise)
    if compared:
        other = found.add("ring and wait", first, size=4096)
        other.add(array("Q", [12_000] * 200), noise)
    return found


@pytest.mark.parametrize("room", [20, 24, 30, 40, 42, 43, 50, 60, 70, 79, 120])
def test_bench(room: int) -> None:
    head, *rows = bench._table(group(), room)
    assert head.endswith(tables.MARK) == (room < 78)
    assert max(map(len, [head, *rows])) <= room
    assert all(row.rstrip()[-1].isdigit() for row in rows)
    assert "p50" in head


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        (
            [group()],
            "In short: ring and wait takes 1.20 times as long as eventfds alone (12.0 microseconds,"
            " round trip of two processes).",
        ),
        (
            [group(spoilt=True)],
            "In short: ring and wait takes 1.20 times as long as eventfds alone (12.0 microseconds,"
            " round trip of two processes) on this machine, which was busy.",
        ),
        (
            [group(compared=False)],
            "In short: a round trip of two processes takes 10.0 microseconds, and 99 of 100 take at"
            " most 10.0.",
        ),
        ([], "In short: nothing could be measured here."),
    ],
)
def test_a_verdict_in_one_sentence(groups: list[ResultGroup], sentence: str) -> None:
    assert bench.verdict(groups) == sentence


# -- doctor ---------------------------------------------------------------------------------------

CHECKS = [
    Check("host", "kernel", "ok", "Linux 6.1, which is " + "quite " * 20 + "new"),
    Check("host", "socket", "failed", "no /run/s", "ivshmem serve " + "--option " * 20),
]


@pytest.mark.parametrize("room", [24, 40, 52, 53, 80, 200])
@pytest.mark.parametrize("colour", [True, False])
def test_doctor_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: int, colour: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(room))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert doctor_command._print("host", iter(CHECKS)) == 1
    text = capsys.readouterr().out
    assert ("\033[" in text) == colour
    lines = text.replace("\033[32m", "").replace("\033[31m", "").replace("\033[0m", "").splitlines()
    (fix,) = (line for line in lines if "fix: " in line)
    assert fix.endswith(CHECKS[1].fix)  # one line to paste
    assert all(len(line) <= room for line in lines if line != fix)
    assert lines[-1] == "1 failed"


def test_doctor_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    doctor_command._print("host", iter(CHECKS))
    text = capsys.readouterr().out
    assert "\033" not in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize(
    ("states", "line"),
    [
        ("ok ok", "all is well"),
        ("ok skipped", "all is well, 1 not checked"),
        ("ok warning", "no check failed, 1 warning"),
        ("warning warning skipped", "no check failed, 2 warnings, 1 not checked"),
        ("failed", "1 failed"),
        ("failed warning failed skipped", "2 failed, 1 warning, 1 not checked"),
    ],
)
def test_the_last_line_of_doctor(
    capsys: pytest.CaptureFixture[str], states: str, line: str
) -> None:
    checks = [Check("host", "x", state, "y") for state in states.split()]  # type: ignore[arg-type]
    assert doctor_command._print("host", iter(checks)) == ("failed" in states)
    assert capsys.readouterr().out.splitlines()[-1] == line


# -- colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, True),
        ({"NO_COLOR": ""}, True),  # as no-color.org has it
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "0"}, False),
        ({"CLICOLOR": "0"}, False),
        ({"CLICOLOR": "1"}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_who_wants_colours(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool
) -> None:
    for name in ("NO_COLOR", "CLICOLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert terminal.coloured() == coloured
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert not terminal.coloured()
    assert terminal.columns() is None
