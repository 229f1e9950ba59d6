"""The signals that end a command, held back until it can clean up.

Knows: which signals these are, how a block of code is left when one comes. Does not know: what the
block does.
"""

from __future__ import annotations

import contextlib
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

# SIGHUP: the terminal is closed.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def held(*, for_good: bool = False) -> Iterator[None]:
    """Let the signals that end a server wait while the block runs.

    Args:
        for_good: ignore them afterwards if they were let come in the block: nothing is left to do
            then that could wait. Otherwise they do what they did before, so that they end a
            process whose results nobody reads.
    """
    handlers = [(number, signal.getsignal(number)) for number in ENDING]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        if not for_good:
            for number, handler in handlers:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def calling(
    stop: Callable[[], object], reload: Callable[[], object] | None = None
) -> Iterator[None]:
    """Inside `held`: let them come, and call `stop`, while the block runs.

    With `reload`, SIGHUP calls that instead.
    """

    def act(number: int, _frame: object) -> None:
        if number == signal.SIGHUP and reload is not None:
            reload()
        else:
            stop()

    with handled(act):
        yield


def has_terminal() -> bool:
    """Whether SIGHUP means that the terminal is closed, and not a request to reload."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside `held`: let them come while the block runs, and leave it by an exception."""
    with handled(lambda number, _frame: _leave(number)):
        yield


@contextlib.contextmanager
def raised_at_steps() -> Iterator[Callable[[], None]]:
    """The same, but the block is left only where it calls what it is given, or by a second signal.

    For a block that makes things which an exception in the wrong moment would leave behind.
    """
    came: list[int] = []

    def note(number: int, _frame: object) -> None:
        if came:
            _leave(number)
        came.append(number)

    def step() -> None:
        if came:
            _leave(came[0])

    with handled(note):
        yield step


def _leave(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # as shells report it


@contextlib.contextmanager
def handled(handler: Callable[[int, object], object]) -> Iterator[None]:
    """Let the signals that end a server come, to `handler`, while the block runs."""
    for number in ENDING:
        signal.signal(number, handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)  # the end has begun
