"""ControlClient as an object: threads, closing, what it refuses to send, its repr."""

from __future__ import annotations

import json
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ctrl_c import interrupted
from support.waiting import PATIENCE, Background

from ivshmem.control import ControlClient
from ivshmem.errors import ClosedError, ControlError


class Far:
    """The server's side, in the hand of the test."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self.near = ControlClient(path, PATIENCE)
        self._socket = self.accept()
        self._lines = self._socket.makefile("rb")

    def accept(self) -> socket.socket:
        accepted, _ = self._listener.accept()
        accepted.settimeout(PATIENCE)
        return accepted

    def request(self) -> dict[str, Any]:
        request = json.loads(self._lines.readline())
        assert isinstance(request, dict)
        return request

    def reply(self, **fields: object) -> None:
        self._socket.sendall(json.dumps({"ok": True, **fields}).encode() + b"\n")

    def nothing_came(self) -> bool:
        self._socket.setblocking(False)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(PATIENCE)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self._listener.close()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    made = Far(str(tmp_path / "c"))
    yield made
    made.near.close()
    made.close()


def test_threads_that_ask_at_once_get_their_own_replies(far: Far) -> None:
    asking = [Background(lambda n=n: far.near.ask({"n": n})) for n in range(4)]  # type: ignore[misc]
    for _ in asking:
        number = far.request()["n"]
        assert far.nothing_came()  # the others wait
        far.reply(n=number)
    assert [each.result() for each in asking] == [{"n": n} for n in range(4)]


def test_a_closed_one_says_so(far: Far) -> None:
    far.near.close()
    far.near.close()
    calls = (lambda: far.near.ask({}), lambda: far.near.hold(1), lambda: far.near.release(1))
    for call in calls:
        with pytest.raises(ClosedError, match="is closed"):
            call()


def test_a_close_that_a_signal_ends_is_finished_by_the_next(far: Far) -> None:
    for at in range(1, 100):
        near = ControlClient(far.path, PATIENCE)
        with far.accept() as far_end:
            came, where = interrupted(near.close, at, opcodes=False)
            near.close()
            assert far_end.recv(1) == b"", f"after a Ctrl-C at {where}"
        if not came:
            break
    assert at > 5


def test_closing_ends_the_call_of_another_thread(far: Far) -> None:
    asking = Background(lambda: far.near.ask({"n": 1}))
    far.request()
    threading.Thread(target=far.near.close).start()
    with pytest.raises(ClosedError):
        asking.result()


def test_a_request_that_is_too_long_is_not_sent(far: Far) -> None:
    with pytest.raises(ControlError, match="at most 65536 bytes, this one 65537") as error:
        far.near.ask({"n": "x" * (65537 - len('{"n":""}\n'))})
    assert error.value.code == "bad-request"
    assert far.nothing_came()
    longest = {"n": "x" * (65536 - len('{"n":""}\n'))}
    asking = Background(lambda: far.near.ask(longest))
    assert far.request() == longest
    far.reply()
    assert asking.result() == {}


def test_the_end_of_the_connection_says_what_to_do(far: Far) -> None:
    far._socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionError, match="make a new ControlClient"):
        far.near.ask({})


def test_users_that_are_no_collection_leave_no_socket(far: Far) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError):
            ControlClient(far.path, users=0)  # type: ignore[arg-type]


def test_repr(far: Far) -> None:
    assert repr(far.near).startswith(f"<ivshmem.control.ControlClient at {far.path}, pid ")
    far.near.close()
    assert repr(far.near).endswith(", closed>")
    with pytest.raises(OSError):
        ControlClient(far.path + "-no")


def test_a_hold_without_an_end(far: Far) -> None:
    asking = Background(lambda: far.near.hold(3, linger=None))
    assert far.request() == {"do": "hold", "id": 3, "linger": None, "region": None}
    far.reply(region="default", read=True)
    asking.result()
