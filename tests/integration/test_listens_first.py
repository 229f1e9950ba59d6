"""A server listens before it has imported all that serves: what happens in between.

The import of ivshmem.service.observability, the first one after that, is where these tests stop
the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.peer import RawPeer
from support.stopping import users_environment
from support.waiting import PATIENCE, until

_STOPPED = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == "ivshmem.service.observability":
            {here}
sys.meta_path.insert(0, Stop())
from ivshmem.cli.main import main
sys.exit(main(["serve", "-q", "-l", "64K", "-S", *sys.argv[1:]]))
"""
WAIT, FAIL = "sys.stdin.readline()", "raise ImportError('broken')"


@contextlib.contextmanager
def stopped(path: Path, here: str) -> Iterator[subprocess.Popen[str]]:
    """A server that does this as soon as it listens."""
    with subprocess.Popen(
        [sys.executable, "-c", _STOPPED.format(here=here), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=users_environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_who_connects_before_the_rest_is_imported_is_served(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with stopped(path, WAIT) as process:
        until(lambda: listens(path), "a server that listens")
        assert not Path(f"{path}.control").exists(), "the rest has not begun"
        with RawPeer(str(path)) as early:
            go_on(process)
            early.set_up(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_end_while_the_rest_is_imported(tmp_path: Path, number: int) -> None:
    path = tmp_path / "socket"
    with stopped(path, WAIT) as process:
        until(lambda: listens(path), "a server that listens")
        process.send_signal(number)
        go_on(process)
        _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (0, "")
    assert os.listdir(tmp_path) == []


def test_a_kill_while_the_rest_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with stopped(path, WAIT) as process:
        until(lambda: listens(path), "a server that listens")
        process.kill()
        process.wait(PATIENCE)
    assert not listens(path)
    with stopped(path, WAIT) as process:  # although the path was left
        until(lambda: listens(path), "another server")
        go_on(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert os.listdir(tmp_path) == []


def test_an_import_that_fails_leaves_no_socket(tmp_path: Path) -> None:
    with stopped(tmp_path / "socket", FAIL) as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "ImportError: broken" in said
    assert os.listdir(tmp_path) == []


_AT_LISTEN = """
import sys
from ivshmem.system import late_logging
from ivshmem.system.listener import Listener
from ivshmem.server import log_events
listen = Listener.listen
def warn(listener):
    Listener.listen = listen
    listen(listener)
    assert "logging" not in sys.modules
    late_logging.log_of("ivshmem.serve").warning("early", extra=log_events.fields("limit"))
    assert "logging" in sys.modules
Listener.listen = warn
from ivshmem.cli.main import main
sys.exit(main(["serve", "-q", "-l", "64K", "-S", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_of_the_log_that_comes_before_logging_is_imported(tmp_path: Path, form: str) -> None:
    """It is written as all others are, once; and so are those that come later."""
    path = tmp_path / "socket"
    with subprocess.Popen(
        [sys.executable, "-c", _AT_LISTEN, str(path), "--log-format", form, "-v"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=users_environment(),
    ) as process:
        until(Path(f"{path}.control").exists, "a server")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    early, limit = said.splitlines()[:2]
    if form == "text":
        assert early == "ivshmem: early"
        assert limit.startswith("ivshmem: RLIMIT_NOFILE is")
    else:
        assert json.loads(early).items() >= {"level": "warning", "text": "early"}.items()
        assert json.loads(limit)["event"] == "limit"
    assert said.count("early") == 1


_IMPORTS_NO_MORE = """
import sys, tempfile
from ivshmem import Server
from support.peer import RawPeer
sys.meta_path.clear()
with tempfile.TemporaryDirectory() as place:
    with Server(place + "/socket", 65536, 2, names=True).start() as server:
        with RawPeer(server.path) as stays:
            stays.set_up(2)
            with RawPeer(server.path) as peer:
                peer.set_up(2)
                assert len(server.report()) == 2
                server.hold(stays.id)
                server.release(stays.id)
            server.evict(stays.id)
"""


def test_a_program_that_gives_up_its_rights_after_its_imports() -> None:
    """It can read no module any more, and neither can a server that has no descriptor left."""
    environment = users_environment(PYTHONPATH=str(Path(__file__).parents[1]))
    subprocess.run([sys.executable, "-c", _IMPORTS_NO_MORE], check=True, env=environment)


def test_a_control_path_that_is_taken_leaves_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{path}.control")
        other.listen()
        with stopped(path, "pass") as process:
            _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert said.count("\n") == 1
    assert "--control PATH" in said
    assert os.listdir(tmp_path) == ["socket.control"], "only the other one's"
