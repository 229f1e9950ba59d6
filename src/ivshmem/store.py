"""What a service manager keeps of a service that is killed: groups of descriptors, and a journal.

Knows: the names in the manager's fd store, in what order a group comes back. Does not know: what
descriptors are for, but that the first of a group is a socket, and the others are not.

Invariants:
1. What the journal names has been stored before, or nobody goes on by that journal.
2. A name is never given to two groups at a time.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence

from .journal import Journal, is_group
from .notify import Notifier
from .uncopied import Uncopied

_log = logging.getLogger("ivshmem.server")

_JOURNAL = "journal"

# Seconds that the manager may be busy with something else, as systemd is with a daemon-reload on a
# large machine. Nobody joins meanwhile; interrupts do not pass through here.
_PATIENCE = 30.0

# Groups by name, as the manager gave them back.
Groups = dict[str, list[int]]


class Store(Uncopied):
    """Has the service manager keep what a journal names, from now on.

    If the manager does not listen, the journal is given up: the log says so, the service runs on,
    and a successor of it begins anew.
    """

    def __init__(self, notifier: Notifier, journal: Journal, patience: float = _PATIENCE) -> None:
        self._notifier = notifier
        self._journal = journal
        self._patience = patience
        self._given_up = False
        journal.keep, journal.drop = self.keep, self.drop

    def keep_journal(self, *, replace: bool) -> None:
        """Have the journal itself kept: once in the time of all successors."""
        if replace:
            self.drop(_JOURNAL)
        self.keep(_JOURNAL, [self._journal.fileno()])

    def keep(self, name: str, fds: Sequence[int]) -> None:
        """Have a group kept, after all that were kept or dropped before."""
        # One by one: of several in a message systemd forgets the order.
        self._try(
            lambda: all(self._notifier.store(name, [fd], timeout=self._patience) for fd in fds)
        )

    def drop(self, name: str) -> None:
        """Undo `keep`."""
        self._try(lambda: self._notifier.drop(name, timeout=self._patience))

    def _try(self, tell: Callable[[], bool]) -> None:
        if self._given_up:
            return
        reason = f"it does not read what it is told, for {self._patience:g} seconds"
        try:
            if tell():
                return
        except OSError as error:
            reason = error.strerror or str(error)
        self._given_up = True
        self._journal.spoil()
        _log.error(
            "the service manager keeps nothing from now on (%s): a restart cuts all peers off",
            reason,
        )


def sort_out(passed: Iterable[tuple[str, int]]) -> tuple[int | None, Groups, list[int]]:
    """What `notify.listen_fds` has returned: the journal, stored groups, and all others."""
    journal: int | None = None
    groups: Groups = {}
    others: list[int] = []
    for name, fd in passed:
        if name == _JOURNAL and journal is None:
            journal = fd
        elif is_group(name):
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
