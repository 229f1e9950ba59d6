"""How a server's state is said: durations, tables, rates, guests' names, lines of the log."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import pytest

from ivshmem.cli import status_text, tables, top
from ivshmem.cli.browser import Browser
from ivshmem.qemu.guest_name import guest_name, guest_of
from ivshmem.server import log_events
from ivshmem.service.metrics import parse_address

PEER: dict[str, Any] = {
    "id": 3,
    "pid": 4711,
    "uid": 64055,
    "gid": 64055,
    "process": "qemu",
    "names": [],
    "vectors": 2,
    "since": 1000.0,
    "readonly": False,
    "set_up": True,
    "pending": 0,
    "stalled_since": None,
    "interrupts": [0, 0],
}


def status(time: float = 1060.0, **counts: int) -> dict[str, Any]:
    region = {
        "name": "default",
        "socket": "/tmp/s",
        "vectors": 2,
        "size": 1 << 20,
        "source": "posix",
        "memory": "shared",
        "paused": "",
        "counts": counts,
        "peers": [],
    }
    server = {
        "pid": 1,
        "version": "0",
        "since": 1000.0,
        "time": time,
        "cpu": (time - 1000) / 100,
        "resident": 3 << 20,
        "fds": {"open": 9, "limit": None},
        "pid_namespace": 0,
    }
    return {"server": server, "regions": [region]}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (86399, "23 h 59 min"),
        (90000, "1 d 01 h"),
        (1e9, "11574 d 01 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


def test_a_table_is_in_columns() -> None:
    rows = [
        status_text.peer_row({**PEER, "guest": "web1", "names": ["db"]}, 1060),
        status_text.peer_row({**PEER, "id": 12, "interrupts": [0, 7]}, 1003),
    ]
    assert status_text.table(rows) == [
        "ID   PID    UID  PROCESS  GUEST OR NAMES  FOR         VECTORS  STATE       INTERRUPTS",
        " 3  4711  64055  qemu     web1, db        1 min 00 s        2  up to date  -",
        "12  4711  64055  qemu     -               3 s               2  up to date  1:7",
    ]


def test_a_table_of_nobody() -> None:
    assert len(status_text.table([])) == 1


def state(**fields: object) -> str:
    return status_text.peer_row({**PEER, **fields}, 1060)[7]


def test_states() -> None:
    assert state() == "up to date"
    assert state(pending=4) == "4 unsent"
    assert state(pending=4, set_up=False) == "4 unsent, setting up"
    assert state(readonly=True) == "read-only"
    assert state(stalled_since=1056.0, pending=4).startswith("stalled since ")
    assert state(stalled_since=1056.0, pending=4).endswith(" (4 s), 4 unsent")


def test_many_interrupts_and_names() -> None:
    row = status_text.peer_row({**PEER, "interrupts": [1] * 10, "names": list("abcde")}, 1060)
    assert row[8] == "0:1 1:1 2:1 3:1 4:1 5:1 6:1 7:1 and 2 more"
    assert row[4] == "a, b, c, .."


def test_lines_of_a_server_and_a_region() -> None:
    found = status()
    assert status_text.server_line(found["server"]) == (
        "server pid 1, ivshmem 0, up 1 min 00 s: 9 of any number of descriptors, 3.0 MiB,"
        " 0.60 s of CPU"
    )
    assert status_text.region_line(found["regions"][0]) == (
        "region default: 1M (posix shared), 2 vectors, on /tmp/s"
    )


def shown(found: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """What `top` shows, on a terminal that is wide and high."""
    lines = Browser().lines(list(top.content_of(found, before, {})), 200, 100)
    return "\n".join(line.text for line in lines[:-1]).rstrip("\n")


class TestTop:
    def test_rates(self) -> None:
        first = shown(status(1060, joins=5))
        assert "per second: - joins, - leaves" in first
        assert "CPU now" not in first
        then = shown(status(1062, joins=8, messages=3), status(1060, joins=5))
        assert "per second: 1.5 joins, 0.0 leaves, 1.5 messages, 0.0 refused" in then
        assert ", 1.0% CPU now" in then

    def test_another_process(self) -> None:
        before = status(1060, joins=50)
        before["server"]["pid"] = 2
        assert "per second: - joins" in shown(status(1062, joins=8), before)

    def test_no_time_between(self) -> None:
        assert "- joins" in shown(status(1062), status(1062))

    def test_a_new_region(self) -> None:
        before = status(1060)
        before["regions"] = []
        assert "- joins" in shown(status(1062, joins=8), before)

    def test_who_needs_attention_comes_first(self) -> None:
        found = status()
        found["regions"][0]["paused"] = "Too many open files"
        found["regions"][0]["peers"] = [
            {**PEER, "id": 1},
            {**PEER, "id": 2, "interrupts": [1, 0]},
            {**PEER, "id": 3, "pending": 1},
            {**PEER, "id": 4, "stalled_since": 1050.0},
            {**PEER, "id": 5, "stalled_since": 1040.0},
        ]
        lines = shown(found).splitlines()
        assert "  newcomers wait: Too many open files" in lines
        assert [line.split()[0] for line in lines[-5:]] == ["5", "4", "3", "2", "1"]


class TestGuestNames:
    @pytest.mark.parametrize(
        ("value", "name"),
        [
            ("web1", "web1"),
            ("guest=web1", "web1"),
            ("guest=web1,debug-threads=on", "web1"),
            ("debug-threads=on,guest=web1", "web1"),
            ("web1,process=x", "web1"),
            ("a,,b", "a,b"),
            ("guest=a,,b,process=c", "a,b"),
            ("guest=a=b", "a=b"),
            ("process=x", ""),
            ("", ""),
            ("a\033[2Jb\nc", r"a\x1b[2Jb\nc"),
            ("x" * 100, "x" * 61 + "..."),
        ],
    )
    def test_of_a_qemu(self, value: str, name: str) -> None:
        assert guest_name(["/usr/bin/qemu-system-x86_64", "-m", "1G", "-name", value]) == name

    def test_others(self) -> None:
        assert guest_name([]) == ""
        assert guest_name(["kvm", "--name", "x"]) == "x"
        assert guest_name(["qemu-system-x86_64", "-name"]) == ""
        assert guest_name(["qemu", "-name", "x", "-name", "y"]) == "y"

    def test_of_a_process(self) -> None:
        assert guest_of(os.getpid(), 1e12) == ""
        assert guest_of(1 << 30, 1e12) == ""


class TestLog:
    def test_a_line(self) -> None:
        line = log_events.json_line(0.0625, logging.WARNING, "a\nb", {"event": "x", "peer": 1})
        assert line == (
            '{"time":"1970-01-01T00:00:00.062Z","level":"warning","event":"x","peer":1,'
            '"text":"a\\nb"}'
        )

    def test_whatever_is_in_it_it_is_json(self) -> None:
        assert json.loads(log_events.json_line(0, 20, "\ud800\0", {"event": "x", "path": os}))[
            "text"
        ]

    def test_fields(self) -> None:
        extra = log_events.fields("joined", peer=0, region="", reason=None)
        record = logging.makeLogRecord(extra)
        assert (
            log_events.fields_of(record)
            == log_events.fields_in(extra)
            == {"event": "joined", "peer": 0}
        )
        assert log_events.fields_of(logging.makeLogRecord({})) == {"event": "log"}
        assert log_events.fields_of(logging.makeLogRecord({"ivshmem": 1})) == {"event": "log"}

    def test_every_event_is_documented(self) -> None:
        for event in ("joined", "left", "stalled", "reading", "evicted", "reloaded", "lost"):
            assert f"\n    {event} " in (log_events.__doc__ or "")


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("9100", ("127.0.0.1", 9100)),
            (":9100", ("127.0.0.1", 9100)),
            ("0.0.0.0:0", ("0.0.0.0", 0)),  # noqa: S104
            ("[::1]:9100", ("::1", 9100)),
            ("host.example:65535", ("host.example", 65535)),
        ],
    )
    def test_good(self, text: str, address: tuple[str, int]) -> None:
        assert parse_address(text) == address

    @pytest.mark.parametrize(
        "text", ["", "x", "65536", "-1", "host:", "::1:9100", "1:2:3", "\u0661"]
    )
    def test_bad(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"is not an address|in brackets"):
            parse_address(text)
