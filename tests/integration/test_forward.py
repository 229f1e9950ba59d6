"""`ivshmem forward`: sockets at both ends, real processes between them."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import commands
from support.forwards import (
    Forward,
    Pair,
    exchanged,
    fill,
    is_refused,
    is_reset,
    received,
    reset,
)
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Server, channel

pytestmark = pytest.mark.usefixtures("commands")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and the socket of a server in a process of its own.

    In this process, its descriptors for the next peer would look as if a test had left them.
    """
    directory = tmp_path_factory.mktemp("forward")
    path = str(directory / "s")
    words = ["serve", "-S", path, "--size", "512M", "--channels", "400M", "-q"]
    with subprocess.Popen(
        [sys.executable, "-m", "ivshmem", *words], stdout=subprocess.DEVNULL
    ) as process:
        ivshmem.connect(path, timeout=PATIENCE, wait_for_server=True).close()
        yield directory, path
        process.terminate()


@pytest.fixture(scope="module")
def pair(place: tuple[Path, str]) -> Iterator[Pair]:
    """Two sides of a forward that a test leaves as they are."""
    pair = Pair(*place, "shared", "--connections", 256)
    try:
        yield pair
    finally:
        pair.close()


@contextlib.contextmanager
def own_pair(
    place: tuple[Path, str], name: str, *words: object, unix: bool = False
) -> Iterator[Pair]:
    """Two sides that a test may kill."""
    pair = Pair(*place, name, *words, unix=unix)
    try:
        yield pair
    finally:
        pair.close()


@contextlib.contextmanager
def forward(place: tuple[Path, str], name: str, *words: object) -> Iterator[Forward]:
    side = Forward(place[0], name, place[1], *words)
    try:
        yield side
    finally:
        side.end()


# -- as a socket ----------------------------------------------------------------------------------


def test_both_ways_at_once(pair: Pair) -> None:
    with pair.joined() as (near, far):
        assert exchanged(near, far, 3_000_001, 1)


def test_each_side_can_end_first(pair: Pair) -> None:
    with pair.joined() as (near, far):
        near.sendall(b"question")
        near.shutdown(socket.SHUT_WR)
        assert received(far) == b"question"
        far.sendall(b"answer")
        far.shutdown(socket.SHUT_WR)
        assert received(near) == b"answer"
    with pair.joined() as (near, far):
        far.sendall(b"220 hello")
        far.shutdown(socket.SHUT_WR)
        assert received(near) == b"220 hello"
        near.sendall(b"still here")
        near.shutdown(socket.SHUT_WR)
        assert received(far) == b"still here"


def test_a_reset_is_passed_on(pair: Pair) -> None:
    with pair.joined() as (near, far):
        near.sendall(b"half a requ")
        assert received(far, 11) == b"half a requ"
        reset(near)
        assert is_reset(far)
    with pair.joined() as (near, far):
        reset(far)
        assert is_reset(near)


def give_up(sock: socket.socket, other: socket.socket) -> None:
    """Reset a connection; a Unix socket has no reset but this: not to read what came."""
    if sock.family == socket.AF_UNIX:
        other.sendall(b"x")
        select.select([sock], [], [], PATIENCE)
    reset(sock)


@pytest.mark.nightly
@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("unix", [False, True])
def test_resets_beside_a_socket_that_takes_nothing(
    place: tuple[Path, str], unix: bool, half_closed: bool
) -> None:
    """Of either side: who gives up frees the connection, although the other one is stopped."""
    name = f"stopped-{unix}-{half_closed}"
    with own_pair(place, name, "--connections", 4, unix=unix) as pair:
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(pair.joined()) for _ in range(4)]
            for number, (near, far) in enumerate(ends):
                gives_up = near if number < 2 else far
                fill(gives_up)
                if half_closed:
                    gives_up.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            for near, far in ends[:2]:
                give_up(near, far)
            for near, far in ends[2:]:
                give_up(far, near)
            for _ in range(4):
                near, far = stack.enter_context(pair.joined())
                assert exchanged(near, far, 1000, 9)
            assert time.monotonic() - began < 10
            for _, far in ends[:2]:
                assert is_reset(far) or unix
            for near, _ in ends[2:]:
                assert is_reset(near) or unix


