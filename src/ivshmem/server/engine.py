"""What a server does, a step at a time: accepts peers, and sends them what the roster decides.

Knows: sockets, eventfds, readiness, shortages. Does not know: what the messages are (the roster
does), threads, signals (the server does).

Invariants:
1. Nothing here blocks, except the wait in `step`. A peer that does not read delays no other peer.
2. A connection is accepted only when its set-up can be completed, because QEMU busy-loops on a
   connection that ends early. Until then newcomers wait in the listen backlog.
3. The server reads nothing that a peer sends. After the set-up a peer cannot send (SHUT_RD). The
   server notices only that the peer disconnects.
4. Work that is postponed makes `poller.fileno()` readable when it is due.
5. The journal has everything that a successor must know, before anything relies on it: a join
   before the peer is sent anything, a leave before the peer's descriptors are closed. If a service
   manager keeps descriptors for a successor, a newcomer joins only when the manager has the
   newcomer's descriptors. Until then that newcomer waits, and so do those behind it.
6. `work` is held during each change, and never while code of others runs: the gate, the callbacks,
   handlers of the log. Such calls wait in `_later` until the change is complete.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial

from ..errors import NoSuchPeer
from ..lasting.journal import Section
from ..native import descriptors
from ..peer import inquiry
from ..protocol.roster import Member, Roster
from ..qemu.programs import is_qemu
from ..system import credentials, late_logging
from ..system.complaints import Complaints
from ..system.loop import Poller
from ..system.uncopied import Uncopied
from ..text import counted
from . import log_events
from .access import Verdict
from .connection import Connection, disconnect, has_left, is_privileged, rung
from .holds import MessageHold, MessageHolds, or_none
from .limits import LINGER
from .records import (
    CrowdRecord,
    HoldRecord,
    JoinRecord,
    LeaveRecord,
    MemberFds,
    MuteRecord,
    SentRecord,
    SplitRecord,
    UnmuteRecord,
    encode,
)
from .replay import BATCH, UnfinishedBatch, muted_for, replay, snapshot
from .report import Peer, PeerReport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .records import MemberRecord

_log = late_logging.log_of("ivshmem.server")

_NEWCOMERS = 64  # accepted in one step, so that a flood of them does not keep peers waiting
_RETRY_SECONDS = 0.1  # until what failed for want of memory or descriptors is tried again
_FEW_IDS = 4096  # of 65,536: so few are left that the log says so

# Shortages that pass: of memory, of descriptors in the process or the system, of descriptors in
# flight (unix(7)).
_SHORTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS}
)

# Decides who may join. It gets the credentials, and the number of peers that the same user has, or
# None if the other end only asks a question. If it raises, the newcomer is refused.
Gate = Callable[[credentials.Credentials, int | None], Verdict]


# The connection, whose it is, and the memory for it, if that is not the usual one.
_Newcomer = tuple[socket.socket, credentials.Credentials, "descriptors.FdArray | None"]


class Engine(Uncopied):
    """Serves one region on one listening socket.

    Args:
        listener: listening; borrowed, like `memory`.
        memory: the region's descriptor, as an array of one.
        readonly_memory: gives the same for peers that can only read; borrowed, too.
        answer: returns what a process is told that only asks (peer/inquiry.py), beside the number
            of peers.
        on_join, on_leave: called at the end of a step. What they raise is logged.
        gate: asked about each newcomer before it is sent anything. If it raises, that is logged,
            and the newcomer is refused.
        journal: the section in which a successor finds what was done.
        shared_id: the id of all who connect; they are told only of peers that `admit` announces.
        work: held during each change; see system/work_lock.py. `step` takes it; for every other
            method that changes something, the caller does.
    """

    def __init__(
        self,
        listener: socket.socket,
        memory: descriptors.FdArray,
        readonly_memory: Callable[[], descriptors.FdArray],
        vectors: int,
        answer: Callable[[], dict[str, int]],
        on_join: Callable[[Peer], object] | None,
        on_leave: Callable[[Peer], object] | None,
        gate: Gate | None = None,
        journal: Section | None = None,
        shared_id: int | None = None,
        work: AbstractContextManager[object] | None = None,
    ) -> None:
        self._work = work or threading.RLock()
        self._listener = listener
        self._vectors = vectors
        self._readonly_memory = readonly_memory
        self._answer = answer
        self._on_join, self._on_leave = on_join, on_leave
        self.gate = gate
        self._holds = False
        self._journal = journal or Section()
        self._nobody = descriptors.FdArray.eventfds(1)  # one that nobody reads
        self._roster = Roster(vectors, memory, self._nobody, shared_id=shared_id)
        self._connections: dict[int, Connection] = {}  # by serial number
        self._of_user: Counter[int] = Counter()  # how many are connected
        self._dirty: set[int] = set()  # those outside the crowd who may have to be sent something
        self._starved: set[int] = set()  # those to whom sending failed because of a shortage
        self._unwatched: set[int] = set()  # those for whom there was no room in the epoll object
        # Calls of code of others, to be made when no change is under way.
        self._later: deque[Callable[[], object]] = deque()
        self._spare: descriptors.FdArray | None = None  # eventfds for the next newcomer
        # A newcomer that waits until the service manager has its descriptors. It will get the spare
        # eventfds.
        self._unkept: _Newcomer | None = None
        # Connections of a predecessor that must wait for that newcomer, and their addresses.
        self._strays: deque[tuple[socket.socket, object]] = deque()
        self.paused = ""  # why newcomers wait in the queue at the moment
        self._newcomers = False  # whether the listening socket is readable
        self._again = False  # whether to look at that queue in any case
        self.counts: Counter[str] = Counter()
        self._complaints = Complaints()
        self._held = MessageHolds()  # peers whose news are held, by serial number
        self._small_buffers = not is_privileged()
        with contextlib.ExitStack() as undo:
            self._poller = Poller()
            undo.callback(self._poller.close)
            self._timer = descriptors.Timer()
            undo.callback(self._timer.close)
            self._clock = descriptors.Timer()
            undo.callback(self._clock.close)
            undo.callback(self._nobody.close)
            self._poller.watch(self._clock.fileno(), self._expire)
            self._poller.watch(self._timer.fileno(), self._retry)
            self._poller.watch(listener.fileno(), self._look_at_queue)
            self._undo = undo.pop_all()

    @property
    def poller(self) -> Poller:
        """Watches all descriptors of this engine; a step does what others have it watch, too."""
        return self._poller

    def wake(self) -> None:
        """Let a step that waits return; from any thread or a signal handler."""
        self._poller.wake()

    @property
    def peers(self) -> list[Peer]:
        """The connected peers, by id. From any thread."""
        return sorted((c.peer for c in list(self._connections.values())), key=lambda peer: peer.id)

    def report(self, *, interrupts: bool = True) -> list[PeerReport]:
        """Return a report on each peer, by id. Only for the thread that makes the steps."""
        signalled = rung(self._connections.values()) if interrupts else frozenset()
        found = [self._report(c, interrupts, signalled) for c in self._connections.values()]
        return sorted(found, key=lambda report: report.peer.id)

    def _report(
        self, connection: Connection, interrupts: bool, signalled: frozenset[int]
    ) -> PeerReport:
        fds = connection.vector_fds if interrupts else []
        hold = self._held.get(connection.member.serial)
        until = None
        if hold is not None and hold.deadline is not None:
            until = time.time() + hold.deadline - time.monotonic()
        return PeerReport(
            connection.peer,
            connection.readonly,
            self._roster.is_set_up(connection.member),
            self._roster.backlog(connection.member),
            connection.taken if connection.stalled else None,
            tuple(descriptors.count_of_eventfd(fd) if fd in signalled else 0 for fd in fds),
            self._roster.leaves_told(connection.member),
            connection.member.told.leaves_held,
            hold is not None,
            until,
        )

    def step(self, timeout: float | None) -> None:
        """Wait at most `timeout` seconds, and handle what is ready."""
        ready = self._poller.wait(timeout)
        try:
            with self._work:
                self._poller.dispatch(ready)
                newcomers, self._newcomers = self._newcomers, False
            if newcomers:
                self._accept()
            with self._work:
                self._tell_all()
                newcomers, self._again = self._again, False
            if newcomers:
                self._accept()
                with self._work:
                    self._tell_all()
        finally:
            self._call_others()

    def _look_at_queue(self) -> None:
        self._newcomers = True  # they are accepted when `_work` is not held

    def _heed(self, serial: int, events: int) -> None:
        """Handle an event of a peer's connection."""
        if events & (descriptors.EPOLLHUP | descriptors.EPOLLERR):
            self._leave(serial)
        else:
            self._dirty.add(serial)

    def say(self, call: Callable[[], object]) -> None:
        """Log something when the current change is complete: log handlers are code of others."""
        self._later.append(call)

    def _call_others(self) -> None:
        while self._later:
            self._later.popleft()()

    @staticmethod
    def _call_back(call: Callable[[Peer], object], peer: Peer) -> None:
        try:
            call(peer)
        except Exception:
            _log.exception("the callback for peer %d failed", peer.id)

    def _note(self, record: MemberRecord) -> None:
        self._journal.note(*encode(record))

    # -- joining and leaving ----------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_NEWCOMERS):
            with self._work:
                newcomer = self._next()
            if newcomer is None:
                return
            newcomer[0].setblocking(False)
            self._meet(*newcomer)

    def _next(self) -> tuple[socket.socket, object] | None:
        """Accept the next connection in the listen backlog.

        None: there is no connection, or it must wait.
        """
        if self._roster.full:
            self._pause("every id is taken, or known to a connected peer")
            return None
        if self._starved:
            self._pause("others are still waiting for what cannot be sent")
            return None
        if not self._journal.settled:
            self._pause("the service manager has not read yet which descriptors it is to keep")
            self._timer.set(_RETRY_SECONDS)
            return None
        if self._unkept is not None:
            newcomer, self._unkept = self._unkept, None
            if has_left(newcomer[0]):
                self._journal.drop(self._roster.next_serial)
                newcomer[0].close()
            else:
                self._join(*newcomer)
        while True:
            try:
                if self._spare is None:
                    self._spare = descriptors.FdArray.eventfds(self._vectors)
                if self._strays:
                    return self._strays.popleft()
                return self._listener.accept()
            except BlockingIOError:
                self.paused = ""
                return None
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    raise
                self._pause(os.strerror(error.errno or 0))
                self._timer.set(_RETRY_SECONDS)
                return None

    def _meet(self, sock: socket.socket, address: object) -> None:
        """Answer a newcomer, refuse it, or let it join."""
        if has_left(sock):
            sock.close()
            return
        asks = inquiry.only_asks(address)
        gate = self.gate
        if gate is None and not asks:
            with self._work:
                self._keep(sock)  # early, because no other process has it
        who = credentials.credentials(sock)
        verdict = Verdict(True) if gate is None else self._judged(gate, sock, who, asks)
        with self._work:
            self._treat(sock, who, asks, verdict, kept=gate is None)

    def _judged(
        self, gate: Gate, sock: socket.socket, who: credentials.Credentials, asks: bool
    ) -> Verdict:
        try:
            verdict = gate(who, None if asks else self._of_user[who.uid])
            if not isinstance(verdict, Verdict):
                raise TypeError(f"a gate returns an ivshmem.Verdict, not {verdict!r}")
        except Exception as error:
            # Refuse: a gate is there to keep processes out, and this one could not decide.
            reason = f"the gate failed: {type(error).__name__}"
            self._complain("the gate failed", f"gate {type(error)}", error=error)
            return Verdict(False, reason=reason)
        except BaseException:
            sock.close()
            raise
        return verdict

    def _treat(
        self,
        sock: socket.socket,
        who: credentials.Credentials,
        asks: bool,
        verdict: Verdict,
        *,
        kept: bool,
    ) -> None:
        """Refuse a newcomer, answer it, or let it join, as the gate decided."""
        if not verdict.allowed:
            self.counts["refused"] += 1
            self._complain(
                f"refused {who.process} (pid {who.pid}, uid {who.uid}): {verdict.reason}"
                " (if it is QEMU, it spins until it is stopped)",
                f"refused {who.uid}",
                log_events.fields(
                    "refused",
                    uid=who.uid,
                    pid=who.pid,
                    process=who.process,
                    reason=verdict.reason,
                ),
            )
            sock.close()
            return
        if asks:
            self._tell(sock)
            return
        if not kept:
            self._keep(sock)
        try:
            memory = self._readonly_memory() if verdict.readonly else None
        except OSError as error:
            self._complain(f"a newcomer had to be turned away: {error.strerror}")
            self._journal.drop(self._roster.next_serial)
            sock.close()
            return
        if self._journal.settled:
            self._join(sock, who, memory)
        else:
            self._unkept = sock, who, memory

    def _tell(self, sock: socket.socket) -> None:
        """Answer a process that only asks, and does not become a peer."""
        import json  # here: see import_the_rest

        with sock, contextlib.suppress(OSError):
            sock.send(json.dumps({**self._answer(), "peers": len(self._connections)}).encode())

    def _keep(self, sock: socket.socket) -> None:
        """Have a newcomer's descriptors kept, by the serial number that it will have."""
        vectors = self._spare
        assert vectors is not None
        self._journal.keep([sock.fileno(), *vectors], self._roster.next_serial)

    def _join(
        self, sock: socket.socket, who: credentials.Credentials, memory: descriptors.FdArray | None
    ) -> None:
        vectors, self._spare = self._spare, None
        assert vectors is not None
        readonly = memory is not None
        since = time.time()
        # If it cannot be known whether it is a QEMU (None), it counts as one.
        holds = self._holds and is_qemu(who.pid, who.process) is not False
        member = self._roster.join(vectors, memory, no_leaves=holds)
        self._note(JoinRecord(member.serial, sock.fileno(), [*vectors], since, readonly, holds))
        connection = self._connect(sock, who, member, since, readonly)
        if self._small_buffers:
            connection.use_small_buffer()
        self.counts["joins"] += 1
        if self._on_join is not None:
            self._later.append(partial(self._call_back, self._on_join, connection.peer))
        self._dirty_others()
        if self._roster.ids_left < _FEW_IDS:
            self._complain(
                f"only {counted(self._roster.ids_left, 'id')} left: those that a connected peer"
                " was told of are not used again before it leaves",
                "ids",
            )

    def _connect(
        self,
        sock: socket.socket,
        who: credentials.Credentials,
        member: Member,
        since: float,
        readonly: bool,
    ) -> Connection:
        peer = Peer(member.id, who.pid, who.uid, who.gid, who.process, self._vectors, since)
        connection = Connection(sock, member, peer, readonly)
        self._connections[member.serial] = connection
        self._of_user[who.uid] += 1
        self._begin_to_watch(member.serial)
        return connection

    def _begin_to_watch(self, serial: int) -> None:
        """Watch for the end of a connection. If that is not possible yet, serve the peer anyway.

        The timer tries again.
        """
        connection = self._connections[serial]
        try:
            heed = partial(self._heed, serial)
            self._poller.watch_events(connection.fd, heed, connection.events)
        except OSError as error:  # ENOSPC or ENOMEM
            self._complain(f"that peers leave is noticed late: {error.strerror}")
            self._unwatched.add(serial)
            self._timer.set(_RETRY_SECONDS)

    def _dirty_others(self) -> None:
        # Peers whose buffer is full are told when it has room (EPOLLOUT).
        self._dirty.update(s for s in self._roster.told_singly if not self._connections[s].stalled)

    def _leave(self, serial: int) -> None:
        """Close the descriptors of a peer that is gone, and have the other peers told."""
        connection = self._connections.pop(serial)
        self._poller.unwatch(connection.fd)
        for serials in (self._dirty, self._starved, self._unwatched):
            serials.discard(serial)
        self._held.pop(serial, None)
        self._of_user[connection.peer.uid] -= 1
        if not self._of_user[connection.peer.uid]:
            del self._of_user[connection.peer.uid]
        self.counts["leaves"] += 1
        # The peer must see the end before the journal says that it left. If this process is killed
        # in between, its successor finds an open connection that the journal does not name, takes
        # it for a newcomer's, and sends a second set-up.
        disconnect(connection.socket)
        self._note(LeaveRecord(serial))
        if self._roster.leave(connection.member):
            self._dirty_others()
        self._journal.drop(serial)
        connection.close()
        if self._on_leave is not None:
            self._later.append(partial(self._call_back, self._on_leave, connection.peer))
        self._listen_again()

    def find(self, peer_id: int) -> int:
        """Return the serial number of a peer, which no other peer gets later.

        Raises:
            NoSuchPeer: there is none with this id.
        """
        for serial, connection in list(self._connections.items()):
            if connection.peer.id == peer_id:
                return serial
        raise NoSuchPeer(f"peer {peer_id} is not connected")

    def evict(self, peer_id: int) -> None:
        """Disconnect a peer.

        Raises:
            NoSuchPeer: there is none with this id.
        """
        self.hang_up(self.find(peer_id))

    def hang_up(self, serial: int) -> None:
        """Disconnect the peer with this serial number. Do nothing if it has left."""
        if serial in self._connections:
            self._leave(serial)
            self.wake()  # the others are told by the next step

    @property
    def holds_leaves(self) -> bool:
        """Whether a QEMU that connects now is never told of leaves."""
        return self._holds

    def hold_leaves(self, holds: bool) -> None:
        """Never tell QEMU that a peer left; if `holds` is False, that ends for new connections.

        QEMU (7.2 to 10.2) can crash when a device is unplugged that was told of a leave. Each leave
        that is held back costs that QEMU the eventfds of the peer that is gone.
        """
        self._holds = holds
        for serial, connection in list(self._connections.items()) if holds else ():
            peer, member = connection.peer, connection.member
            if not member.no_leaves and is_qemu(peer.pid, peer.process) is not False:
                self._roster.stop_leaves(member)
                self._note(HoldRecord(serial))

    def hold(self, serial: int, linger: float | None = LINGER, asker: object | None = None) -> bool:
        """Send a peer nothing from the end of its set-up on; return whether it has read the rest.

        Call it again until it has. The hold ends by `release`, when the peer disconnects, and when
        the time of each asker is over: `linger` seconds (None: no limit), which begin when the
        asker is gone (`asker_is_gone`), or now if there is no `asker`. A successor takes all askers
        for gone, and has the longest of their times.

        QEMU (10.0 and newer) uses freed memory if a message comes while the device is unplugged.

        Args:
            serial: the peer's number (`find`). If that peer has left, nothing happens.
        """
        if serial not in self._connections:
            return False
        member = self._connections[serial].member
        hold = self._held.get(serial) or MessageHold()
        before = hold.linger
        hold.ask(asker, math.inf if linger is None else linger)
        if serial not in self._held or hold.linger != before:
            self._note(MuteRecord(serial, or_none(hold.linger)))
            self._roster.pause(member)
            self._held[serial] = hold
        self._wind_clock()
        return self._roster.is_set_up(member) and not self._connections[serial].unread

    def release(self, serial: int) -> bool:
        """End the hold of all askers; return whether the peer of this number was held."""
        if self._held.pop(serial, None) is None:
            return False
        connection = self._connections[serial]
        self._note(UnmuteRecord(serial))
        self._roster.resume(connection.member)
        if not connection.stalled:
            self._dirty.add(serial)
        self.wake()  # it is told by the next step
        return True

    def holds(self, serial: int) -> bool:
        """Whether the peer of this number is held."""
        return serial in self._held

    def asker_is_gone(self, asker: object) -> None:
        """Start the time limit of each hold that no other asker wants."""
        self._held.asker_is_gone(asker)
        self._wind_clock()

    def _wind_clock(self) -> None:
        """Have a step made when the next hold ends."""
        self._clock.set(self._held.seconds_left())

    def _expire(self) -> None:
        for serial, hold in self._held.expired():
            peer = self._connections[serial].peer
            told = log_events.fields("released", peer=peer.id, reason="expired")
            text = (
                "messages to peer %d are sent again: the program that asked to hold them back ended"
                " %g s ago"
            )
            self.say(partial(_log.info, text, peer.id, hold.linger, extra=told))
            self.release(serial)
        self._wind_clock()

    # -- peers that are elsewhere -----------------------------------------------------------------

    def admit(self, peer_id: int, vectors: descriptors.FdArray) -> Member:
        """Announce a peer that does not connect here; `vectors` stay the caller's."""
        member = self._roster.announce_remote(peer_id, vectors)
        self._dirty_others()
        return member

    def dismiss(self, member: Member) -> None:
        """Say that an admitted peer is gone; its vectors are not used any more."""
        if self._roster.leave(member):
            self._dirty_others()

    def become(self, shared_id: int) -> None:
        """Give another id to all who connect from now on; disconnect peers with the old one."""
        for serial in list(self._connections):
            self._leave(serial)
        self._roster.change_shared_id(shared_id)
        self.wake()

    def bells(self, vector: int) -> list[int]:
        """Return the eventfds of this vector, one for each client. The connections own them."""
        return [connection.vectors[vector] for connection in self._connections.values()]

    # -- sending ----------------------------------------------------------------------------------

    def _tell_all(self) -> None:
        """Send each peer the messages that it must be told, as far as its buffer has room."""
        self._tell_crowd()
        while self._dirty:
            due, self._dirty = self._dirty, set()
            # Older peers first: when a newcomer's set-up is complete, every peer that reads knows
            # of the newcomer.
            for serial in sorted(due):
                if serial in self._connections:
                    self._flush(serial)
            self._tell_crowd()  # a peer may have turned out to be gone

    def _tell_crowd(self) -> None:
        """Send the next messages to the crowd: the peers that were told everything else."""
        while runs := self._roster.messages_to_all(BATCH):
            serials = list(self._roster.caught_up)
            fds = [self._connections[serial].fd for serial in serials]
            done = 0
            while True:
                done, sent, _, count = self._journal.outbox.send_to_all(
                    fds, done, runs, self._journal.number
                )
                if done == len(fds):
                    break
                # The peer took only a part of the batch: `_flush` finds out why.
                del fds[done]
                serial = serials.pop(done)
                self.counts["messages"] += sent
                member = self._connections[serial].member
                self._roster.tell_singly(member)
                self._roster.sent(member, runs, sent)
                self._note(SplitRecord(serial, sent, done, count))
                self._dirty.add(serial)
            self._roster.sent_to_all(runs, count)
            self._note(CrowdRecord(count, len(fds)))
            self.counts["messages"] += count * len(fds)

    def _flush(self, serial: int) -> None:
        """Send a peer outside the crowd the messages that it must still be told."""
        connection = self._connections[serial]
        member = connection.member
        full = False
        while not full and (runs := self._roster.pending(member, 4 * BATCH)):
            try:
                count = self._journal.outbox.send(connection.fd, runs, self._journal.number, serial)
            except OSError as error:
                if error.errno in _SHORTAGES:
                    self._starve(serial, error)
                else:  # EPIPE or ECONNRESET: it is gone, or has stopped listening
                    self._leave(serial)
                return
            if count:
                self._roster.sent(member, runs, count)
                self._note(SentRecord(serial, count))
                self.counts["messages"] += count
            full = count < sum(run.length for run in runs)
            if full and (count or not connection.taken):
                connection.taken = time.time()
        if not full:
            connection.taken = 0.0
        self._watch(serial, descriptors.EPOLLOUT if full else 0)
        if not connection.announced and self._roster.is_set_up(member):
            connection.announce_set_up()

    def _watch(self, serial: int, events: int) -> None:
        connection = self._connections[serial]
        if events != connection.events:
            connection.events = events
            if serial not in self._unwatched:
                self._poller.watch_for(connection.fd, events)

    # -- shortages --------------------------------------------------------------------------------

    def _starve(self, serial: int, error: OSError) -> None:
        """Retry by a timer: sending failed though the buffer has room, so no event will come."""
        self.counts["starved"] += 1
        told = log_events.fields("starved", reason=error.strerror)
        self._complain(f"sending has to wait: {error.strerror}", extra=told)
        self._watch(serial, 0)
        self._starved.add(serial)
        self._timer.set(_RETRY_SECONDS)

    def _pause(self, reason: str) -> None:
        """Leave newcomers in the queue of the listening socket."""
        told = log_events.fields("waiting", reason=reason)
        self._complain(f"newcomers have to wait: {reason}", extra=told)
        self._poller.watch_for(self._listener.fileno(), 0)
        self.paused = reason

    def relisten(self, bind: Callable[[], None]) -> None:
        """Call `bind`, which replaces the listening socket, in the thread that makes the steps."""
        self._poller.replace(self._listener.fileno(), bind)
        self._again = True  # `paused` may be wrong now

    def _listen_again(self) -> None:
        if self.paused:
            self._poller.watch_for(self._listener.fileno(), descriptors.EPOLLIN)
            self._again = True  # also if the backlog is empty: `paused` has to become ""

    def _retry(self) -> None:
        self._timer.set(0)
        self._dirty |= self._starved
        self._starved.clear()
        unwatched, self._unwatched = self._unwatched, set()
        for serial in unwatched:
            self._begin_to_watch(serial)
        self._listen_again()

    def _complain(
        self,
        text: str,
        kind: str = "",
        extra: Mapping[str, object] | None = None,
        error: Exception | None = None,
    ) -> None:
        """Log something, at most once a minute for each kind."""
        if self._complaints.is_due(kind or text):
            level = late_logging.WARNING if error is None else late_logging.ERROR
            self.say(partial(_log.log, level, text, extra=extra, exc_info=error))

    # -- a successor ------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return a state for `resume` that replaces all records so far, as JSON can hold it."""
        held = {}
        for serial, connection in self._connections.items():
            held[serial] = MemberFds(
                connection.fd,
                connection.vector_fds,
                connection.peer.since,
                connection.readonly,
                connection.member.no_leaves,
            )
        muted = {serial: or_none(hold.linger) for serial, hold in self._held.items()}
        return {**snapshot(self._roster, held), "muted_for": muted, "counts": self.counts}

    @property
    def descriptors(self) -> set[int]:
        """The numbers of the descriptors that belong to peers."""
        found = {connection.fd for connection in self._connections.values()}
        for connection in self._connections.values():
            found.update(connection.vector_fds)
        return found

    def resume(
        self,
        state: Mapping[str, Any] | None,
        records: Iterable[MemberRecord],
        unfinished: UnfinishedBatch | None,
        find: Callable[[int], int | None],
    ) -> None:
        """Continue where another engine was when its process ended.

        Args:
            find: returns the descriptor of this process for a number of the other one; None: it is
                gone. This engine owns the descriptors that are found.
        """
        records = list(records)
        held = replay(self._roster, state, records, unfinished)
        self.counts.update((state or {}).get("counts", {}))
        for record in records:
            self.counts.update(_counted(record))
        gone = []
        for member in list(self._roster.members):
            mine = held[member.serial]
            sock = find(mine.fd)
            found = [find(fd) for fd in mine.fds]
            vectors = descriptors.FdArray()
            for fd in found:
                if fd is not None:
                    vectors.take(fd)
            member.give_vectors(vectors)
            if sock is None:
                gone.append(member)
                vectors.close()
                continue
            if mine.readonly:
                member.memory = self._readonly_memory()
            connected = socket.socket(fileno=sock)
            who = credentials.credentials(connected)
            connection = self._connect(connected, who, member, mine.since, mine.readonly)
            if None in found:
                gone.append(member)
            elif self._roster.is_set_up(member):
                connection.announce_set_up()
        linger = muted_for(state, records)
        for member in self._roster.members:
            if member.paused and member.serial in self._connections:
                hold = self._held[member.serial] = MessageHold()
                seconds = linger.get(member.serial, LINGER)
                hold.ask(None, math.inf if seconds is None else seconds)
        self._wind_clock()
        for member in gone:
            if member.serial in self._connections:
                self._leave(member.serial)
            else:
                self._note(LeaveRecord(member.serial))
                self._roster.leave(member)
        self._dirty.update(self._roster.told_singly)
        self.wake()

    def adopt(self, sock: socket.socket) -> None:
        """Take a connection that a predecessor accepted and did not serve."""
        address = sock.getpeername()
        if self._unkept is not None:
            self._strays.append((sock, address))
            return
        if self._spare is None:
            self._spare = descriptors.FdArray.eventfds(self._vectors)
        sock.setblocking(False)
        self._meet(sock, address)
        self._again = True  # also if that one has to wait
        self.wake()

    # -- the end ----------------------------------------------------------------------------------

    def close(self, *, forked: bool = False) -> None:
        """Disconnect all peers and close everything; `forked`: only this process's copies."""
        for serial, connection in self._connections.items():
            if not forked:
                disconnect(connection.socket)
                self._journal.drop(serial)
            connection.close()
        self._connections.clear()
        waiting = [sock for sock, _ in self._strays]
        if self._unkept is not None:
            waiting.append(self._unkept[0])
            if not forked:
                self._journal.drop(self._roster.next_serial)
        for sock in waiting:
            if not forked:
                disconnect(sock)
            sock.close()
        self._strays.clear()
        self._unkept = None
        self._dirty.clear()
        self._starved.clear()
        self._later.clear()
        if self._spare is not None:
            self._spare.close()
        self._undo.close()


def import_the_rest() -> None:
    """Import what a server needs only after it listens, so that it listens sooner.

    This must not wait until the modules are needed: a server without a free descriptor must log
    that, and could not open a module's file then.
    """
    # For `_tell`, and for a journal.
    import json  # noqa: F401

    late_logging.load()


def _counted(record: MemberRecord) -> dict[str, int]:
    """What a record of the journal adds to the counts."""
    if isinstance(record, JoinRecord):
        return {"joins": 1}
    if isinstance(record, LeaveRecord):
        return {"leaves": 1}
    if isinstance(record, CrowdRecord):
        return {"messages": record.batch * record.members}
    return {"messages": record.messages} if isinstance(record, SentRecord | SplitRecord) else {}
