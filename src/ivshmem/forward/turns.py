"""Internal: the one loop of all connections: whose turn it is.

Knows: what is ready, and that no connection waits for another. Does not know: what a turn does.

Sockets are watched for edges, and so is the descriptor that a ring makes readable: a connection
that continues in each turn costs one epoll_wait(2) for all, and no epoll_ctl(2).
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..channel import Channels
from ..channel.stream_poll import StreamPoll
from ..system.loop import Poller, woken_by_signals
from ..system.uncopied import Uncopied

EDGES = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


class TakesTurns(Protocol):
    """What has turns."""

    def turn(self) -> bool:
        """Do a fair share of what there is to do; whether another turn is due."""

    def awaken(self, directions: int) -> None:
        """Take in that the end of the channel can continue."""


class Turns(Uncopied):
    """The loop. What has something to do is queued once, and has its turn with all others.

    Attributes:
        poller: for descriptors. poll: for ends of channels, whose owners are `TakesTurns`.
    """

    def __init__(self, channels: Channels) -> None:
        self.poller = Poller()
        try:
            self.poll = StreamPoll(channels._member)
        except BaseException:
            self.poller.close()
            raise
        self._queue: deque[TakesTurns] = deque()
        self._queued: set[int] = set()  # ids of those in the queue
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._number = itertools.count()
        self._stopping = False
        self.poller.watch_events(self.poll.fileno(), self._rung, select.EPOLLIN | select.EPOLLET)

    def due(self, waiting: TakesTurns) -> None:
        """Give it a turn."""
        if id(waiting) not in self._queued:
            self._queued.add(id(waiting))
            self._queue.append(waiting)

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Call `act()` once, later."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._number), act))

    def _rung(self, _events: int) -> None:
        for owner, directions in self.poll.ready():
            owner.awaken(directions)

    def run(self) -> None:
        """Give turns until `stop` is called.

        Raises:
            ClosedError: the channels are closed, or the place of this process was freed.
        """
        self._rung(0)  # what rang before the descriptor was watched
        with woken_by_signals(self.poller):
            while not self._stopping:
                self.poller.dispatch(self.poller.wait(self._pause()))
                now = time.monotonic()  # once: what a timer sets for now comes in the next round
                while self._timers and self._timers[0][0] <= now:
                    heapq.heappop(self._timers)[2]()
                for _ in range(len(self._queue)):
                    waiting = self._queue.popleft()
                    self._queued.discard(id(waiting))
                    if waiting.turn():
                        self.due(waiting)

    def _pause(self) -> float | None:
        if self._queue:
            return 0
        if self._timers:
            return max(self._timers[0][0] - time.monotonic(), 0)
        return None

    def stop(self) -> None:
        """Let `run` return; from any thread or signal handler."""
        self._stopping = True
        self.poller.wake()

    def close(self) -> None:
        """Forget all that waits; may be called twice."""
        self.poll.close()
        self.poller.close()
