"""A server as a service runs it: another process can continue where this one ends.

Knows: what a successor needs of a server, and when each call may be made. Does not know: other
regions, how a journal gets from one process to another.

It is internal. A program that embeds `ivshmem.Server` has none of this, and needs none of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping

from ..lasting.journal import Section
from ..memory.region import Region
from ..system.listener import Listener
from .engine import Gate
from .replay import UnfinishedBatch
from .report import Peer
from .server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    from .records import MemberRecord


class RegionServer(Server):
    """A server of one region that can continue where another process was.

    Everything beyond what Server has is for the thread that makes the steps, between two steps.

    Args:
        path, memory, vectors, on_join, on_leave, gate: as of Server.
        journal: the section where this server notes what a successor needs.
        listen: if False, nobody can connect before the caller calls `Listener.listen`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Listener,
        memory: Region | SupportsIndex | str,
        vectors: int = 1,
        *,
        on_join: Callable[[Peer], object] | None = None,
        on_leave: Callable[[Peer], object] | None = None,
        gate: Gate | None = None,
        journal: Section | None = None,
        listen: bool = True,
    ) -> None:
        self._section = journal
        self._listens = listen
        super().__init__(path, memory, vectors, on_join=on_join, on_leave=on_leave, gate=gate)

    def set_gate(self, gate: Gate | None) -> None:
        """Ask another gate about all who connect from now on; connected peers stay. Never waits."""
        self._engine.gate = gate

    def snapshot(self) -> dict[str, Any]:
        """Return what `resume` takes instead of what the journal has said up to now."""
        return self._engine.snapshot()

    def resume(
        self,
        state: Mapping[str, Any] | None,
        records: Iterable[MemberRecord] = (),
        unfinished: UnfinishedBatch | None = None,
        find: Callable[[int], int | None] = lambda fd: fd,
    ) -> None:
        """Continue where the server of an ended process was; call it before anything else.

        Args:
            state, records, unfinished: of that server's journal; see replay.
            find: which descriptor has here the number that it had there; None: it is gone.
        """
        self._engine.resume(state, records, unfinished, find)

    def adopt(self, sock: socket.socket) -> None:
        """Let a connection join that the other process accepted and had not noted yet."""
        self._engine.adopt(sock)

    @property
    def descriptors(self) -> set[int]:
        """The numbers of the descriptors that belong to peers."""
        return self._engine.descriptors

    def abandon(self) -> None:
        """Close this process's copies without a sign to any peer: a successor has them, too."""
        self._close(abandoned=True)