@pytest.mark.nightly
def test_an_end_in_order_has_no_limit(place: tuple[Path, str], pair: Pair) -> None:
    """Who takes what was sent before a close may be slower than after a reset."""
    with pair.joined() as (near, far):
        sent = fill(near)
        near.close()
        time.sleep(2.5)
        assert len(received(far)) == sent


def test_a_reset_while_the_target_is_connected_to(place: tuple[Path, str]) -> None:
    """Who gives up frees the connection also if the target accepts nobody."""
    directory, _ = place
    with socket.socket(socket.AF_UNIX) as target, contextlib.ExitStack() as stack:
        target.bind(f"{directory}/nobody")
        target.listen(0)
        blocked = stack.enter_context(socket.socket(socket.AF_UNIX))
        blocked.connect(f"{directory}/nobody")
        words = ("--connect", f"unix:{directory}/nobody", "--connections", 2)
        far = stack.enter_context(forward(place, "nobody-far", "nobody", *words))
        far.says("connects to")
        near = stack.enter_context(
            forward(place, "nobody-near", "nobody", "--listen", "tcp:127.0.0.1:0")
        )
        at = "127.0.0.1", near.port()
        client = stack.enter_context(ivshmem.connect(place[1], timeout=PATIENCE))
        channels = stack.enter_context(channel.open(client))

        def connections() -> int:
            return sum(info.connections for info in channels.list() if info.name == "nobody")

        for _ in range(3):
            held = [socket.create_connection(at, timeout=PATIENCE) for _ in range(2)]
            until(lambda: connections() == 2)
            for sock in held:
                reset(sock)
            until(lambda: connections() == 0)
        last = stack.enter_context(socket.create_connection(at, timeout=PATIENCE))
        last.sendall(b"last")
        target.settimeout(PATIENCE)
        target.accept()[0].close()  # that was the one that blocked
        with target.accept()[0] as end:
            assert received(end, 4) == b"last"


def test_who_sends_to_a_closed_socket_is_reset(pair: Pair) -> None:
    with pair.joined() as (near, far):
        far.close()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while True:  # or the test's time is over
                near.sendall(bytes(1 << 16))


def test_what_was_sent_before_a_close_arrives(pair: Pair) -> None:
    """Also if the one that closes had not read everything, which makes its kernel send a reset."""
    with pair.joined() as (near, far):
        near.sendall(b"x" * 100_000)
        assert received(far, 1) == b"x"
        far.sendall(b"y" * 300_000)
        far.shutdown(socket.SHUT_WR)
        assert len(received(near, 300_000)) == 300_000
        far.close()


def test_a_slow_reader_holds_up_nobody_else(pair: Pair) -> None:
    with pair.joined() as (near, far):
        sent = fill(near)
        with pair.joined() as (other, other_far):
            assert exchanged(other, other_far, 500_000, 2)
        near.shutdown(socket.SHUT_WR)
        assert len(received(far)) == sent


def test_200_at_once(pair: Pair) -> None:
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(pair.joined()) for _ in range(200)]
        for number, (near, far) in enumerate(ends):
            near.sendall(b"%d" % number)
            far.sendall(b"-%d" % number)
        for number, (near, far) in enumerate(ends):
            assert received(far, len(b"%d" % number)) == b"%d" % number
            assert received(near, len(b"-%d" % number)) == b"-%d" % number


def one_after_another(pair: Pair, number: int) -> None:
    for one in range(number):
        with pair.joined() as (near, far):
            near.sendall(b"%d" % one)
            near.shutdown(socket.SHUT_WR)
            assert received(far) == b"%d" % one
            far.close()
            assert received(near) == b""


def test_many_one_after_another(pair: Pair) -> None:
    one_after_another(pair, 300)


@pytest.mark.nightly
def test_thousands_one_after_another(pair: Pair) -> None:
    one_after_another(pair, 10_000)


