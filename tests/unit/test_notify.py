"""What a service manager is told, as it arrives at a socket that is its."""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peer import Eventfds, eventfd_id

from ivshmem.errors import JournalError
from ivshmem.lasting.fd_store import FdStore, place, sort_out
from ivshmem.lasting.journal import Journal, Section
from ivshmem.system.systemd import Notifier, check_name, listen_fds


@pytest.fixture
def place_of(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def manager(place_of: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(place_of)
        sock.settimeout(10)
        yield sock


@pytest.fixture
def notifier(manager: socket.socket, place_of: str) -> Iterator[Notifier]:
    with Notifier(place_of) as notifier:
        yield notifier


def fill(notifier: Notifier) -> int:
    """Say as much as the manager's queue takes."""
    count = 0
    while notifier.status("x"):
        count += 1
    return count


# -- how the service is ---------------------------------------------------------------------------


def test_what_is_told(notifier: Notifier, manager: socket.socket) -> None:
    assert notifier.active
    assert notifier.ready("one\nREADY=0")
    assert manager.recv(100) == b"READY=1\nSTATUS=one\\nREADY=0"
    assert notifier.status("two")
    assert manager.recv(100) == b"STATUS=two"
    assert notifier.reloading()
    assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert notifier.watchdog()
    assert manager.recv(100) == b"WATCHDOG=1"
    assert notifier.main_pid(7)
    assert manager.recv(100) == b"MAINPID=7"
    assert notifier.stopping()
    assert manager.recv(100) == b"STOPPING=1"


def test_a_status_is_one_line_of_some_length(notifier: Notifier, manager: socket.socket) -> None:
    notifier.status("\N{EURO SIGN}" * 1000)
    text = manager.recv(4096).decode().removeprefix("STATUS=")
    assert set(text) == {"\N{EURO SIGN}"}
    assert len(text) == 341


def test_nobody_is_told() -> None:
    with Notifier(None) as notifier:
        assert not notifier.active
        assert notifier.ready()
        assert notifier.store("a", [0]) == 1
        assert notifier.barrier(0)


def test_the_environment_is_emptied(manager: socket.socket, place_of: str) -> None:
    """A child would take it for its own."""
    pid = str(os.getpid())
    environ = {"NOTIFY_SOCKET": place_of, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": pid, "X": "y"}
    with Notifier.from_environment(environ) as notifier:
        assert notifier.watchdog_seconds == 3.0
        assert environ == {"X": "y"}
    for watchdog in ({"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "-1"}, {}):
        full = {"NOTIFY_SOCKET": place_of, "WATCHDOG_USEC": "5", "WATCHDOG_PID": pid, **watchdog}
        if not watchdog:
            del full["WATCHDOG_USEC"]
        with Notifier.from_environment(full) as notifier:
            assert notifier.watchdog_seconds is None


def test_an_abstract_address() -> None:
    name = f"ivshmem-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        with Notifier(f"@{name}") as notifier:
            assert notifier.watchdog()
        assert sock.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["vsock:2:1", "/nobody/is/there"])
def test_an_address_where_nobody_is(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match=address):
        Notifier(address)
    with caplog.at_level(logging.WARNING):
        with Notifier.from_environment({"NOTIFY_SOCKET": address}) as notifier:
            assert not notifier.active
    assert "cannot be told anything" in caplog.text


def test_a_manager_that_does_not_read(notifier: Notifier, manager: socket.socket) -> None:
    """Nobody waits longer than he says; who waits is woken when it reads."""
    assert fill(notifier) > 0
    assert not notifier.watchdog()
    assert not notifier.stopping()
    with Eventfds() as eventfds:
        assert notifier.store("a", eventfds.make(), timeout=0.1) == 0
    assert not notifier.drop("a", timeout=0.1)
    assert not notifier.barrier(0.1)
    reader = threading.Timer(0.1, lambda: manager.recv(100))
    reader.start()
    assert notifier.ready()
    reader.join()


def test_a_manager_that_is_gone(notifier: Notifier, manager: socket.socket) -> None:
    manager.close()
    assert not notifier.watchdog()
    assert not notifier.ready()


# -- the fd store ---------------------------------------------------------------------------------


def test_descriptors(notifier: Notifier, manager: socket.socket) -> None:
    with Eventfds() as eventfds:
        fds = eventfds.make(3)
        assert notifier.store("b", fds) == 3
        data, received, _, _ = socket.recv_fds(manager, 100, 10)
        assert data == b"FDSTORE=1\nFDNAME=b\nFDPOLL=0"
        assert list(map(eventfd_id, received)) == list(map(eventfd_id, fds))
        assert notifier.store("b", fds[:1], poll=True) == 1
        data, more, _, _ = socket.recv_fds(manager, 100, 10)
        assert data == b"FDSTORE=1\nFDNAME=b"
        for fd in received + more:
            os.close(fd)
    assert notifier.drop("b")
    assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=b"


def test_more_than_a_message_takes(notifier: Notifier, manager: socket.socket) -> None:
    with Eventfds() as eventfds:
        assert notifier.store("b", eventfds.make(600), timeout=10) == 600
        sizes = []
        for _ in range(3):
            _, received, _, _ = socket.recv_fds(manager, 100, 253)
            sizes.append(len(received))
            for fd in received:
                os.close(fd)
        assert sizes == [253, 253, 94]


@pytest.mark.parametrize("name", ["a:b", "a\nb", "\N{EURO SIGN}", "x" * 256])
def test_names_that_are_not_allowed(notifier: Notifier, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        check_name(name)
    with pytest.raises(ValueError, match="name"):
        notifier.store(name, [0])


def test_a_barrier(notifier: Notifier, manager: socket.socket) -> None:
    def read() -> None:
        data, fds, _, _ = socket.recv_fds(manager, 100, 1)
        assert data == b"BARRIER=1"
        os.close(fds[0])

    thread = threading.Thread(target=read)
    thread.start()
    assert notifier.barrier(10)
    thread.join()


# -- what is passed -------------------------------------------------------------------------------

RECEIVER = """
import os, sys
from ivshmem.system.systemd import listen_fds
os.environ["LISTEN_PID"] = str(os.getpid()) if sys.argv[1] == "mine" else "1"
try:
    print(listen_fds(), [os.get_inheritable(fd) for _, fd in listen_fds()])
    print([key for key in os.environ if key.startswith("LISTEN")])
except (ValueError, OSError) as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("whose", "environ", "answer"),
    [
        ("mine", {"LISTEN_FDS": "2"}, "[('unknown', 3), ('unknown', 4)] []\n[]\n"),
        ("mine", {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}, "[('a', 3), ('b', 4)] []\n[]\n"),
        ("another's", {"LISTEN_FDS": "2"}, "[] []\n[]\n"),
        ("mine", {}, "[] []\n[]\n"),
        (
            "mine",
            {"LISTEN_FDS": "x"},
            "LISTEN_FDS='x' is not a number of descriptors: which program set it?\n",
        ),
        (
            "mine",
            {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a"},
            "LISTEN_FDNAMES has 1 name for 2 descriptors: who set it?\n",
        ),
        (
            "mine",
            {"LISTEN_FDS": "3"},
            "[Errno 9] LISTEN_FDS=3, but descriptor 5 is not open: who set it?\n",
        ),
    ],
)
def test_passed(whose: str, environ: dict[str, str], answer: str) -> None:
    shell = ["sh", "-c", 'exec "$@" 3</dev/null 4</dev/null', "sh"]
    done = subprocess.run(
        [*shell, sys.executable, "-c", RECEIVER, whose],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == answer


def test_nothing_is_passed() -> None:
    assert listen_fds({"LISTEN_FDS": "3", "LISTEN_PID": "1"}) == []


# -- a store --------------------------------------------------------------------------------------


def test_what_is_passed_is_sorted_out() -> None:
    passed = [("a.socket", 3), ("1/", 4), ("journal", 5), ("1/2b", 6), ("1/", 7), ("x/", 8)]
    assert sort_out(passed) == (5, {"1/": [4, 7], "1/2b": [6]}, [3, 8])


@pytest.mark.parametrize("step", [1, -1], ids=["in order", "reversed"])
def test_places(step: int) -> None:
    near, far = socket.socketpair()
    with near, far, Eventfds() as eventfds:
        bells = eventfds.make(4)
        groups = {
            "1/0": [near.fileno(), *bells[:2]][::step],
            "1/1": [far.fileno(), bells[2]],  # one is missing
            "1/2": [bells[2], bells[3]],  # the socket is
            "2/": [0],  # nobody knows of it
        }
        rest = {name: groups[name] for name in ("1/1", "1/2", "2/")}
        mentioned = {"1/0": [90, 80, 70], "1/1": [1, 2, 3], "1/2": [4, 5], "1/3": [6]}
        assert place(mentioned, groups) == {90: near.fileno(), 80: bells[0], 70: bells[1]}
        assert groups == rest


def test_a_store_is_given_up(
    notifier: Notifier, manager: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Who cannot have all kept keeps nothing: nobody must go on by half of it."""
    journal = Journal()
    section = Section(journal, 1)
    store = FdStore(notifier, journal, patience=0.1)
    with Eventfds() as eventfds:
        section.keep(eventfds.make(2))
        fill(notifier)
        with caplog.at_level(logging.ERROR):
            section.keep(eventfds.make(1), 5)
            section.drop(5)
            assert not caplog.records
            while not caplog.records:
                assert select.select([store], [], [], 10)[0]
                store.step()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "a restart ends all connections" in caplog.text
    while select.select([manager], [], [], 0)[0]:
        _, fds, _, _ = socket.recv_fds(manager, 100, 10)
        for fd in fds:
            os.close(fd)
    store.keep("1/6", [0])
    assert not select.select([manager], [], [], 0)[0]
    store.close()
    copy = os.dup(journal.fileno())
    del section  # it holds the journal's memory
    journal.close()
    with pytest.raises(JournalError, match="given up"):
        Journal(copy)
