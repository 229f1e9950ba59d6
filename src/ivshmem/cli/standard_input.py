"""Standard input, read only as long as somebody wants it.

Knows: read(2), poll(2), lines. Does not know: what the bytes are.
"""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LOOK = 0.2  # seconds between two looks whether it is still wanted
_PIECE = 1 << 16


def pieces(check: Callable[[], object], fd: int = 0) -> Iterator[bytes]:
    """Yield what comes, until its end.

    Args:
        check: called before each wait, and while nothing comes. If it raises, nothing is read.

    Raises:
        OSError: as of read(2).
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        check()
        if poll.poll(_LOOK * 1000):
            try:
                piece = os.read(fd, _PIECE)
            except BlockingIOError:  # another process has taken it
                continue
            if not piece:
                return
            yield piece


def lines(check: Callable[[], object], fd: int = 0) -> Iterator[bytes]:
    """Yield each line as soon as it is whole, without its newline; the last one may have none.

    The arguments and errors are those of `pieces`.
    """
    begun: list[bytes] = []
    for piece in pieces(check, fd):
        first, *others = piece.split(b"\n")
        begun.append(first)
        for other in others:
            yield b"".join(begun)
            begun = [other]
    if rest := b"".join(begun):
        yield rest