def crowd(pair: Pair, size: int) -> None:
    with contextlib.ExitStack() as stack:
        results: dict[int, bool] = {}

        def work(number: int, near: socket.socket, far: socket.socket) -> None:
            results[number] = exchanged(near, far, size, number)

        threads = []
        for number in range(24):
            near, far = stack.enter_context(pair.joined())
            threads.append(threading.Thread(target=work, args=(number, near, far)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(results.values()) == [True] * 24


def test_24_connections_with_checksums(pair: Pair) -> None:
    crowd(pair, 4 << 20 >> 2)


@pytest.mark.nightly
def test_24_large_connections_with_checksums(pair: Pair) -> None:
    crowd(pair, 100_000_000)


def test_who_waits_costs_nothing(pair: Pair) -> None:
    with pair.joined(), pair.joined() as (near, far):
        near.sendall(b"x")
        assert received(far, 1) == b"x"
        before = pair.near.processor_time() + pair.far.processor_time()
        time.sleep(0.5)
        assert pair.near.processor_time() + pair.far.processor_time() - before < 0.1


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_refusal_at_the_other_side(place: tuple[Path, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        free = sock.getsockname()[1]
    with (
        forward(place, "refused", "refused", "--connect", f"tcp:127.0.0.1:{free}") as far,
        forward(place, "refusing", "refused", "--listen", "tcp:127.0.0.1:0") as near,
    ):
        far.says("connects to")
        assert is_refused(near.port())
        far.says(rf"refused: tcp:127.0.0.1:{free} cannot be connected to: connection refused")


def test_nobody_at_the_other_side(place: tuple[Path, str]) -> None:
    with forward(place, "alone", "alone", "--listen", "tcp:127.0.0.1:0") as near:
        assert is_refused(near.port())
        near.says(r"no process connects at the other side \(start `ivshmem forward alone --connect")


def test_who_finds_all_connections_in_use_waits(place: tuple[Path, str]) -> None:
    with own_pair(place, "full", "--connections", 2) as pair:
        with pair.joined() as (one, one_far):
            with pair.joined() as (near, far):
                with pair.dial() as third:
                    third.sendall(b"I wait")
                    pair.near.says(
                        "waits: channel 'full': all its 2 connections are in use: wait until one"
                        " ends; or for more, end both sides, `ivshmem channel rm full`, and start"
                        " them again with --connections N"
                    )
                    with pair.dial() as fourth:
                        fourth.sendall(b"so do I")
                        near.close()
                        assert received(far) == b""
                        far.close()
                        with pair.accept() as third_far:
                            assert received(third_far, 6) == b"I wait"
                            one.close()
                            one_far.close()
                            with pair.accept() as fourth_far:
                                assert received(fourth_far, 7) == b"so do I"
        pair.far.end()
        pair.near.end()
        assert commands.run("channel", "rm", "full", "-S", place[1]).returncode == 0
    with own_pair(place, "full", "--connections", 3):
        pass


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_side_that_is_killed(place: tuple[Path, str], side: str) -> None:
    """Its connections are reset at the other side; when it is there again, new ones work."""
    with own_pair(place, f"killed-{side}") as pair:
        with pair.joined() as (near, far), pair.joined() as (idle_near, idle_far):
            near.sendall(b"x" * 100_000)
            assert received(far, 50_000) == b"x" * 50_000
            (pair.near if side == "near" else pair.far).kill()
            began = time.monotonic()
            for sock in (near, far, idle_near, idle_far):
                # A kernel closes the sockets of a killed process: by a reset if it had not read.
                survivor = sock in ((far, idle_far) if side == "near" else (near, idle_near))
                assert is_reset(sock) or not survivor
            assert time.monotonic() - began < 5
        if side == "near":
            pair.near.again()
            pair.port = pair.near.port()
        else:
            pair.far.again()
            pair.far.says("connects to")
        with pair.joined() as (near, far):
            assert exchanged(near, far, 100_000, 3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["near", "far"])
def test_a_side_that_ends(place: tuple[Path, str], side: str) -> None:
    with own_pair(place, f"ended-{side}") as pair, pair.joined() as (near, far):
        near.sendall(b"x")
        assert received(far, 1) == b"x"
        assert (pair.near if side == "near" else pair.far).end() == 0
        assert is_reset(near)
        assert is_reset(far)


def test_a_side_that_is_silent(place: tuple[Path, str]) -> None:
    """As a virtual machine that was killed, or is paused for long: its kernel proves nothing."""
    with own_pair(place, "silent") as pair:
        pair.near.end()
        pair.near.words[-4:-4] = ["--silence", "0.5"]
        pair.near.again()
        pair.port = pair.near.port()
        with pair.joined() as (near, far):
            near.sendall(b"x")
            assert received(far, 1) == b"x"
            pair.far.process.send_signal(signal.SIGSTOP)
            try:
                assert is_reset(near)
                pair.near.says("the other side has been silent for")
            finally:
                pair.far.process.send_signal(signal.SIGCONT)
            assert is_reset(far)
        with pair.joined() as (near, far):
            assert exchanged(near, far, 1000, 4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["near", "far"])
def test_descriptors_that_run_out(place: tuple[Path, str], side: str) -> None:
    """Those who come wait; nobody is lost, and the loop does not spin."""
    with own_pair(place, f"emfile-{side}") as pair:
        process = pair.near if side == "near" else pair.far
        pid = process.process.pid
        used = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        with contextlib.ExitStack() as stack:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 2, before[1]))
            nears = [stack.enter_context(pair.dial()) for _ in range(5)]
            for number, near in enumerate(nears):
                near.sendall(b"%d" % number)
            process.says("too many open files; those who wait are kept")
            began = process.processor_time()
            time.sleep(0.5)
            assert process.processor_time() - began < 0.2
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            fars = [stack.enter_context(pair.accept()) for _ in range(5)]
            assert sorted(received(far, 1) for far in fars) == [b"0", b"1", b"2", b"3", b"4"]


def test_signals_that_interrupt_calls(pair: Pair) -> None:
    """SIGWINCH is ignored, but SIGSTOP and SIGCONT let each system call begin again."""
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.002):
            for side in (pair.near, pair.far):
                side.process.send_signal(signal.SIGSTOP)
                side.process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with pair.joined() as (near, far):
            assert exchanged(near, far, 2_000_000, 5)
    finally:
        done.set()
        thread.join()


def test_a_target_that_takes_long_to_connect_to(place: tuple[Path, str]) -> None:
    """A Unix socket whose queue is full: others that come are not held up."""
    directory, path = place
    with socket.socket(socket.AF_UNIX) as target, contextlib.ExitStack() as stack:
        target.bind(f"{directory}/full")
        target.listen(0)
        blocked = stack.enter_context(socket.socket(socket.AF_UNIX))
        blocked.connect(f"{directory}/full")
        echo = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = echo.getsockname()[1]
        far = stack.enter_context(
            forward(
                place,
                "long-far",
                *("long", "--connect", f"unix:{directory}/full"),
                *("short", "--connect", f"tcp:127.0.0.1:{port}"),
            )
        )
        far.says("short: connects to")
        near = stack.enter_context(
            forward(
                place,
                "long-near",
                *("long", "--listen", f"unix:@{path}-long"),
                *("short", "--listen", f"unix:@{path}-short"),
            )
        )
        near.says("short: listens at")
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(f"\0{path}-long")
        waiting.sendall(b"later")
        quick = stack.enter_context(socket.socket(socket.AF_UNIX))
        quick.connect(f"\0{path}-short")
        with echo.accept()[0] as end:
            assert exchanged(quick, end, 10_000, 6)
        target.settimeout(PATIENCE)
        target.accept()[0].close()  # that was the one that blocked
        with target.accept()[0] as end:
            assert received(end, 5) == b"later"


# -- Unix sockets, several forwards, files --------------------------------------------------------


def test_a_unix_socket_that_listens(place: tuple[Path, str]) -> None:
    directory, _ = place
    at = directory / "listening"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(at))
    with socket.create_server(("127.0.0.1", 0)) as target:
        port = target.getsockname()[1]
        config = directory / "forward.toml"
        config.write_text(
            f'[forward.unix]\nlisten = "unix:{at}"\nmode = "0600"\nconnections = 3\n'
            f'buffer = "8K"\n[forward.other]\nconnect = "tcp:localhost:{port}"\n'
        )
        with contextlib.ExitStack() as stack:
            near = stack.enter_context(forward(place, "unix", "--config", config))
            near.says("other: connects to")
            words = ("unix", "--connect", f"tcp:127.0.0.1:{port}")
            stack.enter_context(forward(place, "unix-far", *words)).says("connects to")
            assert stat.S_IMODE(at.stat().st_mode) == 0o600
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(at))
                with target.accept()[0] as end:
                    assert exchanged(sock, end, 100_000, 7)
            with ivshmem.connect(place[1], timeout=PATIENCE) as client:
                with channel.open(client) as channels:
                    found = channels.open("unix", "bytes")
                    assert isinstance(found, channel.Bytes)
                    assert (found.connections, found.slots) == (3, 8192)
            assert near.end() == 0
            assert not at.exists()


