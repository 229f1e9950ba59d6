"""Answers requests on stream sockets, a step at a time, within bounds that no client can exceed.

Knows: connections, and how much of everything they may take. Does not know: what a request looks
like, what it means, who may ask (`cut`, `answer` and `admit` do).

Invariants:
1. Nothing here blocks: a caller that does not read or send delays no other caller.
2. Memory is bounded: CALLERS connections, each with at most LONGEST bytes of an incomplete request
   and one reply; all replies that wait for their readers have UNREAD bytes at most, or are one.
3. One request is answered in a step, in turn. So a server that also does other work in its steps
   gets to it, however many requests come, and however fast.
4. `answer` may call `step` again while it does what takes long: all other callers are answered
   then. A caller that is gone before it is answered is forgotten.
5. When descriptors are short, one that was reserved lets one caller in, and another is lent to
   `answer`: a caller can ask just then what is short.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from functools import partial

from ..native import descriptors
from .loop import Poller
from .uncopied import Uncopied

CALLERS = 64  # connected at once; one more takes the place of the one that was idle for longest
LONGEST = 1 << 16  # bytes of a request
UNREAD = 16 << 20  # bytes of replies

_NEWCOMERS = 16  # accepted in one step
_RETRY_SECONDS = 0.1
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class Requester:
    """A connection, as `answer` sees it.

    Attributes:
        socket: non-blocking; the RequestServer closes it, unless it was `detach`ed.
        closing: set it to have the connection closed after the reply.
        at_end: set it to be told when the connection has ended; it may not raise.
    """

    __slots__ = (
        *("_answered", "_buffer", "_eof", "_let_go", "_reply", "_request"),
        *("at_end", "closing", "socket"),
    )

    def __init__(self, sock: socket.socket, let_go: Callable[[], object]) -> None:
        self.socket = sock
        self._let_go = let_go
        self.closing = False
        self.at_end: Callable[[], object] | None = None
        self._buffer = bytearray()  # received, and not cut off yet
        self._request: bytes | None = None  # whole, and waiting for its turn
        self._answered = False  # its turn has come, and has not ended yet
        self._reply = memoryview(b"")  # what is left of it
        self._eof = False

    def detach(self) -> tuple[socket.socket, bytes]:
        """Take the connection over, and what came after the request; `answer` returns None then."""
        self._let_go()
        return self.socket, bytes(self._buffer)


class RequestServer(Uncopied):
    """Answers requests to a listening socket; call `step()` when `fileno()` is readable.

    Args:
        listener: listening, non-blocking; borrowed.
        cut: removes the first whole request from what was received, and returns it; None: there is
            none yet.
        answer: the reply to a request; None: nothing, now that the connection was `detach`ed. It
            may not block, except by steps of this; what it raises ends the step.
        too_long: the reply to a request that is longer than LONGEST; the connection is closed.
        admit: looks at a new connection. What it returns is sent, and the connection is closed;
            None: the connection is accepted.
    """

    def __init__(
        self,
        listener: socket.socket,
        cut: Callable[[bytearray], bytes | None],
        answer: Callable[[Requester, bytes], bytes | None],
        *,
        too_long: bytes = b"",
        admit: Callable[[socket.socket], bytes | None] = lambda _: None,
    ) -> None:
        self._listener = listener
        self._cut, self._answer, self._admit = cut, answer, admit
        self._too_long = too_long
        # By number, in the order in which they come. The one that was idle for longest is first.
        self._callers: dict[int, Requester] = {}
        self._next_number = 0
        self._queue: deque[int] = deque()  # of those with a whole request
        self._unread = 0  # bytes of all replies
        self._listening = True
        with contextlib.ExitStack() as undo:
            self._poller = Poller()
            undo.callback(self._poller.close)
            self._timer = descriptors.Timer()
            undo.callback(self._timer.close)
            self._seat = _Spare()
            undo.callback(self._seat.give)
            self._hand = _Spare()
            undo.callback(self._hand.give)
            self._poller.watch(self._timer.fileno(), self._retry)
            self._poller.watch(listener.fileno(), self._accept)
            self._undo = undo.pop_all()

    def fileno(self) -> int:
        """Readable when `step()` has something to do."""
        return self._poller.fileno()

    def step(self) -> None:
        """Do what there is to do, without waiting."""
        self._poller.dispatch(self._poller.wait(0))
        while self._queue:
            number = self._queue.popleft()
            if number in self._callers:  # its place was not given to another caller
                self._reply_to(number)
                break
        if self._queue:
            self._poller.wake()

    def relisten(self, bind: Callable[[], None]) -> None:
        """Call `bind`, which replaces the listener's socket by another one."""
        events = descriptors.EPOLLIN if self._listening else 0
        self._poller.replace(self._listener.fileno(), bind, events)

    def close(self) -> None:
        """Close all connections and whatever was made here; may be called twice."""
        for caller in self._callers.values():
            caller.socket.close()
        self._callers.clear()
        self._undo.close()

    # -- who is connected -------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_NEWCOMERS):
            try:
                try:
                    sock, _ = self._listener.accept()
                except OSError as error:
                    if error.errno != errno.EMFILE or not self._seat.give():
                        raise
                    sock, _ = self._listener.accept()
            except BlockingIOError:
                break
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    raise
                self._listen(False)
                self._timer.set(_RETRY_SECONDS)
                break
            self._welcome(sock)
        self._seat.have()

    def _retry(self) -> None:
        self._timer.set(0)
        self._listen(True)

    def _listen(self, wanted: bool) -> None:
        if wanted != self._listening:
            events = descriptors.EPOLLIN if wanted else 0
            self._poller.watch_for(self._listener.fileno(), events)
            self._listening = wanted

    def _welcome(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with self._hand:
            refusal = self._admit(sock)
        if refusal is not None:
            with sock, contextlib.suppress(OSError):
                sock.send(refusal)
            return
        if len(self._callers) >= CALLERS:
            self._close(next(n for n, c in self._callers.items() if not c._answered))
        number = self._next_number
        self._next_number += 1
        try:
            self._poller.watch(sock.fileno(), partial(self._serve, number))
        except OSError:  # ENOSPC, ENOMEM
            sock.close()
            return
        self._callers[number] = Requester(sock, partial(self._let_go, number))

    def _let_go(self, number: int) -> None:
        caller = self._callers.pop(number)
        self._unread -= len(caller._reply)
        self._poller.unwatch(caller.socket.fileno())

    def _close(self, number: int) -> None:
        caller = self._callers[number]
        self._let_go(number)
        caller.socket.close()
        self._seat.have()
        if caller.at_end is not None:
            caller.at_end()

    # -- one of them ------------------------------------------------------------------------------

    def _serve(self, number: int) -> None:
        caller = self._callers[number]
        if caller._answered:
            self._close(number)  # it has hung up: nothing else is watched for
            return
        if caller._request is not None:
            return  # its turn comes, even if it is gone: it may have asked and not waited
        if caller._reply:
            self._send(number)
        else:
            self._receive(number)

    def _receive(self, number: int) -> None:
        caller = self._callers[number]
        try:
            data = caller.socket.recv(LONGEST + 1 - len(caller._buffer))
        except BlockingIOError:
            return
        except OSError:
            self._close(number)
            return
        caller._buffer += data
        caller._eof = not data
        self._callers[number] = self._callers.pop(number)  # the last to be idle
        self._look_for_request(number)

    def _look_for_request(self, number: int) -> None:
        caller = self._callers[number]
        caller._request = self._cut(caller._buffer)
        if caller._request is not None:
            # Nothing more is read from it until it has read the reply.
            self._poller.watch_for(caller.socket.fileno(), 0)
            self._queue.append(number)
        elif len(caller._buffer) > LONGEST:
            caller.closing = True
            self._give(number, self._too_long)
        elif caller._eof:
            self._close(number)
        else:
            self._poller.watch_for(caller.socket.fileno(), descriptors.EPOLLIN)

    def _reply_to(self, number: int) -> None:
        caller = self._callers[number]
        request, caller._request = caller._request, None
        assert request is not None
        caller._answered = True
        try:
            with self._hand:
                reply = self._answer(caller, request)
        finally:
            caller._answered = False
        if number in self._callers:  # it was not detached
            self._give(number, reply or b"")

    def _give(self, number: int, reply: bytes) -> None:
        """Begin to send this; those who do not read theirs have to make room for it."""
        slow = [n for n, c in self._callers.items() if c._reply]
        while slow and self._unread + len(reply) > UNREAD:
            self._close(slow.pop(0))
        self._callers[number]._reply = memoryview(reply)
        self._unread += len(reply)
        self._send(number)

    def _send(self, number: int) -> None:
        caller = self._callers[number]
        try:
            while caller._reply:
                count = caller.socket.send(caller._reply)
                caller._reply = caller._reply[count:]
                self._unread -= count
                self._callers[number] = self._callers.pop(number)
        except BlockingIOError:
            self._poller.watch_for(caller.socket.fileno(), descriptors.EPOLLOUT)
            return
        except OSError:
            self._close(number)
            return
        if caller.closing:
            self._close(number)
        else:
            self._look_for_request(number)


class _Spare(Uncopied):
    """A descriptor that is there only to be given up for another one. A context manager."""

    def __init__(self) -> None:
        self._fd = -1
        self.have()

    def have(self) -> None:
        """Open it, if it is not there and there is room."""
        if self._fd < 0:
            with contextlib.suppress(OSError):
                self._fd = os.eventfd(0, os.EFD_CLOEXEC)

    def give(self) -> bool:
        """Close it; whether it was there."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        return fd >= 0

    def __enter__(self) -> None:
        self.give()

    def __exit__(self, *error: object) -> None:
        self.have()
