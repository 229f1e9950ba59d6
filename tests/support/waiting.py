"""Waiting for a condition where no event tells of it, and signals that come while a call waits.

Every limit here is generous: it is reached only when a test fails.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 30.0  # seconds


def until(condition: Callable[[], T | None], what: str = "condition") -> T:
    """Ask again and again until the answer is true, and return it."""
    give_up = time.monotonic() + PATIENCE
    while not (answer := condition()):
        if time.monotonic() > give_up:
            raise AssertionError(f"{what} did not come true in {PATIENCE:g} seconds")
        time.sleep(0.001)
    return answer


# poll, ppoll, epoll_wait, epoll_pwait, epoll_pwait2; read; write. Each machine has its own numbers.
_POLL = {"x86_64": {7, 271, 232, 281, 441}, "aarch64": {73, 22, 441}}
_READ = {"x86_64": {0}, "aarch64": {63}}
_WRITE = {"x86_64": {1}, "aarch64": {64}}
# nanosleep, clock_nanosleep, and select, pselect6, which time.sleep() may use; connect.
_PAUSE = {"x86_64": {35, 230, 23, 270, 42}, "aarch64": {101, 115, 72, 203}}


def sleeps(thread_id: int) -> bool:
    """Whether a thread of this process sleeps in poll(2), epoll_wait(2), one of their kind or read.

    Which of these a wait chooses is its own affair.
    """
    return _sleeps_in(thread_id, _POLL) or _sleeps_in(thread_id, _READ)


def pauses(thread_id: int) -> bool:
    """Whether a thread of any process sleeps as `sleeps` says, for a while, or in connect(2)."""
    try:
        number = Path(f"/proc/{thread_id}/syscall").read_text().split()[0]
    except (OSError, IndexError):
        return False
    machine = platform.machine()
    calls = _POLL[machine] | _READ[machine] | _PAUSE[machine]
    return number.isdigit() and int(number) in calls


def sleeps_in_read(thread_id: int) -> bool:
    """Whether a thread of this process sleeps in read(2)."""
    return _sleeps_in(thread_id, _READ)


def sleeps_in_read_of(process_id: int) -> bool:
    """Whether the main thread of another process sleeps in read(2)."""
    return _thread_sleeps_in(Path(f"/proc/{process_id}/syscall"), _READ)


def sleeps_in_write_of(process_id: int) -> bool:
    """Whether a thread of another process sleeps in write(2)."""
    threads = Path(f"/proc/{process_id}/task").iterdir()
    return any(_thread_sleeps_in(thread / "syscall", _WRITE) for thread in threads)


def _thread_sleeps_in(file: Path, calls: dict[str, set[int]]) -> bool:
    number = file.read_text().split()[0]
    return number.isdigit() and int(number) in calls[platform.machine()]


def sleeps_in_write(thread_id: int) -> bool:
    """Whether a thread of this process sleeps in write(2)."""
    return _sleeps_in(thread_id, _WRITE)


def _sleeps_in(thread_id: int, calls: dict[str, set[int]]) -> bool:
    number = Path(f"/proc/self/task/{thread_id}/syscall").read_text().split()[0]
    return number.isdigit() and int(number) in calls[platform.machine()]


@contextlib.contextmanager
def signals(number: int = signal.SIGUSR1, interval: float = 0.005) -> Iterator[list[int]]:
    """Send a signal to this (main) thread again and again; yields the list of those handled."""
    handled: list[int] = []
    before = signal.signal(number, lambda signum, _frame: handled.append(signum))
    target = threading.get_ident()
    done = threading.Event()

    def send() -> None:
        while not done.wait(interval):
            signal.pthread_kill(target, number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield handled
    finally:
        done.set()
        thread.join()
        signal.signal(number, before)


@contextlib.contextmanager
def once_asleep(
    action: Callable[[], object], asleep: Callable[[int], bool] = sleeps
) -> Iterator[None]:
    """Do something from another thread as soon as this one sleeps in poll, or as `asleep` says."""
    me = threading.get_native_id()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if asleep(me):
                action()
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def interrupt_when_asleep(
    asleep: Callable[[int], bool] = sleeps,
) -> contextlib.AbstractContextManager[None]:
    """A real Ctrl-C for this (main) thread as soon as it sleeps, as of `once_asleep`."""
    target = threading.get_ident()
    return once_asleep(lambda: signal.pthread_kill(target, signal.SIGINT), asleep)


class Background:
    """A call in a thread of its own, whose result or error can be asked for later."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._future: Future[object] = Future()
        self.native_id = 0
        started = threading.Event()

        def run() -> None:
            self.native_id = threading.get_native_id()
            started.set()
            try:
                self._future.set_result(call())
            except BaseException as error:
                self._future.set_exception(error)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        started.wait()

    def wait_until_asleep(self) -> None:
        until(lambda: sleeps(self.native_id), "a sleeping thread")

    def wait_until_reading(self) -> None:
        until(lambda: sleeps_in_read(self.native_id), "a thread that waits in read")

    def wait_until_writing(self) -> None:
        until(lambda: sleeps_in_write(self.native_id), "a thread that waits in write")

    @property
    def running(self) -> bool:
        return not self._future.done()

    def result(self) -> object:
        """What the call returned; raises what it raised."""
        try:
            return self._future.result(PATIENCE)
        finally:
            self._thread.join(PATIENCE)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads: the child needs none
        return os.fork()


@contextlib.contextmanager
def idle_child() -> Iterator[None]:
    """A forked child that holds copies of all descriptors and does nothing."""
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def in_child(action: Callable[[], object]) -> None:
    """Fork, do something in the child, and check that it succeeded and ended by itself."""
    pid = _fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())  # sys.stderr is this test's, captured
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