# -- standard input and output --------------------------------------------------------------------


def test_stdio(place: tuple[Path, str], pair: Pair) -> None:
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "shared", "--stdio"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        with pair.accept() as far:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"question" * 10_000)
            process.stdin.close()
            assert received(far) == b"question" * 10_000
            far.sendall(b"answer" * 100_000)
            far.shutdown(socket.SHUT_WR)
            assert process.stdout.read() == b"answer" * 100_000
    assert process.returncode == 0


def test_stdio_with_files(place: tuple[Path, str], pair: Pair) -> None:
    given, taken = place[0] / "given", place[0] / "taken"
    given.write_bytes(os.urandom(200_000))
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "shared", "--stdio"]
    with given.open("rb") as source, taken.open("wb") as target:
        with subprocess.Popen(words, stdin=source, stdout=target) as process:
            with pair.accept() as far:
                data = received(far)
                far.sendall(data[::-1])
    assert process.returncode == 0
    assert taken.read_bytes() == given.read_bytes()[::-1]


def test_stdio_with_a_socket(place: tuple[Path, str], pair: Pair) -> None:
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "shared", "--stdio"]
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno())
        with process, pair.accept() as far:
            assert exchanged(ours, far, 300_000, 8)
    assert process.returncode == 0


def test_stdio_that_is_reset(place: tuple[Path, str], pair: Pair) -> None:
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "shared", "--stdio"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        reset(pair.accept())
        assert process.wait(PATIENCE) == 1
        assert process.stderr is not None
        line = process.stderr.read()
    assert line == (
        b"ivshmem: forward shared: the connection ended early: the other side reset it, or is"
        b" gone\n"
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("stdin", "standard input is open for writing only: redirect it by <"),
        ("stdout", "standard output is open for reading only: redirect it by >"),
        ("dead", "the connection ended early: nobody reads standard output any more"),
        ("full", "the connection ended early: standard output: no space left on device"),
    ],
)
def test_stdio_of_the_wrong_kind(place: tuple[Path, str], pair: Pair, how: str, line: str) -> None:
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "shared", "--stdio"]
    reading, writing = os.pipe()
    quiet, held = os.pipe()  # from which nothing comes
    null, full = os.open("/dev/null", os.O_RDWR), os.open("/dev/full", os.O_WRONLY)
    dead_reading, dead = os.pipe()
    os.close(dead_reading)
    stdin = {"stdin": writing, "stdout": quiet}.get(how, quiet)
    stdout = {"stdout": reading, "dead": dead, "full": full}.get(how, null)
    with subprocess.Popen(
        words, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True
    ) as process:
        if how in ("dead", "full"):  # else the target hears of nothing
            with pair.accept() as far, contextlib.suppress(ConnectionError):
                far.sendall(b"hello")
                received(far)
        assert process.communicate(timeout=PATIENCE)[1].endswith(line + "\n")
    assert process.returncode == 1
    for fd in (reading, writing, quiet, held, null, full, dead):
        os.close(fd)


