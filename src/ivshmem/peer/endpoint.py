"""What a client and a guest device have in common, so that a program for one runs on the other.

Knows: the interface and the life cycle. Does not know: where peers and memory come from.

`ring` and `wait` are inherited from `_core.Doorbells` as they are: one call, and one system call at
most while nothing has to be waited for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from .. import _core
from .._core import Interrupt
from ..errors import ClosedError
from ..memory.region import Region
from ..system.uncopied import Uncopied


@dataclass(frozen=True)
class PeerJoined:
    """A peer connected; every vector of it can be rung."""

    peer: int


@dataclass(frozen=True)
class PeerLeft:
    """A peer is gone."""

    peer: int


@dataclass(frozen=True)
class ServerLost:
    """There will be no more news of peers; memory and doorbells of those known go on working."""

    reason: str


@dataclass(frozen=True)
class IdChanged:
    """The virtual machine was migrated to where it has another id; `before` is nobody's any more.

    Until the others know the new one, nobody can ring this peer.
    """

    before: int
    id: int


Event: TypeAlias = PeerJoined | PeerLeft | Interrupt | ServerLost | IdChanged


_LOOKS = 8  # at news that bring no event, when no time is left
_MOST_NEWS = 2 << 16  # that can be there at once: a peer of each id left, and another one joined

_E = TypeVar("_E", bound="Endpoint")  # typing.Self comes with Python 3.11


class Endpoint(Uncopied, _core.Doorbells):
    """One participant: an id, a shared region, doorbells to ring and vectors to listen on.

    Calls may come from several threads. `close()` ends waiting calls of other threads with
    ClosedError. A forked child may close its copy and do nothing else with it.

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

    # Seconds between two looks for news that no descriptor tells of; None: there are none.
    _every: float | None = None

    def current_id(self) -> int:
        """The id that this peer has now: `id` may not have heard of a migration yet."""
        return self.id

    def _next_news(self) -> Event | None:
        """The next event other than an interrupt that has been received already."""
        raise NotImplementedError

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield what happens: interrupts, peers that join and leave, a server that is lost, an id
        that is another after a migration.

        Ends when `timeout` seconds are over, however much still comes (None: never; 0: after what
        is there now), or when the endpoint is closed. What it did not get to is there for the next
        call. A peer that came and went between two looks is not mentioned.
        In an event loop of your own: when `fileno()` is readable, take `events(timeout=0)`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        left = timeout
        # The kernel tells of what is ready by turns: so many looks have seen all of it once.
        interrupts, news = self.vectors + 1, _MOST_NEWS
        while not self.closed:
            event = self.next_event(left)
            if event is None:
                return
            yield event
            if deadline is None:
                continue
            if timeout is not None and timeout > 0:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
            elif isinstance(event, Interrupt):
                interrupts -= 1
            else:
                news -= 1
            if not interrupts or not news:
                return

    def next_event(self, timeout: float | None = None) -> Event | None:
        """The next of `events`; None when nothing happens for `timeout` seconds, or if closed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        looks = 0
        while not self.closed:
            if (event := self._next_news()) is not None:
                return event
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            wait = left
            if self._every is not None:
                wait = self._every if left is None else min(left, self._every)
            try:
                found = self._wait_event(wait)
            except ClosedError:
                break
            if found is None and wait != left:
                continue
            if found is not True:
                return found
            # News without an event; a server that sends nothing else does not defeat the limit.
            if left == 0 and (looks := looks + 1) == _LOOKS:
                break
        return None

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    def close(self) -> None:
        """Let go of the doorbells and the memory; may be called twice.

        Raises:
            BufferError: a view of the memory is alive: that stays mapped until it is gone, and
                another close() unmaps it. All else is closed.
        """
        super().close()
        region = getattr(self, "region", None)  # a constructor that failed did not come to it
        if region is not None:
            region.close()

    def __enter__(self: _E) -> _E:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        # Without a region, the constructor has failed, and closed whatever it had made.
        if getattr(self, "region", None) is not None and not self.closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            self.close()
