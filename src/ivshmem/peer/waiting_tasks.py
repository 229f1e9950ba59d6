"""The tasks of an asyncio loop that wait for an endpoint, and what the loop watches for them.

Knows: how a task sleeps until a descriptor is readable, and which task gets what has come.
Does not know: what a user calls (aio.py), what comes over a descriptor.

Invariants:
1. A count is taken only for a task that continues at once, inside the reader's callback. Nothing
   can come between, so no cancellation, time limit or close() loses one. A count that no task waits
   for stays in its eventfd, for the next wait here or of the endpoint itself.
2. No task is resumed inside another: only the callbacks of readers and timers resume one directly;
   all others use call_soon.
3. The loop watches a descriptor only while it is open, and at most once without a waiter.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Literal

from .._core import Interrupt
from ..errors import ClosedError
from ..system.uncopied import Uncopied
from .endpoint import Endpoint, Event

# So often in a row a ring that is there already is taken without suspending; then other tasks have
# their turn.
STREAK = 64

EVENTS = object()  # the key of the queue of `async for`


class Waiter:
    """What a task sleeps on: the part of a future that asyncio.Task uses.

    A future wakes its task by call_soon. That takes one more turn of the loop with another select,
    which costs about as much as all the rest. A waiter is private to one task, so its callback can
    be called directly where no task is running.
    """

    __slots__ = ("_asyncio_future_blocking", "_loop", "callback", "context", "error", "found")

    context: Context
    found: Any

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = True  # tells the task that this was awaited
        self._loop = loop
        self.callback: Any = None  # the task's; None: no task sleeps on this, or it is woken
        self.error: BaseException | None = None

    def __await__(self) -> Generator[Waiter, None, None]:
        # Yields itself once. A tuple's iterator is quicker than a generator.
        return iter((self,))  # type: ignore[return-value]

    # Called by the task.

    def add_done_callback(self, callback: Callable[[Waiter], object], *, context: Context) -> None:
        self.callback = callback
        self.context = context

    def cancel(self, msg: object = None) -> bool:
        return self.fail(asyncio.CancelledError(*(() if msg is None else (msg,))))

    def result(self) -> None:
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # else its traceback would refer to itself

    # Called by readers.

    def resume(self, found: object) -> None:
        """Let the task continue at once; return when it waits for something else."""
        callback = self.callback
        self.callback = None
        self.found = found
        self.context.run(callback, self)

    def expire(self) -> None:
        """End the wait with nothing, if it has not ended; called by the loop's timer."""
        if self.callback is not None:
            self.resume(None)

    def fail(self, error: BaseException) -> bool:
        """Raise the error in the task; return False if it was woken before."""
        callback = self.callback
        if callback is None:
            return False
        self.callback = None
        self.error = error
        self._loop.call_soon(callback, self, context=self.context)
        return True


class Share:
    """A waiter's place in the queue of one of several vectors."""

    __slots__ = ("_vector", "_waiter")

    def __init__(self, waiter: Waiter, vector: int) -> None:
        self._waiter = waiter
        self._vector = vector

    @property
    def callback(self) -> Any:
        """None if the waiter was woken, through this queue or another one."""
        return self._waiter.callback

    def resume(self, rings: object) -> None:
        self._waiter.resume(Interrupt(self._vector, rings))  # type: ignore[arg-type]

    def fail(self, error: BaseException) -> bool:
        return self._waiter.fail(error)


class TaskQueue:
    """The tasks that wait for the same thing, the oldest first."""

    __slots__ = ("loop", "readers", "spare", "streak", "waiters", "watched")

    take: Callable[[Any], Any]  # takes what is there already; called with the queue's key

    def __init__(self, readers: Readers) -> None:
        self.readers = readers
        self.loop = readers.loop
        self.waiters: deque[Waiter | Share] = deque()
        self.watched = False  # whether the loop watches the descriptor
        self.streak = 0  # how often in a row something was there already
        self.spare: Waiter | None = None  # a waiter to be used again

    def watch(self) -> None:
        """Let the loop watch the descriptor."""
        raise NotImplementedError

    def is_awaited(self) -> bool:
        waiters = self.waiters
        while waiters:
            if waiters[0].callback is not None:
                return True
            waiters.popleft()  # cancelled
        return False

    def give(self, found: object) -> None:
        """Wake the oldest waiter with it; there must be one."""
        self.waiters.popleft().resume(found)


class _Vector(TaskQueue):
    """Tasks that wait for rings of one vector."""

    __slots__ = ("_fd", "_number", "take")

    def __init__(self, readers: Readers, number: int) -> None:
        super().__init__(readers)
        self._fd = readers.endpoint._descriptor(number)
        self._number = number
        self.take = readers.endpoint._take

    def watch(self) -> None:
        self.loop.add_reader(self._fd, self._ready)
        self.watched = True
        self.readers.watch("urgent")

    def unwatch(self) -> None:
        if self.watched:
            self.watched = False
            self.loop.remove_reader(self._fd)

    def _ready(self) -> None:
        if not self.is_awaited():
            self.unwatch()
            return
        try:
            rings = self.take(self._number)
        except Exception as error:
            self.readers.fail(error)
            return
        if rings:  # else another reader has taken them
            self.waiters.popleft().resume(rings)


class _AnyVector(TaskQueue):
    """Tasks that wait for interrupts of any vector."""

    __slots__ = ()

    def take(self, what: object) -> Interrupt | None:
        # If tasks wait for a vector by number, its rings are theirs: the readers distribute them.
        return None if self.readers.wanted() else self.readers.endpoint.wait(None, 0)

    def watch(self) -> None:
        self.readers.watch("any")
        self.watched = True