@pytest.mark.nightly
def test_stdio_whose_user_is_killed(place: tuple[Path, str]) -> None:
    """Nobody reads its output, nobody writes its input, and the target takes nothing."""
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "user", "--stdio"]
    with own_pair(place, "user", "--connections", 1) as pair:
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            with pair.accept() as far:
                sent = quiet = 0
                os.set_blocking(process.stdin.fileno(), False)
                while quiet < 20:
                    try:
                        sent += os.write(process.stdin.fileno(), bytes(1 << 16))
                        quiet = 0
                    except BlockingIOError:
                        quiet += 1
                        time.sleep(0.01)
                process.stdout.close()
                process.stdin.close()
                assert process.wait(PATIENCE) == 1
                assert b"nobody reads standard output any more" in process.stderr.read()
                assert is_reset(far)
        with pair.joined() as (near, far):
            assert exchanged(near, far, 1000, 10)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_stdio_that_is_interrupted(place: tuple[Path, str], pair: Pair, number: int) -> None:
    """ssh sends SIGHUP to its ProxyCommand when a session is over, and shows what that says."""
    words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "shared", "--stdio"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with pair.accept() as far:
            process.send_signal(number)
            assert process.wait(PATIENCE) == 1
            assert is_reset(far)
        assert process.stderr is not None
        assert process.stderr.read() == b""


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ((), 1, "give the NAME of a forward with --connect, --listen or --stdio"),
        (("a",), 1, r"forward a: it needs connect \(where each connection leads to\) or listen \("),
        (("a", "--connect", "tcp:b:1", "--listen", "tcp:b:2"), 1,
         "forward a: connect and listen are for its two sides: take one of them here, and"),
        (("a", "--listen", "tcp:127.0.0.1:1", "--mode", "0600"), 1,
         "forward a: mode is for listen = unix:PATH: only a socket with a path has permissions$"),
        (("a", "--listen", "unix:@a", "--mode", "0600"), 1, "mode is for listen = unix:PATH"),
        (("a", "--listen", "tcp:[::1]:7", "b", "--listen", "tcp:[::1]:7"), 1,
         r"forward b: forward a listens at tcp:\[::1\]:7, too: give each an address of its own"),
        (("a", "--listen", "unix:@a", "b", "--listen", "unix:@a"), 1,
         "forward b: forward a listens at unix:@a, too: give each an address of its own"),
        (("a", "--stdio", "b", "--stdio"), 1, "--stdio is for one forward alone"),
        (("a", "--stdio", "--listen", "tcp:[::1]:1"), 1, "forward a: --stdio excludes --listen"),
        (("a", "--stdio", "a", "--stdio"), 1, "forward a: it is there twice"),
        (("a", "--connect", "tpc:b:1"), 2, r"address 'tpc:b:1': .*unix:@NAME \(is tcp:b:1 meant"),
        (("a", "--connect", "tcp:b"), 2, "address 'tcp:b': expected tcp:HOST:PORT, or"),
        (("a", "--connect", "tcp:::1:22"), 2, r"tcp:\[IPv6\]:PORT with its brackets"),
        (("a", "--connect", "tcp:b:99999"), 2, "port 99999: 65535 is the highest"),
        (("a", "--connect", "tcp:b:0"), 1, "port 0: nothing listens there"),
        (("a", "--connect", "unix:"), 2, "a socket needs a path"),
        (("a", "--connect", "unix:@"), 2, "an abstract socket needs a name after the @"),
        (("a", "--connect", "22"), 2, "address '22': expected tcp:HOST:PORT"),
        (("a", "--listen", "tcp:192.0.2.1:7"), 1, "tcp:192.0.2.1:7: this machine does not have"),
        (("a", "--listen", "unix:/"), 1, "exists and is not a socket"),
        (("a", "--connect", "tcp:nowhere.invalid:1"), 1, "'nowhere.invalid' cannot be looked up"),
        (("a", "--connect", "tcp:b:1", "--mode", "0600"), 1, "mode is for listen = unix:PATH"),
        (("a", "--connect", "tcp:[::1]:1", "--connections", "0"), 2, "0 connections: allowed are"),
        (("a", "--connect", "tcp:[::1]:1", "--buffer", "3K"), 2, "powers of two from 4K to 1G"),
        (("a", "--connect", "tcp:[::1]:1", "--buffer", "1G"), 1,
         r"64 connections with 1G in each direction need 128G: take fewer with --connections or"
         r" --buffer, or make the region with more by `ivshmem serve --channels SIZE`"),
        (("shared", "--connect", "tcp:[::1]:1", "--connections", "7"), 1,
         "connections 7: the channel is there with 256; omit --connections, or remove the channel"),
        (("nothing", "--stdio"), 1, "no channel 'nothing'"),
        (("--connect", "tcp:[::1]:1"), 1, "give the NAME of the forward that the options belong"),
        (("a", "--conect", "tcp:[::1]:1"), 2, "unrecognized arguments: --conect: did you mean"),
        (("a", "--stdio", "--silence", "0"), 2, "0: allowed are 0.1 seconds or more"),
        (("--config", "/nonexistent", "a", "--stdio"), 1, "--config excludes forwards on the"),
        (("--config", "/nonexistent"), 1, "/nonexistent: no such file or directory"),
    ],
)  # fmt: skip
def test_errors(
    place: tuple[Path, str], pair: Pair, words: tuple[str, ...], status: int, line: str
) -> None:
    done = commands.run("forward", "-S", place[1], *words)
    assert done.returncode == status, done.stderr
    (said,) = done.stderr.splitlines()
    assert re.search(line, said), said


