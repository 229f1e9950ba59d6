"""Has a service manager keep groups of descriptors and a journal, for when the service is killed.

Knows: the names in the manager's fd store, and in what order a group is given back. Does not know:
what descriptors are for, except that the first of a group is a socket and the others are not.

Invariants:
1. The loop never waits here for longer than _MOMENT. What the manager has no room for by then goes
   into a queue, in order, and while anything is in the queue the loop does not wait at all.
2. `settled` says whether everything was sent. The service tells a newcomer nothing before that.
   Therefore a SIGKILL ends no connection on which anything was said.
3. No two groups have the same name at the same time.
"""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from ..native import descriptors
from ..system import late_logging
from ..system.systemd import Notifier
from ..system.uncopied import Uncopied
from ..text import counted
from .journal import Journal, is_group_name

_log = late_logging.log_of("ivshmem.lasting")

_JOURNAL = "journal"

# Seconds for which the manager may read nothing, as systemd does during a daemon-reload on a large
# machine. After that the journal is given up.
_PATIENCE = 30.0
# The manager's socket has room for ten datagrams, so a burst of joins fills it even if the manager
# reads. The manager makes room sooner than the loop would come back to a newcomer that waits.
_MOMENT = 0.1
_PAUSE = 0.02  # seconds between tries: no event tells when descriptors in flight have arrived
_LAST = 5.0  # seconds that `close` may take

# Groups by name, as the manager gives them back.
Groups = dict[str, list[int]]


class FdStore(Uncopied):
    """Has the service manager keep the descriptors that a journal names, from now on.

    The loop calls `step()` when `fileno()` is readable. The owner calls `close()` at the end.

    If the manager reads nothing, the journal is given up: the log says so, the service continues,
    and a successor begins without its connections.
    """

    def __init__(self, notifier: Notifier, journal: Journal, patience: float = _PATIENCE) -> None:
        self._notifier = notifier
        self._journal = journal
        self._patience = patience
        self._given_up = False
        # What is still to be sent: a name, and a descriptor to keep (None: drop all of that name).
        # The descriptor is a copy, because its owner may close the original before it is sent.
        self._queue: deque[tuple[str, int | None]] = deque()
        self._since = 0.0  # when the manager last read something, or the queue began
        self._timer = descriptors.Timer()
        journal.keep, journal.drop, journal.settled = self.keep, self.drop, self.settled

    def keep_journal(self, *, replace: bool) -> None:
        """Have the journal itself kept. The first server does it; successors get it back."""
        if replace:
            self.drop(_JOURNAL)
        self.keep(_JOURNAL, [self._journal.fileno()])

    def keep(self, name: str, fds: Sequence[int]) -> None:
        """Have a group kept. Calls of `keep` and `drop` take effect in their order."""
        for fd in fds:  # one in each message: of several in one, systemd loses the order
            self._add(name, fd)

    def drop(self, name: str) -> None:
        """Undo `keep`."""
        self._add(name, None)

    def settled(self) -> bool:
        """Whether everything was sent."""
        return not self._queue

    def fileno(self) -> int:
        """Return a descriptor that is readable when `step` has something to do."""
        return self._timer.fileno()

    def step(self) -> None:
        """Send as much of the queue as the manager has room for."""
        self._timer.set(0)
        while self._queue:
            name, fd = self._queue[0]
            if not self._send(name, fd):
                break
            self._queue.popleft()
            _close(fd)
            self._since = time.monotonic()
        self._set_timer()

    def flush(self, seconds: float) -> None:
        """Wait until everything is sent, at most `seconds`.

        Only for the start and the end, when nobody is served.
        """
        deadline = time.monotonic() + seconds
        while self._queue and time.monotonic() < deadline:
            self.step()
            if self._queue:
                time.sleep(_PAUSE)

    def close(self) -> None:
        """Send the rest, which takes some seconds at most. May be called twice."""
        self.flush(_LAST)
        self._empty_queue()
        self._timer.close()

    def _add(self, name: str, fd: int | None) -> None:
        if self._given_up or (not self._queue and self._send(name, fd, _MOMENT)):
            return
        if self._given_up:
            return
        if not self._queue:
            self._since = time.monotonic()
        try:
            self._queue.append((name, None if fd is None else os.dup(fd)))
        except OSError as error:  # EMFILE
            self._give_up(error.strerror or str(error))
        self._set_timer()

    def _send(self, name: str, fd: int | None, seconds: float = 0.0) -> bool:
        """Send one message; return whether the manager had room for it within `seconds`."""
        try:
            if fd is None:
                sent = self._notifier.drop(name, timeout=seconds)
            else:
                sent = self._notifier.store(name, [fd], timeout=seconds) == 1
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return False
        if self._notifier.gone:
            self._give_up("its socket is gone")
        return sent

    def _set_timer(self) -> None:
        if not self._queue:
            return
        if time.monotonic() > self._since + self._patience:
            self._give_up(f"it has read nothing for {counted(self._patience, 'second')}")
        else:
            self._timer.set(_PAUSE)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._empty_queue()
        self._journal.spoil()
        _log.error(
            "the service manager keeps nothing from now on (%s): a restart ends all connections",
            reason,
        )

    def _empty_queue(self) -> None:
        while self._queue:
            _close(self._queue.popleft()[1])


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def sort_out(passed: Iterable[tuple[str, int]]) -> tuple[int | None, Groups, list[int]]:
    """Sort what `systemd.listen_fds` returned: the journal, the stored groups, and all others."""
    journal: int | None = None
    groups: Groups = {}
    others: list[int] = []
    for name, fd in passed:
        if name == _JOURNAL and journal is None:
            journal = fd
        elif is_group_name(name):
            groups.setdefault(name, []).append(fd)
        else:
            others.append(fd)
    return journal, groups, others


def place(named: Mapping[str, Sequence[int]], groups: Groups) -> dict[int, int]:
    """Return the descriptors of this process by their numbers in the journal.

    A manager gives the descriptors of a name back in the order in which it got them, or in reverse
    (systemd 252, measured). The socket shows which of the two it is.

    Args:
        named: the numbers in the journal, by group.
        groups: what the manager gave back. Groups that are complete are removed from it.
    """
    places: dict[int, int] = {}
    for name, numbers in named.items():
        fds = groups.get(name, [])
        if len(fds) != len(numbers):
            continue  # some are missing, and nothing tells which
        if not _is_socket(fds[0]):
            fds = fds[::-1]
        if not _is_socket(fds[0]):
            continue
        places.update(zip(numbers, fds, strict=True))
        del groups[name]
    return places


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
