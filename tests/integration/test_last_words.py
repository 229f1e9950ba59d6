"""What a command says when it cannot do its work: in the form, and at the time, that fits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest
from support.stopping import users_environment
from support.waiting import PATIENCE, Background

from ivshmem import ServerGone
from ivshmem.cli import connect as connect_command
from ivshmem.cli.main import main

IVSHMEM = [sys.executable, "-m", "ivshmem"]


def run(*words: str, stdout: int | TextIO = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*IVSHMEM, *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        env=users_environment(),
        check=False,
    )


@pytest.mark.parametrize("how", ["options", "options, supervised", "options, daemon", "file"])
def test_a_log_in_json_ends_in_json(tmp_path: Path, how: str) -> None:
    path = tmp_path / "nowhere" / "socket"
    words = ["serve", "--log-format", "json", "-S", str(path)]
    if how == "file":
        config = tmp_path / "c.toml"
        config.write_text(f'[service]\nlog_format = "json"\n[region.a]\nsocket = "{path}"\n')
        words = ["serve", "--config", str(config)]
    words += {"options, supervised": ["--supervise"], "options, daemon": ["--daemon"]}.get(how, [])
    done = run(*words)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    said = json.loads(line)
    assert said["level"] == "error"
    assert f"{path.parent}: no such file or directory" in said["text"].lower()


@pytest.mark.parametrize("words", [["-V"], ["--help"], ["serve", "--help"]])
def test_help_that_cannot_be_written(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run(*words, stdout=full)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ivshmem: no space left on device: ")


@pytest.mark.parametrize("words", [["-V"], ["--help"]])
def test_help_that_nobody_reads(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*words, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


_NOT_YET = """
import os, sys
from ivshmem.system import listener
def listen(*_):
    os._exit(7)
listener.Listener.listen = listen
from ivshmem.cli.main import main
raise SystemExit(main(sys.argv[1:]))
"""


def limited(limit: int, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=users_environment(),
    )


@pytest.mark.nightly
def test_too_few_descriptors_are_noticed_before_anybody_connects(tmp_path: Path) -> None:
    """With as many as it needs to listen it also serves; with fewer it has not listened."""
    serve = ["serve", "-q", "-l", "64K", "-S", str(tmp_path / "socket")]
    for limit in range(14, 40):
        with limited(limit, sys.executable, "-c", _NOT_YET, *serve) as process:
            _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode in (1, 7)
        (tmp_path / "socket").unlink(missing_ok=True)
        if process.returncode == 7:
            break
        assert "too many open files: raise the limit with `ulimit -n`" in said
    with limited(limit, *IVSHMEM, *serve) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving 64K")
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


class TestTwoTakeovers:
    """The second one meets a server that is just going, or is gone."""

    def test_gone(self, tmp_path: Path) -> None:
        done = run("serve", "--takeover", "-S", str(tmp_path / "s"))
        assert done.returncode == 1
        assert "no server to take over from listens here: it has ended, or another" in done.stderr
        assert "omit --takeover to start a new server" in done.stderr

    @pytest.mark.parametrize("reset", [False, True])
    def test_going(self, tmp_path: Path, reset: bool) -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{path}.control")
            listener.listen()

            def cut_off() -> None:
                sock, _ = listener.accept()
                with sock:
                    if not reset:
                        sock.recv(100)

            other = Background(cut_off)
            done = run("serve", "--takeover", "-S", str(path))
            other.result()
        assert done.returncode == 1
        assert "another process has just taken over (`ivshmem status` tells)" in done.stderr


@pytest.mark.parametrize("looks", [1, 3])
def test_one_limit_for_the_search_and_the_connection(
    monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """The server is found at once, or at the third look."""
    given: list[float] = []
    left = looks

    def found(_: object) -> str:
        nonlocal left
        left -= 1
        if left:
            raise FileNotFoundError(2, "not yet")
        return "/path"

    def connect(path: str, *, timeout: float, **_: object) -> None:
        given.append(timeout)
        raise ServerGone(path)

    monkeypatch.setattr(connect_command, "server_of", found)
    monkeypatch.setattr(connect_command, "connect", connect)
    begun = time.monotonic()
    assert main(["connect", "--wait", "--timeout", "5", "-c", "dump"]) == 1
    took = time.monotonic() - begun
    assert len(given) == 1
    assert given[0] == 5 if looks == 1 else 5 - took <= given[0] < 5
