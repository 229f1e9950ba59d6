"""Offers of a service to take over that make no sense: nothing is taken, and nothing is left open.

The one who offers is another process of this user, so that it is listened to at all.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.isolated import NOBODY, needs_root
from support.peer import RawPeer
from support.waiting import PATIENCE, Background, until

from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.errors import HandoverError
from ivshmem.lasting import handover
from ivshmem.service import snapshots
from ivshmem.service.service import Service
from ivshmem.system import credentials, sockets

VECTORS = 2


@pytest.fixture
def service(socket_path: str) -> Iterator[Service]:
    """A service with one peer, which makes no step."""
    with Service(ServiceConfig({"db": RegionConfig(socket_path, 4096, VECTORS)})) as found:
        found.open()
        with RawPeer(socket_path) as peer:
            until(lambda: _stepped(found).regions["db"].server.peers)
            peer.set_up(VECTORS)
            yield found


def _stepped(service: Service) -> Service:
    service.step(0)
    return service


def offer_of(service: Service) -> dict[str, Any]:
    """What `give` would say, as the other side reads it."""
    numbers, state = service.descriptors, service.snapshot()
    whole = {"ok": True, "version": 1, "state": state, "numbers": numbers}
    return dict(json.loads(json.dumps(whole)))


def refused(data: bytes, fds: list[list[int]] | None = None, *, silent: bool = False) -> str:
    """What `take` says to these bytes, and then to these descriptors; it leaves nothing open."""
    before = os.listdir("/proc/self/fd")
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def offer() -> None:
            theirs.settimeout(PATIENCE)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                theirs.sendall(data)
                for batch in fds or ():
                    socket.send_fds(theirs, [b"n"], batch)
                    if theirs.recv(1) != b"n":
                        return
                if not silent:
                    theirs.shutdown(socket.SHUT_WR)
                assert b"m" not in theirs.recv(100), "it took what makes no sense"

        offering = Background(offer)
        with pytest.raises(HandoverError) as caught:
            handover.take(ours, snapshots)
        ours.close()
        offering.result()
    assert os.listdir("/proc/self/fd") == before
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400
    return text


class TestBytes:
    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"", "ended the connection"),
            (b"\n", "not JSON"),
            (b'{"ok": true', "ended the connection"),
            (b'{"ok": true\n', "not JSON"),
            (b"null\n", "expected an object"),
            (b"[]\n", "expected an object"),
            (b'"x"\n', "expected an object"),
            (b"{}\n", "offer has no ok"),
            (b'{"ok": 1}\n', "expected true or false"),
            (b'{"ok": false}\n', "refuses: no reason"),
            (b'{"ok": false, "error": 7}\n', "expected a string"),
            (b'{"ok": false, "error": "a\\u001b[2J\\ud800b"}\n', r"refuses: a\x1b[2J\ud800b"),
            (b'{"ok": true}\n', "offer has no version"),
            (b'{"ok": true, "version": 2, "numbers": []}\n', "of a version"),
            (b'{"ok": true, "version": 1, "numbers": []}\n', "offer has no state"),
            (b'{"ok": true, "version": 1, "numbers": [1, 1]}\n', "one number twice"),
            (b'{"ok": true, "version": 1, "numbers": [-1]}\n', "allowed are 0"),
            (b'{"ok": true, "version": 1, "numbers": [1e3]}\n', "expected an integer"),
            (b'{"ok": true, "version": NaN}\n', "NaN is not a number"),
            (b'{"ok": true, "version": -Infinity}\n', "-Infinity is not a number"),
            (b'{"ok": true, "version": 1e999}\n', "too large"),
            (b'{"ok": true, "version": ' + b"9" * 5000 + b"}\n", "5000 digits"),
            (b"[" * 100_000 + b"\n", "nested too deep"),
            (b'{"a":' * 100_000 + b"\n", "nested too deep"),
            (b"\xff\xfe\n", "not JSON"),
            (b"\0" * 100 + b"\n", "not JSON"),
        ],
    )
    def test_what_is_not_an_offer(self, data: bytes, told: str) -> None:
        assert told in refused(data)

    def test_a_line_without_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handover, "_LONGEST", 1 << 20)
        assert "more than 1048576 bytes" in refused(b"x" * (1 << 21))

    def test_silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handover, "SECONDS", 0.1)
        assert "no answer within 0.1 seconds" in refused(b"", silent=True)

    def test_one_byte_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The time limit is for the whole of it."""
        monkeypatch.setattr(handover, "SECONDS", 0.2)
        ours, theirs = socket.socketpair()
        with ours, theirs:

            def drip() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        theirs.send(b" ")
                        time.sleep(0.01)

            dripping = Background(drip)
            begun = time.monotonic()
            with pytest.raises(HandoverError, match="no answer within"):
                handover.take(ours, snapshots)
            assert time.monotonic() - begun < PATIENCE / 2
            ours.close()
            dripping.result()


