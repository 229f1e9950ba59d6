"""Endpoints for asyncio: `await client.wait(0, timeout=1)`, `async for event in client`.

Knows: event loops, and how a task sleeps until a descriptor is readable.
Does not know: what comes over a descriptor, or where an endpoint comes from.

Invariants:
1. A count is taken only for a task that continues at once, inside the reader's callback. Nothing
   can come between, so no cancellation, time limit or close() loses one. A count that no task waits
   for stays in its eventfd, for the next wait here or of the endpoint itself.
2. No task is resumed inside another: only the callbacks of readers and timers resume one directly;
   all others use call_soon.
3. The loop watches a descriptor only while it is open, and at most once without a waiter.
4. Nothing here blocks the loop. Rings use `ring_nowait`, which a peer that filled the counter of
   its doorbell cannot hold up. What takes time (opening, `aclose`) has a thread. A peer that rings
   without end does not keep the loop from turning. Only `close()` may take time.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import os
import socket
import threading
from asyncio import get_running_loop
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable
from contextvars import Context
from typing import Any, Generic, Literal, SupportsIndex, TypeVar, cast, overload

from . import guest
from ._core import Interrupt
from .errors import ClosedError
from .guest import GuestDevice
from .guest.device import Access, Memory
from .memory.region import Region
from .native.bell import Doorbell
from .native.mapping import Atomic
from .peer import connecting
from .peer.client import Client
from .peer.directory import Directory, Publication
from .peer.endpoint import Endpoint, Event, EventLimit
from .peer.names_table import Entry
from .system.time_limits import deadline_of, seconds_of
from .system.uncopied import Uncopied

__all__ = [
    "AsyncEndpoint",
    "Opening",
    "connect_async",
    "open_async",
    "publish_async",
    "wait_for_async",
]

# So often in a row a ring that is there already is taken without suspending; then other tasks have
# their turn.
_STREAK = 64

_EVENTS = object()  # the key of the queue of `async for`

_E = TypeVar("_E", bound=Endpoint)
_T = TypeVar("_T")


class AsyncEndpoint(Uncopied, Generic[_E]):
    """An endpoint whose waiting is asyncio's; made by `connect_async` and `open_async`.

    It belongs to the event loop in which a task first waits for it, until that loop is closed. Many
    tasks can wait at once. Each interrupt goes to one task: first to those that wait for that
    vector, then to those that wait for any, then to `async for`; among equals, to the task that
    began first. Rings that come while no task waits are counted for the next one that does.

    Call it in the loop's thread. `ring`, `ring_all` and `doorbell` may be called by any thread.

    The calls have the names, the arguments and the results of the endpoint's. A `timeout` in
    seconds ends a wait with None; cancellation and `asyncio.timeout` work too. A wait that is cut
    short takes no ring with it. (`echo` is not here: it is a loop without the interpreter. Call
    `endpoint.echo` in a thread.)

    Close this, not the endpoint, whose descriptors the loop would continue to watch. `async with`
    and `aclose` do so in a thread.

    Attributes:
        endpoint: the wrapped one.
        ring: `ring(peer, vector=0)`, which never waits: the wrapped one's `ring_nowait`.
    """

    _closing = False

    def __init__(self, endpoint: _E) -> None:
        # A store to a device's register never waits.
        self.ring = endpoint.ring if isinstance(endpoint, GuestDevice) else endpoint.ring_nowait
        self.endpoint = endpoint
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: _Readers
        self._queues: dict[Any, _Queue] = {}  # those of _readers

    @property
    def id(self) -> int:
        """This peer's own id, 0..65535."""
        return self.endpoint.id

    @property
    def region(self) -> Region:
        """The shared memory."""
        return self.endpoint.region

    @property
    def vectors(self) -> int:
        """How many vectors others can ring here: they are 0..vectors-1."""
        return self.endpoint.vectors

    @property
    def peers(self: AsyncEndpoint[Client]) -> list[int]:
        """The ids of the other peers, as of now, ascending. (A device does not know them.)"""
        return self.endpoint.peers

    @property
    def connected(self: AsyncEndpoint[Client]) -> bool:
        """Whether the connection to the server is open."""
        return self.endpoint.connected

    @property
    def closed(self) -> bool:
        """Whether close() or aclose() was called."""
        return self._closing or self.endpoint.closed

    def current_id(self) -> int:
        """Return the id that this peer has now, as Endpoint.current_id()."""
        return self.endpoint.current_id()

    def fileno(self) -> int:
        """Return a descriptor for another event loop than asyncio's, as Endpoint.fileno()."""
        return self.endpoint.fileno()

    def vectors_of(self: AsyncEndpoint[Client], peer: int) -> int:
        """Return how many vectors of a peer can be rung; 0 if it is not connected."""
        return self.endpoint.vectors_of(peer)

    def peer_events(self) -> list[Event]:
        """Return the events that are there now, except interrupts, as Endpoint.peer_events()."""
        return self.endpoint.peer_events()

    def ring_all(self, peers: Iterable[int] | None = None, vectors: int | Iterable[int] = 0) -> int:
        """Ring several doorbells, as Endpoint.ring_all(); never wait."""
        return self.endpoint.ring_all_nowait(peers, vectors)

    def doorbell(self, peer: int, vector: int = 0) -> Doorbell:
        """Look up a doorbell, as Endpoint.doorbell(); its `ring` never waits."""
        return self.endpoint._doorbell_nowait(peer, vector)

    @overload
    async def wait(
        self, vectors: Iterable[int] | None = None, timeout: None = None
    ) -> Interrupt: ...
    @overload
    async def wait(self, vectors: int, timeout: None = None) -> int: ...
    @overload
    async def wait(
        self, vectors: Iterable[int] | None = None, timeout: float | None = None
    ) -> Interrupt | None: ...
    @overload
    async def wait(self, vectors: int, timeout: float | None = None) -> int | None: ...
    async def wait(self, vectors: Any = None, timeout: float | None = None) -> Any:
        """Wait for an interrupt. One that is there already is returned without suspending.

        (After 64 of these in a row it does suspend, so that other tasks have their turn.)

        Args:
            vectors: a number: wait for that vector; None: for any; an iterable of numbers: for any
                of these.
            timeout: seconds to wait at most; None: for ever; 0: do not wait.

        Returns:
            For one vector: how often it was rung since the last look, at least 1.
            Else: an Interrupt(vector, rings).
            None if nothing came in time.
            Rings coalesce in the count: never count messages by interrupts.

        Raises:
            NoSuchVector: this endpoint has no such vector.
            ClosedError: the endpoint is closed, or was closed during the wait.
            ValueError: several were to be waited for, and there are none.
            DeviceGone: the device was unplugged.
            RuntimeError: the endpoint belongs to another event loop.
        """
        if self._loop is not get_running_loop():
            self._bind()
        try:
            queue = self._queues.get(vectors)
        except TypeError:  # a list, for instance
            queue = None
        if queue is None:
            if hasattr(vectors, "__iter__"):
                return await self._wait_some(vectors, timeout)
            queue = self._listen(vectors)
        waiters = queue.waiters
        if not waiters and queue.streak < _STREAK:
            found = queue.take(vectors)
            if found:
                queue.streak += 1
                return found
        if timeout is not None and not (timeout := seconds_of(timeout)):
            return await self._look_after_others(queue, vectors)
        queue.streak = 0
        if not queue.watched:
            queue.watch()
        waiter = queue.spare
        if waiter is None:
            waiter = _Waiter(queue.loop)
        else:
            queue.spare = None
            waiter._asyncio_future_blocking = True
        waiters.append(waiter)
        timer = None if timeout is None else queue.loop.call_later(timeout, waiter.expire)
        try:
            await waiter
        except BaseException:
            with contextlib.suppress(ValueError):  # another task's turn removed it already
                waiters.remove(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if waiter.found is None:  # the time is over
            with contextlib.suppress(ValueError):
                waiters.remove(waiter)
        queue.spare = waiter
        return waiter.found

    async def _look_after_others(self, queue: _Queue, what: Any) -> Any:
        """Look once without waiting, after other tasks have had their turn if that is due."""
        if queue.streak >= _STREAK and not queue.waiters:
            queue.streak = 0
            await asyncio.sleep(0)
            if not queue.waiters and (found := queue.take(what)):
                queue.streak += 1
                return found
        return None

    def _listen(self, what: Any) -> _Queue:
        if self._closing:
            raise ClosedError("the endpoint is closed")
        return self._readers.listen(what)

    async def _wait_some(self, vectors: Iterable[int], timeout: float | None) -> Interrupt | None:
        """Wait in the queues of several vectors at once."""
        queues: dict[int, _Queue] = {}
        for vector in map(operator.index, vectors):
            queues[vector] = self._queues.get(vector) or self._listen(vector)
        if not queues:
            raise ValueError("no vector to wait for")
        for vector, queue in queues.items():
            if not queue.waiters and queue.streak < _STREAK and (rings := queue.take(vector)):
                queue.streak += 1
                return Interrupt(vector, rings)
        if timeout is not None and not (timeout := seconds_of(timeout)):
            for vector, queue in queues.items():
                if rings := await self._look_after_others(queue, vector):
                    return Interrupt(vector, rings)
            return None
        waiter = _Waiter(self._readers.loop)
        timer = None if timeout is None else waiter._loop.call_later(timeout, waiter.expire)
        shares = [(queue, _Share(waiter, vector)) for vector, queue in queues.items()]
        try:
            for queue, share in shares:
                queue.streak = 0
                if not queue.watched:
                    queue.watch()
                queue.waiters.append(share)
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
            for queue, share in shares:
                with contextlib.suppress(ValueError):  # it was removed already
                    queue.waiters.remove(share)
        found: Interrupt | None = waiter.found
        return found

    async def wait_word(
        self,
        word: Atomic,
        old: int,
        vector: int = 0,
        timeout: float | None = None,
        *,
        sleeping: Atomic | None = None,
    ) -> int | None:
        """Wait until a word of shared memory differs from `old`, as Endpoint.wait_word().

        It never spins, which would block the loop: it looks, and sleeps until `vector` is rung.

        Returns:
            The value; None if it did not change in time.

        Raises:
            NoSuchVector, ClosedError, DeviceGone, RuntimeError: as of `wait`; ClosedError also if
                the region is closed.
            TypeError: `sleeping` is in memory that is mapped for reading only.
        """
        loop = get_running_loop()
        end = None if timeout is None else loop.time() + seconds_of(timeout)
        while (value := word.load("seq_cst")) == old:
            left = None if end is None else max(end - loop.time(), 0.0)
            rung: int | None = 1
            try:
                if sleeping is not None:
                    sleeping.store(1, "seq_cst")
                if word.load("seq_cst") == old:
                    rung = await self.wait(vector, left)
            finally:
                if sleeping is not None:
                    sleeping.store(0, "seq_cst")
            if rung is None or left == 0:
                value = word.load("seq_cst")
                return None if value == old else value
        return value

    async def next_event(self, timeout: float | None = None) -> Event | None:
        """Return the next of `events`; None: nothing happened in `timeout` seconds, or closed."""
        try:
            return await self.wait(_EVENTS, timeout)  # type: ignore[call-overload, no-any-return]
        except ClosedError:
            return None

    async def events(self, timeout: float | None = None) -> AsyncIterator[Event]:
        """Yield what happens, as Endpoint.events(): for `timeout` seconds, or until closed."""
        limit = EventLimit(timeout, self.vectors)
        while (event := await self.next_event(limit.left)) is not None:
            yield event
            if limit.ends_after(event):
                return

    def __aiter__(self) -> AsyncIterator[Event]:
        """Iterate over events, as Endpoint.events(), until this is closed."""
        return self

    async def __anext__(self) -> Event:
        event = await self.next_event()
        if event is None:
            raise StopAsyncIteration
        return event

    def _bind(self) -> None:
        """Attach to the running loop.

        Raises:
            RuntimeError: it is attached to another loop, which is not closed.
        """
        if self._loop is not None:
            if not self._loop.is_closed():
                raise RuntimeError(
                    f"{self!r} belongs to another event loop: each needs an endpoint of its own"
                )
            self._readers.close()
        loop = get_running_loop()
        self._readers = _Readers(loop, self.endpoint)
        self._queues = self._readers.queues
        self._loop = loop  # last: if it is set, there are readers to close

    def close(self) -> None:
        """Close the endpoint; waiting tasks get ClosedError. May be called twice.

        This can block: a device is given back to its driver (seconds, if another process is about
        to open it), and a region is unmapped (30 ms for each GiB). In a loop use `aclose`.

        Raises:
            BufferError: a view of the memory is alive. The memory stays mapped until the view is
                released and close() is called again. Everything else is closed.
            RuntimeError: the loop runs in another thread: use its call_soon_threadsafe.
        """
        self._stop()
        self.endpoint.close()

    async def aclose(self) -> None:
        """Close like `close`, but in a thread, so that the loop continues.

        If this is cancelled, the thread continues by itself. No task can wait from now on.

        Raises:
            BufferError, RuntimeError: as of `close`.
        """
        self._stop()
        await _close_aside(self.endpoint)

    def _stop(self) -> None:
        if self._loop is not None:
            self._readers.close()
        self._closing = True

    async def __aenter__(self) -> AsyncEndpoint[_E]:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        # A constructor that failed did not set it.
        return f"<ivshmem.aio.AsyncEndpoint of {getattr(self, 'endpoint', None)!r}>"

    def __del__(self) -> None:
        # The program may still use the endpoint; otherwise that warns that it was not closed.
        loop = getattr(self, "_loop", None)
        if loop is not None:
            try:
                self._readers.close()
            except RuntimeError:  # this is another thread than the loop's
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._readers.close)


