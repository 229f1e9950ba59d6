"""Endpoints for asyncio: `await client.wait(0, timeout=1)`, `async for event in client`.

Knows: what a user calls, and which of these calls need a thread. Does not know: how tasks sleep
(peer/waiting_tasks.py), or where an endpoint comes from.

Nothing here blocks the loop. Rings use `ring_nowait`, which a peer that filled the counter of its
doorbell cannot hold up. What takes time (opening, `aclose`, `close_async`) has a thread. A peer
that rings without end does not keep the loop from turning. Only `close()` may take time.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import os
import socket
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable
from typing import Any, Generic, SupportsIndex, TypeVar, cast, overload

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
from .peer.in_thread import close_in_thread, open_in_thread
from .peer.names_table import Entry
from .peer.waiting_tasks import EVENTS, STREAK, Readers, Share, TaskQueue, Waiter
from .system.time_limits import deadline_of, seconds_of
from .system.uncopied import Uncopied

__all__ = [
    "AsyncEndpoint",
    "Opening",
    "close_async",
    "connect_async",
    "open_async",
    "publish_async",
    "wait_for_async",
]

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
        if not isinstance(endpoint, Endpoint):
            raise TypeError(f"expected a Client or a GuestDevice, not {endpoint!r}")
        # A store to a device's register never waits.
        self.ring = endpoint.ring if isinstance(endpoint, GuestDevice) else endpoint.ring_nowait
        self.endpoint = endpoint
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: Readers
        self._queues: dict[Any, TaskQueue] = {}  # those of _readers

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
        if timeout is not None:
            timeout = seconds_of(timeout)
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
        if not waiters and queue.streak < STREAK:
            found = queue.take(vectors)
            if found:
                queue.streak += 1
                return found
        if timeout == 0:
            return await self._look_after_others(queue, vectors)
        queue.streak = 0
        if not queue.watched:
            queue.watch()
        waiter = queue.spare
        if waiter is None:
            waiter = Waiter(queue.loop)
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

    async def _look_after_others(self, queue: TaskQueue, what: Any) -> Any:
        """Look once without waiting, after other tasks have had their turn if that is due."""
        if queue.streak >= STREAK and not queue.waiters:
            queue.streak = 0
            await asyncio.sleep(0)
            if not queue.waiters and (found := queue.take(what)):
                queue.streak += 1
                return found
        return None

    def _listen(self, what: Any) -> TaskQueue:
        if self._closing:
            raise ClosedError("the endpoint is closed")
        return self._readers.listen(what)

    async def _wait_some(self, vectors: Iterable[int], timeout: float | None) -> Interrupt | None:
        """Wait in the queues of several vectors at once."""
        queues: dict[int, TaskQueue] = {}
        for vector in map(operator.index, vectors):
            queues[vector] = self._queues.get(vector) or self._listen(vector)
        if not queues:
            raise ValueError("no vector to wait for")
        for vector, queue in queues.items():
            if not queue.waiters and queue.streak < STREAK and (rings := queue.take(vector)):
                queue.streak += 1
                return Interrupt(vector, rings)
        if timeout == 0:
            for vector, queue in queues.items():
                if rings := await self._look_after_others(queue, vector):
                    return Interrupt(vector, rings)
            return None
        waiter = Waiter(self._readers.loop)
        timer = None if timeout is None else waiter._loop.call_later(timeout, waiter.expire)
        shares = [(queue, Share(waiter, vector)) for vector, queue in queues.items()]
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
            return await self.wait(EVENTS, timeout)  # type: ignore[call-overload, no-any-return]
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
        self._readers = Readers(loop, self.endpoint)
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
        await close_in_thread(self.endpoint)

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


# -- opening --------------------------------------------------------------------------------------


class Opening(Generic[_E]):
    """Opens an endpoint by `await` or `async with`; made by `connect_async` and `open_async`."""

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
            return AsyncEndpoint(await open_in_thread(join, stop, sock.close))

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

    async def opener() -> AsyncEndpoint[GuestDevice]:
        device = await open_in_thread(lambda: guest.open(address, access=access, memory=memory))
        return AsyncEndpoint(device)

    return Opening(opener)


# -- the directory of names -----------------------------------------------------------------------


async def close_async(directory: Directory) -> None:
    """Close as `directory.close` does, in a thread, so that the loop continues.

    (`close` waits for a sign of life that the directory's thread is writing just then, for a second
    at most.) If this is cancelled, the thread continues by itself.
    """
    await close_in_thread(_checked(directory))


async def wait_for_async(directory: Directory, name: str, timeout: float | None = None) -> Entry:
    """Return what `directory.wait_for(name, timeout)` returns; the loop continues during the wait.

    It raises what that raises. (`directory.lookup` never waits, and needs no twin.)
    """
    return await _go_through(_checked(directory)._wait_for(name, timeout))


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
    steps = _checked(directory)._publish(name, role, vector_range, id, timeout)
    return await _go_through(steps)


def _checked(directory: Directory) -> Directory:
    if isinstance(directory, Directory):
        return directory
    raise TypeError(f"expected a Directory, as Directory.open returns it, not {directory!r}")


async def _go_through(steps: Generator[float, None, _T]) -> _T:
    while True:
        try:
            pause = next(steps)
        except StopIteration as done:
            return cast(_T, done.value)
        await asyncio.sleep(pause)
