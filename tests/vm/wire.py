"""Lines of text over a socket, with deadlines: the program in a guest talks so, and QMP.

Knows: framing by newline, and that a peer may be slow or gone.
Does not know: what the lines mean.
"""

import select
import socket
import time


class Deadline:
    """A point in time, fixed when made; None is never."""

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        """Seconds until then, never negative."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())


class Wire:
    """One end of a connection. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._received = b""

    def readline(self, deadline: Deadline) -> str:
        """The next line, without its newline.

        Raises:
            TimeoutError: no whole line until then; what came of it is kept.
            EOFError: the other side is gone. A last line without a newline counts as a line.
        """
        while b"\n" not in self._received:
            self._ready(select.POLLIN, deadline)
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                data = b""  # gone with our own lines unread
            if not data:
                if not self._received:
                    raise EOFError
                data = b"\n"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace")

    def send(self, line: str, deadline: Deadline) -> None:
        """Sends a line.

        Raises:
            TimeoutError: the other side does not read; part of the line may have been sent.
            EOFError: it is gone, as in `readline`. Which of the two notices first is chance.
        """
        data = line.encode() + b"\n"
        while data:
            self._ready(select.POLLOUT, deadline)
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                raise EOFError from None

    def close(self) -> None:
        self._socket.close()

    def _ready(self, events: int, deadline: Deadline) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        left = deadline.left()
        if not poll.poll(None if left is None else left * 1000):
            raise TimeoutError