class _Waiter:
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

    def __await__(self) -> Generator[_Waiter, None, None]:
        # Yields itself once. A tuple's iterator is quicker than a generator.
        return iter((self,))  # type: ignore[return-value]

    # Called by the task.

    def add_done_callback(self, callback: Callable[[_Waiter], object], *, context: Context) -> None:
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


class _Share:
    """A waiter's place in the queue of one of several vectors."""

    __slots__ = ("_vector", "_waiter")

    def __init__(self, waiter: _Waiter, vector: int) -> None:
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


class _Queue:
    """The tasks that wait for the same thing, the oldest first."""

    __slots__ = ("loop", "readers", "spare", "streak", "waiters", "watched")

    take: Callable[[Any], Any]  # takes what is there already; called with the queue's key

    def __init__(self, readers: _Readers) -> None:
        self.readers = readers
        self.loop = readers.loop
        self.waiters: deque[_Waiter | _Share] = deque()
        self.watched = False  # whether the loop watches the descriptor
        self.streak = 0  # how often in a row something was there already
        self.spare: _Waiter | None = None  # a waiter to be used again

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


class _Vector(_Queue):
    """Tasks that wait for rings of one vector."""

    __slots__ = ("_fd", "_number", "take")

    def __init__(self, readers: _Readers, number: int) -> None:
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