def test_an_address_in_use(place: tuple[Path, str], pair: Pair) -> None:
    done = commands.run("forward", "-S", place[1], "b", "--listen", f"tcp:127.0.0.1:{pair.port}")
    assert done.returncode == 1
    assert f"tcp:127.0.0.1:{pair.port}: another process listens here" in done.stderr


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no forward: add a table [forward.NAME] with connect or listen"),
        ("[forwards.a]", "forwards: unknown (is forward meant?)"),
        ("[forward.a]", "forward.a: it needs connect (where each"),
        ("[forward.a]\nlisen = 'tcp:b:1'", "forward.a.lisen: unknown (is listen meant?)"),
        ("[forward.a]\nlisten = 7", "forward.a.listen = 7: expected tcp:HOST:PORT"),
        ("[forward.a]\nlisten = 'tcp:b'", "address 'tcp:b': expected tcp:HOST:PORT"),
        ("[forward.a]\nconnections = true", "forward.a.connections = true: expected a number"),
        ("[forward.a]\nbuffer = '5K'", 'forward.a.buffer = "5K": a buffer of 5K: allowed'),
        ("[forward.a]\nmode = 600", "up to three octal digits in quotes"),
        (
            "[forward]\nlisten = 'tcp:b:1'",
            "forward.listen: it is not in a table of a forward: put it below [forward.NAME]",
        ),
        ('[forward." a"]', "forward. a: channel ' a': a name is 1 to 63 bytes of printable text"),
    ],
)
def test_errors_in_a_file(place: tuple[Path, str], text: str, line: str) -> None:
    config = place[0] / "wrong.toml"
    config.write_text(text)
    done = commands.run("forward", "-S", place[1], "--config", config)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"ivshmem: {config}: ")
    assert any(part in said for part in line.split("|")), said


def test_a_region_without_channels(socket_path: str) -> None:
    with Server(socket_path, "1M").start():
        done = commands.run("forward", "-S", socket_path, "a", "--listen", "tcp:127.0.0.1:0")
    assert done.returncode == 1
    assert (
        "the region has no room for channels: make it by `ivshmem serve --channels" in done.stderr
    )


# -- the service manager --------------------------------------------------------------------------


def test_readiness(place: tuple[Path, str]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place[0] / "manager"))
        manager.settimeout(PATIENCE)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(place[0] / "manager"),
            "WATCHDOG_USEC": "200000",
        }
        words = [sys.executable, "-m", "ivshmem", "forward", "-S", place[1], "ready"]
        words += ["--listen", "tcp:127.0.0.1:0"]
        with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as process:
            said = [manager.recv(1000) for _ in range(4)]
            assert any(b"READY=1" in message for message in said)
            assert sum(b"WATCHDOG=1" in message for message in said) >= 2
            process.send_signal(signal.SIGTERM)
            until(lambda: b"STOPPING=1" in manager.recv(1000))
            assert process.wait(PATIENCE) == 0