class _Events(TaskQueue):
    """Tasks that wait for any event."""

    __slots__ = ("_timer",)

    def __init__(self, readers: Readers) -> None:
        super().__init__(readers)
        self._timer: asyncio.TimerHandle | None = None

    def take(self, what: object) -> Event | None:
        endpoint = self.readers.endpoint
        if endpoint.closed:
            raise ClosedError("the endpoint is closed")
        if self.readers.wanted() or self.readers.awaited(None):
            return endpoint._next_peer_event()
        return endpoint.next_event(0)

    def watch(self) -> None:
        self.readers.watch("any")
        self.readers.watch("queued")
        self.watched = True
        self._look_later()

    def _look_later(self) -> None:
        """Look once a while for events that no descriptor tells of."""
        every = self.readers.endpoint._poll_seconds
        if every is not None and self._timer is None:
            self._timer = self.loop.call_later(every, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.is_awaited():
            self.watched = False  # the next waiter watches again
            return
        try:
            news = self.readers.endpoint._next_peer_event()
        except Exception as error:
            self.readers.fail(error)
            return
        self._look_later()
        if news is not None:
            self.give(news)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Readers(Uncopied):
    """What one loop watches of an endpoint, and which tasks wait for what.

    Nothing that the loop holds refers to the AsyncEndpoint, so that one that the program forgot is
    collected before the loop is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> None:
        self.loop = loop
        self.endpoint = endpoint
        self.queues: dict[Any, TaskQueue] = {}  # by vector, None (any) and EVENTS
        self._vectors: list[_Vector] = []  # of these
        self._watched: dict[str, int] = {}  # descriptors beside those of vectors
        self._pid = os.getpid()

    def listen(self, what: Any) -> TaskQueue:
        """Make the queue for what a task waits for the first time."""
        queue: TaskQueue
        if what is None:
            queue = _AnyVector(self)
        elif what is EVENTS:
            queue = _Events(self)
        else:
            queue = _Vector(self, what)
            self._vectors.append(queue)
        self.queues[what] = queue
        return queue

    def wanted(self) -> bool:
        """Whether a task waits for a vector by number."""
        return any(vector.waiters for vector in self._vectors)

    def awaited(self, what: Any) -> TaskQueue | None:
        """Return the queue if a task waits in it."""
        queue = self.queues.get(what)
        return queue if queue is not None and queue.is_awaited() else None

    # -- what the loop calls ----------------------------------------------------------------------

    def _any_ready(self) -> None:
        """A vector was rung, or there are other events."""
        any_waiters, followers = self.awaited(None), self.awaited(EVENTS)
        others = any_waiters or followers
        if others is None:
            self._unwatch("any")
            return
        try:
            found = self.endpoint._wait_event(0)
            if found is True:
                news = self.endpoint._next_peer_event() if followers is not None else None
        except Exception as error:
            self.fail(error)
            return
        if found is True:
            if followers is not None and news is not None:
                followers.give(news)
        elif found is not None:
            taker = self.awaited(found.vector)
            if taker is not None:
                taker.give(found.rings)
            else:
                others.give(found)

    def _queued_ready(self) -> None:
        """There are events that another call has taken in, `peers` for instance."""
        followers = self.awaited(EVENTS)
        if followers is None:
            self._unwatch("queued")
        elif (news := self.endpoint._next_peer_event()) is not None:
            followers.give(news)

    def _urgent_ready(self) -> None:
        """There is an event that ends each wait for a vector."""
        if not any(vector.is_awaited() for vector in self._vectors):
            self._unwatch("urgent")
            for vector in self._vectors:
                vector.unwatch()  # watching a vector again watches for this again
            return
        try:
            self.endpoint._read_news()
        except Exception as error:
            self.fail(error)

    # -- watching ---------------------------------------------------------------------------------

    def watch(self, what: Literal["any", "queued", "urgent"]) -> None:
        if what not in self._watched:
            fd = self.endpoint._descriptor(what)
            if fd >= 0:
                self.loop.add_reader(fd, getattr(self, f"_{what}_ready"))
                self._watched[what] = fd

    def _unwatch(self, what: str) -> None:
        self.loop.remove_reader(self._watched.pop(what))
        if what != "urgent":
            for key in (None, EVENTS):
                if (queue := self.queues.get(key)) is not None:
                    queue.watched = False

    # -- the end ----------------------------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        """Raise the error in every task that waits."""
        for queue in self.queues.values():
            for waiter in queue.waiters:
                waiter.fail(error)

    def close(self) -> None:
        """Stop watching, and raise ClosedError in all tasks that wait."""
        # A forked child shares the loop's epoll object with its parent, and must not change it.
        if not self.loop.is_closed() and os.getpid() == self._pid:
            if self.loop.is_running() and asyncio._get_running_loop() is not self.loop:
                raise RuntimeError("the event loop runs in another thread: call_soon_threadsafe")
            for vector in self._vectors:
                vector.unwatch()
            for what in list(self._watched):
                self._unwatch(what)
            if isinstance(events := self.queues.get(EVENTS), _Events):
                events.stop()
            self.fail(ClosedError("the endpoint was closed while waiting"))
        # They refer to this object: without a cycle the endpoint needs no garbage collection.
        self.queues.clear()
        self._vectors.clear()
