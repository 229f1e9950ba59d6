"""What a service manager keeps of a service that is killed: groups of descriptors, and a journal.

Knows: the names in the manager's fd store, in what order a group comes back. Does not know: what
descriptors are for, but that the first of a group is a socket, and the others are not.

Invariants:
1. Nothing here makes the loop wait longer than _MOMENT. What the manager has no room for by then is
   sent when it has, in order, and until all of that is sent nothing waits.
2. `settled` says whether all was sent. A newcomer is sent nothing before that, so a SIGKILL cuts
   nobody off who was sent anything.
3. A name is never given to two groups at a time.
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

_log = late_logging.log_of("ivshmem.server")

_JOURNAL = "journal"

# Seconds that the manager may be busy with something else, as systemd is with a daemon-reload on a
# large machine. After that the journal is given up.
_PATIENCE = 30.0
# The manager's queue has room for ten datagrams, so a burst of joins fills it though the manager
# reads. It makes room sooner than the loop would come back to a newcomer that has to wait.
_MOMENT = 0.1
_PAUSE = 0.02  # seconds between tries: no event tells when descriptors in flight have arrived
_LAST = 5.0  # seconds that the end may take

# Groups by name, as the manager gave them back.
Groups = dict[str, list[int]]


class FdStore(Uncopied):
    """Has the service manager keep what a journal names, from now on.

    The loop calls `step()` when `fileno()` is readable, and `close()` is called at the end.

    If the manager does not listen, the journal is given up: the log says so, the service runs on,
    and a successor of it begins anew.
    """

    def __init__(self, notifier: Notifier, journal: Journal, patience: float = _PATIENCE) -> None:
        self._notifier = notifier
        self._journal = journal
        self._patience = patience
        self._given_up = False
        # What the manager has not been told yet: a name, and a descriptor to keep (None: to drop
        # all of that name). The descriptor is a copy, for its owner may close his before that.
        self._queue: deque[tuple[str, int | None]] = deque()
        self._since = 0.0  # when it last took something, or the queue began
        self._timer = descriptors.Timer()
        journal.keep, journal.drop, journal.settled = self.keep, self.drop, self.settled

    def keep_journal(self, *, replace: bool) -> None:
        """Have the journal itself kept: once in the time of all successors."""
        if replace:
            self.drop(_JOURNAL)
        self.keep(_JOURNAL, [self._journal.fileno()])

    def keep(self, name: str, fds: Sequence[int]) -> None:
        """Have a group kept, after all that were kept or dropped before."""
        for fd in fds:  # one by one: of several in a message systemd forgets the order
            self._add(name, fd)

    def drop(self, name: str) -> None:
        """Undo `keep`."""
        self._add(name, None)

    def settled(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._queue

    def fileno(self) -> int:
        """Readable when `step` has something to do."""
        return self._timer.fileno()

    def step(self) -> None:
        """Send what the manager had no room for, as far as it has now."""
        self._timer.set(0)
        while self._queue:
            name, fd = self._queue[0]
            if not self._tell(name, fd):
                break
            self._queue.popleft()
            _close(fd)
            self._since = time.monotonic()
        self._wind()

    def flush(self, seconds: float) -> None:
        """Wait until all is sent, at most so long: where nobody is served, at the start and end."""
        deadline = time.monotonic() + seconds
        while self._queue and time.monotonic() < deadline:
            self.step()
            if self._queue:
                time.sleep(_PAUSE)

    def close(self) -> None:
        """Send the rest, for at most some seconds; may be called twice."""
        self.flush(_LAST)
        self._forget()
        self._timer.close()

    def _add(self, name: str, fd: int | None) -> None:
        if self._given_up or (not self._queue and self._tell(name, fd, _MOMENT)):
            return
        if self._given_up:
            return
        if not self._queue:
            self._since = time.monotonic()
        try:
            self._queue.append((name, None if fd is None else os.dup(fd)))
        except OSError as error:  # EMFILE
            self._give_up(error.strerror or str(error))
        self._wind()

    def _tell(self, name: str, fd: int | None, seconds: float = 0.0) -> bool:
        """Whether the manager had room for it within that time."""
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

    def _wind(self) -> None:
        if not self._queue:
            return
        if time.monotonic() > self._since + self._patience:
            self._give_up(
                f"it does not read what it is told, for {counted(self._patience, 'second')}"
            )
        else:
            self._timer.set(_PAUSE)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._forget()
        self._journal.spoil()
        _log.error(
            "the service manager keeps nothing from now on (%s): a restart cuts all peers off",
            reason,
        )

    def _forget(self) -> None:
        while self._queue:
            _close(self._queue.popleft()[1])


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def sort_out(passed: Iterable[tuple[str, int]]) -> tuple[int | None, Groups, list[int]]:
    """What `notify.listen_fds` has returned: the journal, stored groups, and all others."""
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


def place(mentioned: Mapping[str, Sequence[int]], groups: Groups) -> dict[int, int]:
    """Where the descriptors are that a journal mentions: here, by what they were there.

    Groups that are whole are taken out of `groups`. A manager gives the descriptors of a name back
    in the order in which it got them, or the other way round (systemd 252, measured); which of the
    two it is, the socket shows.
    """
    places: dict[int, int] = {}
    for name, numbers in mentioned.items():
        fds = groups.get(name, [])
        if len(fds) != len(numbers):
            continue  # some are missing: which of them, nobody knows
        if not _is_socket(fds[0]):
            fds = fds[::-1]
        if not _is_socket(fds[0]):
            continue
        places.update(zip(numbers, fds, strict=True))
        del groups[name]
    return places


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