class _Any(_Queue):
    """Tasks that wait for interrupts of any vector."""

    __slots__ = ()

    def take(self, what: object) -> Interrupt | None:
        # If tasks wait for a vector by number, its rings are theirs: the readers distribute them.
        return None if self.readers.wanted() else self.readers.endpoint.wait(None, 0)

    def watch(self) -> None:
        self.readers.watch("any")
        self.watched = True


class _Events(_Queue):
    """Tasks that wait for any event."""

    __slots__ = ("_timer",)

    def __init__(self, readers: _Readers) -> None:
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


class _Readers(Uncopied):
    """What one loop watches of an endpoint, and which tasks wait for what.

    Nothing that the loop holds refers to the AsyncEndpoint, so that one that the program forgot is
    collected before the loop is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> None:
        self.loop = loop
        self.endpoint = endpoint
        self.queues: dict[Any, _Queue] = {}  # by vector, None (any) and _EVENTS
        self._vectors: list[_Vector] = []  # of these
        self._watched: dict[str, int] = {}  # descriptors beside those of vectors
        self._pid = os.getpid()

    def listen(self, what: Any) -> _Queue:
        """Make the queue for what a task waits for the first time."""
        queue: _Queue
        if what is None:
            queue = _Any(self)
        elif what is _EVENTS:
            queue = _Events(self)
        else:
            queue = _Vector(self, what)
            self._vectors.append(queue)
        self.queues[what] = queue
        return queue

    def wanted(self) -> bool:
        """Whether a task waits for a vector by number."""
        return any(vector.waiters for vector in self._vectors)

    def awaited(self, what: Any) -> _Queue | None:
        """Return the queue if a task waits in it."""
        queue = self.queues.get(what)
        return queue if queue is not None and queue.is_awaited() else None

    # -- what the loop calls ----------------------------------------------------------------------

    def _any_ready(self) -> None:
        """A vector was rung, or there are other events."""
        any_waiters, followers = self.awaited(None), self.awaited(_EVENTS)
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
        followers = self.awaited(_EVENTS)
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
            for key in (None, _EVENTS):
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
            if isinstance(events := self.queues.get(_EVENTS), _Events):
                events.stop()
            self.fail(ClosedError("the endpoint was closed while waiting"))
        # They refer to this object: without a cycle the endpoint needs no garbage collection.
        self.queues.clear()
        self._vectors.clear()


# -- opening --------------------------------------------------------------------------------------


class Opening(Generic[_E]):
    """What `connect_async` and `open_async` return: `await` or `async with` opens the endpoint."""

    def __init__(self, opener: Callable[[], Coroutine[Any, Any, AsyncEndpoint[_E]]]) -> None:
        self._opener = opener
        self._opened: AsyncEndpoint[_E]

    def __await__(self) -> Generator[Any, None, AsyncEndpoint[_E]]:
        return self._opener().__await__()

    async def __aenter__(self) -> AsyncEndpoint[_E]:
        self._opened = await self._opener()
        return self._opened

    async def __aexit__(self, *error: object) -> None:
        await self._opened.aclose()


def connect_async(
    path: str | os.PathLike[str],
    *,
    timeout: float | None = None,
    vectors: int | None = None,
    readonly: bool = False,
    wait_for_server: bool = False,
) -> Opening[Client]:
    """Connect to the server at `path`: `async with connect_async(path) as client`, or `await` it.

    The arguments, and what is raised, are those of `connect`. It does not block the loop. If it is
    cancelled, it leaves no connection behind.
    """

    async def opener() -> AsyncEndpoint[Client]:
        deadline = deadline_of(timeout)
        sock = await _knock(path, timeout, deadline, wait_for_server)
        try:
            plug = sock.dup()  # the thread may close its own at any time
        except BaseException:
            sock.close()
            raise

        def join() -> Client:
            try:
                return Client._join(sock, os.fsdecode(path), deadline, vectors, readonly)
            except BaseException:
                sock.close()
                raise

        def stop() -> None:
            with contextlib.suppress(OSError):  # it has ended by itself
                plug.shutdown(socket.SHUT_RDWR)

        with plug:
            return await _by_thread(join, stop, sock.close)

    return Opening(opener)


async def _knock(
    path: str | os.PathLike[str],
    timeout: float | None,
    deadline: float | None,
    wait_for_server: bool,
) -> socket.socket:
    """Connect to the server, which may not have accepted the connection yet."""
    give_up = connecting.accepts_nobody
    awaited = connecting.Awaited(path)
    for pause in connecting.pauses(deadline):
        try:
            return connecting.connect(path, 0)
        except TimeoutError:  # the backlog is full
            give_up = connecting.accepts_nobody
        except OSError as error:
            if not wait_for_server or not awaited.may_come(error):
                raise
            give_up = connecting.nobody_came
        await asyncio.sleep(pause)
    raise give_up(os.fsdecode(path), timeout or 0)


def open_async(
    address: str | None = None, *, access: Access | None = None, memory: Memory | None = None
) -> Opening[GuestDevice]:
    """Open a guest's device: `async with open_async() as device`, or `await` it.

    The arguments, and what is raised, are those of `guest.open`. It does not block the loop. If it
    is cancelled, the device is still opened, and then closed.
    """
    return Opening(lambda: _by_thread(lambda: guest.open(address, access=access, memory=memory)))


async def _by_thread(
    open_: Callable[[], _E],
    stop: Callable[[], object] | None = None,
    abandon: Callable[[], object] | None = None,
) -> AsyncEndpoint[_E]:
    """Call `open_` in a thread of its own.

    It is not a thread of the loop's executor. Those stay, and while there is another thread each
    ring must release the interpreter's lock. And the end of the loop would wait for a server that
    is silent.

    Args:
        stop: makes the call end early.
        abandon: called instead of `open_`, if no thread can be started.
    """
    loop = get_running_loop()
    done = loop.create_future()
    lock = threading.Lock()
    found: list[_E | BaseException] = []
    wanted = True

    def run() -> None:
        try:
            deliver(open_())
        except BaseException as error:
            deliver(error)

    def deliver(result: _E | BaseException) -> None:
        with lock:
            if wanted:
                found.append(result)
                with contextlib.suppress(RuntimeError):  # the loop is closed; the task finds it
                    loop.call_soon_threadsafe(arrive)
                return
        if isinstance(result, Endpoint):
            result.close()

    def arrive() -> None:
        if not done.done():
            done.set_result(None)

    # Without `stop` it is not a daemon: the process ends only after a device was given back.
    thread = threading.Thread(target=run, name="ivshmem-open", daemon=stop is not None)
    try:
        thread.start()
        await done
    except BaseException:
        with lock:
            wanted = False
        if stop is not None:
            stop()
        if thread.ident is None and abandon is not None:
            abandon()
        for late in found:
            if isinstance(late, Endpoint):
                _start_closing(late)
        raise
    thread.join()  # it is about to return
    if isinstance(found[0], BaseException):
        raise found.pop()  # type: ignore[misc]
    return AsyncEndpoint(found[0])


# -- closing --------------------------------------------------------------------------------------


async def _close_aside(endpoint: Endpoint) -> None:
    """Close the endpoint in a thread of its own, and raise what that raises."""
    loop = get_running_loop()
    done = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if done.done():
            return  # cancelled
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def closed(error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, error)

    thread = _start_closing(endpoint, closed)
    await done
    if thread is not None:
        thread.join()  # it is about to return


def _start_closing(
    endpoint: Endpoint, closed: Callable[[BaseException | None], object] | None = None
) -> threading.Thread | None:
    """Close it in a thread, or here if none can start; then call `closed` with the error."""

    def run() -> None:
        failure: BaseException | None = None
        try:
            endpoint.close()
        except BaseException as error:
            failure = error
        if closed is not None:
            closed(failure)

    # Not a daemon: the process ends only after a device was given back.
    thread = threading.Thread(target=run, name="ivshmem-close")
    try:
        thread.start()
    except RuntimeError:  # no more threads: to block the loop is better than to keep the device
        run()
        return None
    return thread


# -- the directory of names -----------------------------------------------------------------------


async def wait_for_async(directory: Directory, name: str, timeout: float | None = None) -> Entry:
    """Return what `directory.wait_for(name, timeout)` returns; the loop continues during the wait.

    It raises what that raises. (`directory.lookup` never waits, and needs no twin.)
    """
    return await _go_through(directory._wait_for(name, timeout))


async def publish_async(
    directory: Directory,
    name: str,
    role: str = "",
    vector_range: range | None = None,
    *,
    id: SupportsIndex | None = None,  # noqa: A002 - as in Directory.publish
    timeout: float | None = None,
) -> Publication:
    """Publish as `directory.publish` does, which can take two leases; the loop continues.

    It raises what that raises. If it is cancelled, nothing is published.
    """
    return await _go_through(directory._publish(name, role, vector_range, id, timeout))


async def _go_through(steps: Generator[float, None, _T]) -> _T:
    while True:
        try:
            pause = next(steps)
        except StopIteration as done:
            return cast(_T, done.value)
        await asyncio.sleep(pause)