WRONG: list[Any] = [
    *(None, True, -1, 7, 1 << 63, 0.5, 1e300),
    *("", "x", "\ud800", [], [[]], {}, {"a": 1}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in an offer."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from places(each, (*path, number))


@pytest.mark.nightly
def test_every_field_with_every_wrong_value(service: Service) -> None:
    """Each place of a true offer, replaced, left out, or with one element more."""
    offer = offer_of(service)
    tried = 0
    for path in list(places(offer))[1:]:
        for wrong in (*WRONG, "absent", "longer"):
            changed = copy.deepcopy(offer)
            where = changed
            for step in path[:-1]:
                where = where[step]
            if wrong == "absent":
                del where[path[-1]]
            elif wrong == "longer":
                if not isinstance(where[path[-1]], list):
                    continue
                where[path[-1]].append(7)
            else:
                where[path[-1]] = wrong
            # What makes sense all the same ends where the descriptors should come.
            refused(json.dumps(changed).encode() + b"\n")
            tried += 1
    assert tried > 500


class TestDescriptors:
    """The offer is true; what comes with it is not."""

    def kinds(self, service: Service) -> dict[str, int]:
        """The place of one of each kind among the numbers."""
        ((record, state),) = offer_of(service)["state"]["regions"]
        numbers = service.descriptors
        fd, fds, *_ = state["held"]["0"]
        named = {"listener": record[3], "memory": record[5], "peer": fd, "doorbell": fds[0]}
        return {kind: numbers.index(number) for kind, number in named.items()}

    @pytest.mark.parametrize("kind", ["listener", "memory", "peer", "doorbell"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda _: os.open("/dev/null", os.O_RDWR),
            lambda _: os.open("/", os.O_RDONLY),
            lambda _: os.open("/etc", os.O_PATH),
            lambda _: socket.socket(socket.AF_INET).detach(),
            lambda _: socket.socket(socket.AF_UNIX).detach(),
            lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
            lambda place: listening(place / "elsewhere").detach(),
            lambda place: fifo(place / "fifo"),
            lambda _: os.pidfd_open(os.getpid()),
        ],
    )
    def test_another_kind(
        self,
        service: Service,
        tmp_path: Path,
        kind: str,
        make: Callable[[Path], int],
    ) -> None:
        fds = service.descriptors
        strange = make(tmp_path)
        if kind == "peer" and sockets.is_connection(strange):
            os.close(strange)  # not connected yet: as one whose other end is gone
            return
        fds[self.kinds(service)[kind]] = strange
        told = refused(json.dumps(offer_of(service)).encode() + b"\n", [fds])
        assert 'region "db": ' in told
        os.close(strange)

    def test_too_few(self, service: Service) -> None:
        told = refused(json.dumps(offer_of(service)).encode() + b"\n", [service.descriptors[:-1]])
        assert "ended, or cancelled the takeover" in told

    def test_more_than_were_named(self, service: Service) -> None:
        fds = service.descriptors
        told = refused(json.dumps(offer_of(service)).encode() + b"\n", [[*fds, fds[0], fds[0]]])
        assert "descriptors that it does not name" in told

    def test_others_than_the_state_names(self, service: Service) -> None:
        offer = offer_of(service)
        offer["numbers"][0] += 1000
        told = refused(json.dumps(offer).encode() + b"\n", [service.descriptors])
        assert "1 of the descriptors that the state names are missing" in told


def fifo(path: Path) -> int:
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


# -- the giving side -------------------------------------------------------------------------------

TAKER = """
import os, signal, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
stop = lambda: os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[3] == "stops" else None
after = int(sys.argv[2])
if after > 0:
    while not sock.recv(1 << 16, socket.MSG_PEEK).endswith(b"n"):
        pass
if after > 1:
    line = b""
    while not line.endswith(b"\\n"):
        line += sock.recv(1)
    socket.recv_fds(sock, 1, 250)
    sock.sendall(b"n")
stop()
sys.stdin.read()
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", ["stops", "is silent"])
@pytest.mark.parametrize("after", range(3))
def test_a_taker_that_stops_holds_nobody_up(
    service: Service, tmp_path: Path, after: int, what: str
) -> None:
    """At each step. The peers wait for SILENCE at most, and less for a process that is stopped."""
    with listening(tmp_path / "control") as listener:
        bound = handover.SILENCE / 2 if what == "stops" else handover.SILENCE + 0.5
        times = []
        for _ in range(3):  # the quickest counts: this machine has other things to do
            with subprocess.Popen(
                [sys.executable, "-c", TAKER, str(tmp_path / "control"), str(after), what],
                stdin=subprocess.PIPE,
            ) as taker:
                sock, _ = listener.accept()
                if what == "stops" and after == 0:
                    os.waitid(os.P_PID, taker.pid, os.WSTOPPED)
                begun = time.monotonic()
                with sock:
                    assert not handover.give(service, sock)
                times.append(time.monotonic() - begun)
                taker.send_signal(signal.SIGKILL)
            if times[-1] < bound:
                break
    assert min(times) < bound


@needs_root
def test_nothing_is_given_to_another_user(service: Service, directory: Path) -> None:
    """Even if the control socket let it in."""
    os.chmod(directory, 0o755)  # noqa: S103
    with listening(directory / "control") as listener:
        os.chmod(directory / "control", 0o777)  # noqa: S103
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(directory / "control"))
                os._exit(len(sock.recv(100)))
        sock, _ = listener.accept()
        with sock:
            assert credentials.credentials(sock).uid == NOBODY
            assert not handover.give(service, sock)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
