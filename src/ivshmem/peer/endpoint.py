"""The interface that a client and a guest device share: a program for one runs on the other.

Knows: the interface and the life cycle. Does not know: where peers and memory come from.

`ring` and `wait` are inherited from `_core.Doorbells` unchanged: one call each, and at most one
system call while nothing has to be waited for. What the data path and the loop of events ask of
each kind of endpoint is in `EndpointHooks`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias, TypeVar

from .. import _core
from .._core import Interrupt
from ..errors import ClosedError
from ..memory.region import Region
from ..system.time_limits import deadline_of, left_until, seconds_of
from ..system.uncopied import Uncopied


class _EndpointEvent:
    """Fields that do not change. An event equals those of its own class alone."""

    __slots__ = ()
    __match_args__: tuple[str, ...] = ()

    def _begin(self, *values: object) -> None:
        for name, value in zip(self.__match_args__, values, strict=True):
            object.__setattr__(self, name, value)

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name, None) for name in self.__match_args__)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} does not change")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} does not change")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        fields = zip(self.__match_args__, self._values(), strict=True)
        shown = (f"{name}={value!r}" for name, value in fields)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self._values()


class PeerJoined(_EndpointEvent):
    """A peer connected; each of its vectors can be rung."""

    __slots__ = __match_args__ = ("peer",)
    peer: int

    def __init__(self, peer: int) -> None:
        self._begin(peer)


class PeerLeft(_EndpointEvent):
    """A peer disconnected, or ended."""

    __slots__ = __match_args__ = ("peer",)
    peer: int

    def __init__(self, peer: int) -> None:
        self._begin(peer)


class Disconnected(_EndpointEvent):
    """The server is gone: no more events tell of peers. Memory and doorbells continue to work."""

    __slots__ = __match_args__ = ("reason",)
    reason: str

    def __init__(self, reason: str) -> None:
        self._begin(reason)


class IdChanged(_EndpointEvent):
    """The virtual machine was migrated, and has another id now; no peer has the id `before`.

    Until the other peers know the new id, none of them can ring this one.
    """

    __slots__ = __match_args__ = ("before", "id")
    before: int
    id: int

    def __init__(self, before: int, id: int) -> None:  # noqa: A002 - as the field
        self._begin(before, id)


Event: TypeAlias = PeerJoined | PeerLeft | Interrupt | Disconnected | IdChanged


_LOOKS = 8  # at messages that bring no event, when no time is left
# Events that can be there at once: for each id, its peer left and another one joined.
_MOST_EVENTS = 2 << 16


class EndpointHooks:
    """What each kind of endpoint implements; called by `_core.Doorbells`, `Endpoint` and aio.

    `Client` and the devices of `guest` override these. A hook may be called by any thread, and by
    a signal handler that interrupted the same hook.
    """

    # Seconds between two calls of `_next_peer_event` where no descriptor tells of such events, as
    # no device tells of a migration; None: a descriptor tells of all.
    _poll_seconds: float | None = None

    def _read_news(self) -> None:
        """Take in what the descriptor given to `_watch_news` brought; never wait.

        Called when that descriptor is readable; by a device that uses UIO, when a read says EIO.
        What this raises ends the wait (DeviceGone). Events are queued for `_next_peer_event`.
        """
        raise NotImplementedError

    def _look_for(self, peer: int, vector: int) -> None:
        """Called when a vector is to be rung that is not known: look for it once more.

        Returns if it may be known now; the caller then tries again.

        Raises:
            NoSuchPeer, NoSuchVector, NoInterrupts: it is not there.
        """
        raise NotImplementedError

    def _check_can_wait(self) -> None:
        """Called before a wait if there is no vector.

        Raises:
            NoInterrupts: there can never be one, so that the wait would never end.
        """

    def _next_peer_event(self) -> Event | None:
        """Return the next event that was taken in, other than an interrupt; None: there is none."""
        raise NotImplementedError


class EventLimit:
    """When an iteration over events ends.

    Attributes:
        left: seconds that the next event may take; None: without limit.
    """

    def __init__(self, timeout: float | None, vectors: int) -> None:
        self.left = None if timeout is None else seconds_of(timeout)
        self._waits = self.left is not None and self.left > 0
        self._deadline = deadline_of(self.left)
        # The kernel reports ready descriptors in turn: so many looks have seen each of them once.
        self._interrupts, self._others = vectors + 1, _MOST_EVENTS

    def ends_after(self, event: Event) -> bool:
        """Whether that event was the last one; to be called once for each event."""
        if self._deadline is None:
            return False  # without a limit
        if self._waits:
            self.left = self._deadline - time.monotonic()
            return self.left <= 0
        if isinstance(event, Interrupt):
            self._interrupts -= 1
        else:
            self._others -= 1
        return not self._interrupts or not self._others


_E = TypeVar("_E", bound="Endpoint")  # typing.Self comes with Python 3.11


class Endpoint(Uncopied, EndpointHooks, _core.Doorbells):
    """One participant: an id, a shared region, doorbells to ring and vectors to listen on.

    Made by `ivshmem.connect` and `guest.open`. A context manager, and an iterator over events.

    Calls may come from several threads and from signal handlers. `close()` ends waiting calls of
    other threads with ClosedError. A forked child may close its copy and do nothing else with it.

    Attributes:
        id: this peer's own id, 0..65535.
        region: the shared memory.
    """

    id: int
    region: Region

    def __new__(cls: type[_E], *_: object, **__: object) -> _E:
        if cls is Endpoint:
            raise TypeError("an Endpoint is made by ivshmem.connect or ivshmem.guest.open")
        return super().__new__(cls)

    def current_id(self) -> int:
        """Return the id that this peer has now; `id` changes only when IdChanged is taken.

        Raises:
            ClosedError, DeviceGone: a device is closed, or was unplugged.
        """
        return self.id

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield interrupts, and peers that join or leave, a lost server and a changed id.

        It ends when the endpoint is closed. In an event loop of your own: when `fileno()` is
        readable, take `events(timeout=0)`. A peer that joined and left between two looks is not
        mentioned.

        Args:
            timeout: seconds after which it ends, however much still comes; None: never; 0: after
                what is there now. What it did not get to is there for the next call.

        Raises:
            DeviceGone: the device was unplugged.
        """
        limit = EventLimit(timeout, self.vectors)
        while not self.closed and (event := self.next_event(limit.left)) is not None:
            yield event
            if timeout is not None and limit.ends_after(event):
                return

    def peer_events(self) -> list[Event]:
        """Return the events that are there now, except interrupts. Never waits.

        `events` does not yield them again.

        Raises:
            ClosedError, DeviceGone: a device is closed, or was unplugged.
        """
        return list(iter(self._next_peer_event, None))

    def next_event(self, timeout: float | None = None) -> Event | None:
        """Return the next of `events`.

        Args:
            timeout: seconds to wait at most; None: for ever; 0: do not wait.

        Returns:
            The event; None if nothing happened in time, or the endpoint is closed.

        Raises:
            DeviceGone: the device was unplugged.
        """
        deadline = deadline_of(timeout)
        looks = 0
        while not self.closed:
            if (event := self._next_peer_event()) is not None:
                return event
            left = None if deadline is None else left_until(deadline)
            wait = left
            if self._poll_seconds is not None:
                wait = self._poll_seconds if left is None else min(left, self._poll_seconds)
            try:
                found = self._wait_event(wait)
            except ClosedError:
                break
            if found is None and wait != left:
                continue
            if found is not True:
                return found
            # Messages without an event: a server that sends only these cannot defeat the limit.
            if left == 0 and (looks := looks + 1) == _LOOKS:
                break
        return None

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    def close(self) -> None:
        """Close the doorbells and the memory. May be called twice, and by any thread.

        Raises:
            BufferError: a view of the memory is alive. The memory stays mapped until the view is
                released and close() is called again. Everything else is closed.
        """
        super().close()
        region = getattr(self, "region", None)  # a constructor that failed did not set it
        if region is not None:
            region.close()

    def __enter__(self: _E) -> _E:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # Without a region, the constructor has failed, and has closed what it had made.
        if getattr(self, "region", None) is not None and not self.closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            self.close()
