"""The control socket: what a running server says of itself, and is asked to do.

Knows: the protocol's words, who is heard. Does not know: how a server does its work (it is asked),
how connections are kept in bounds (Answering does).

A Unix stream socket, by default the first region's path with ".control" behind it, of mode 0600;
whatever its permissions, only root and the server's own user are heard (SO_PEERCRED). A request is
a JSON object on a line, of 65,536 bytes at most; so is the reply, of any length. A connection may
bring any number of requests, which are answered in order, the next one when the reply was read. At
most 64 connections are kept: one more ends the one that was idle for longest.

    {"do": "version"}                   {"ok": true, "version": "0.1.0", "protocol": 1, "pid": 71}
    {"do": "status"}                    {"ok": true, "server": {..}, "regions": [{..}, ..]}
    {"do": "status", "peers": false}    the same without the peers, and without a look at each
    {"do": "evict", "id": 3, "region": "db"}    {"ok": true, "region": "db"}
    {"do": "hold-leaves", "on": true, "region": "db"}    {"ok": true, "region": "db"}
    {"do": "hold", "id": 3, "linger": 60}       {"ok": true, "region": "db", "read": true}
    {"do": "release", "id": 3}          {"ok": true, "region": "db", "held": true}
    {"do": "reload"}                    {"ok": true, "changes": ["region db: added", ..]}

A reload can take minutes, if memory is to be there from the start (prealloc). Until it is done, all
other connections are answered; another reload and a takeover are refused.

evict, hold-leaves, hold, release and status may name a region; a server of one region needs no name
for it. hold-leaves is Server.hold_leaves. hold is Server.hold: the peer is sent no news until
release, or until "linger" seconds (usually 60) after the connection has ended that asked for it.
"read" says whether the peer has read all that it was sent: ask again until it has. "held" says
whether there was something to release. What could not be
done is {"ok": false, "error": "one line: what, why, what to do"}, and has changed nothing.
Whoever reads replies must take fields that it does not know; "protocol" is raised when a known one
changes its meaning. Times are seconds since the epoch, sizes are bytes. In a status

    server   pid, uid, version, protocol, since, time (now), cpu (seconds used), resident (memory),
             fds {open, limit}, pid_namespace (its inode: pids mean something to those inside)
    region   name, socket, unreachable (why nobody can connect by that path; "": they can),
             vectors, size, page_size, file_system (that the memory is on), source,
             memory (name or path), memory_leads_to ("this", "nothing", "another": RegionInfo; "":
             it has no name), paused (why newcomers wait; "": they do not), holds_leaves,
             counts {joins, leaves, messages, ..: since the start}, peers
    peer     id, pid, uid, gid, process, names (claimed in the directory of names), vectors, since,
             readonly, set_up (it was sent its whole set-up), pending (messages still to be sent to
             it), stalled_since (null; or when it last read, if its socket is full), leaves_told
             (how often it was told that somebody left), leaves_held (how often not), held (it is
             sent no news for now), held_until (null; or when that ends by itself), interrupts
             (rings it has not taken, for each vector, looked at without taking them)

Both sides ask the kernel who the other is, by SO_PEERCRED: the server hears root and its own user;
a client takes answers from root and its own user, and root takes them from anybody.

Invariants:
1. A request is checked whole before anything is done.
2. Whatever a caller sends, and whatever fails on its behalf: the server goes on.
3. What `Client.ask` returns has the fields and types above: REPLIES says so once for all callers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

from . import __version__, logs, shapes, sockets
from .accounts import user_name
from .answering import LONGEST, Answering, Caller
from .counting import counted
from .errors import ClosedError, IvshmemError, NoDirectory, NoSuchPeer
from .limits import LINGER, LONGEST_LINGER, MAGIC, MAX_ID, MAX_VECTORS, SLOT_BYTES
from .plain import command, plain
from .uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, TypeAlias

    from .directory import Directory
    from .engine import PeerReport
    from .region import Region

_log = logs.log_of("ivshmem.control")

PROTOCOL = 1
SUFFIX = ".control"
MODE = 0o600


_LOOK = 0.01  # seconds between two questions whether a peer has read all
_MOST_ERROR = 500  # characters of an error
_MOST_PID, _MOST_UID = (1 << 31) - 1, (1 << 32) - 1
_MOST_REPLY = 1 << 26  # bytes that a client takes: a status of 10,000 peers has a tenth


class ControlError(IvshmemError):
    """A control socket was asked for something that it could not do; the message says why."""


# -- what is asked: a service, which serves regions -----------------------------------------------

if TYPE_CHECKING:

    class Inspectable(Protocol):
        """What is asked of a Server."""

        region: Region
        path: str
        vectors: int

        @property
        def paused(self) -> str: ...
        @property
        def counts(self) -> Mapping[str, int]: ...
        def report(self, *, interrupts: bool = ...) -> list[PeerReport]: ...
        def evict(self, peer_id: int) -> None: ...
        @property
        def holds_leaves(self) -> bool: ...
        def hold_leaves(self, holds: bool) -> None: ...
        def hold(
            self, peer_id: int, *, linger: float | None = ..., asker: object | None = ...
        ) -> bool: ...
        def release(self, peer_id: int) -> bool: ...
        def asker_is_gone(self, asker: object) -> None: ...

    class Served(Protocol):
        """A region that is being served."""

        @property
        def server(self) -> Inspectable: ...
        @property
        def listener(self) -> sockets.Listener: ...

    class Regions(Protocol):
        """Whatever serves regions; asked in the thread that makes the steps."""

        @property
        def regions(self) -> Mapping[str, Served]: ...

    class Service(Regions, Protocol):
        """The same, with a configuration."""

        def reload(self) -> Sequence[str] | None:
            """Read the configuration again; what has changed, a line each."""

    # What does one kind of request: the reply but for "ok", or None: the connection was detached.
    Handler: TypeAlias = Callable[[Caller, Mapping[str, Any]], Mapping[str, Any] | None]


# -- the server's side ----------------------------------------------------------------------------


class Control(Uncopied):
    """Answers requests to a service on a listener; a context manager.

    Args:
        listener: bound and, best, of mode MODE (see `listen`); closed with this object.
        handlers: more kinds of requests, or others for known ones, by the word after "do".
        uids: the users who are heard; None: root and this process's.

    The loop that serves the regions calls `step()` when `fileno()` is readable.
    """

    def __init__(
        self,
        listener: sockets.Listener,
        service: Service,
        *,
        handlers: Mapping[str, Handler] | None = None,
        uids: frozenset[int] | None = None,
    ) -> None:
        self._service = service
        self._uids = frozenset({0, os.geteuid()}) if uids is None else uids
        self._since = time.time()
        self._directories: dict[int, tuple[Region, Directory | None]] = {}
        # Who has asked to hold which peers' news, and is still connected.
        self._askers: dict[Caller, set[tuple[str, int]]] = {}
        self._handlers: dict[str, Handler] = {
            "version": self._version,
            "status": self._status,
            "evict": self._evict,
            "hold-leaves": self._hold_leaves,
            "hold": self._hold,
            "release": self._release,
            "reload": self._reload,
            **(handlers or {}),
        }
        self.listener = listener
        self.path = listener.path
        try:
            self._answering = Answering(
                listener.socket,
                _cut_line,
                self._answer,
                too_long=_line(_refusal(f"a request has at most {LONGEST} bytes: send less")),
                admit=self._admit,
            )
            listener.listen()
        except BaseException:
            listener.close()
            raise

    def fileno(self) -> int:
        """Readable when `step()` has something to do."""
        return self._answering.fileno()

    def step(self) -> None:
        """Do what there is to do, without waiting."""
        self._answering.step()

    def close(self) -> None:
        """Disconnect everybody and remove the socket; may be called twice."""
        self._answering.close()
        self.listener.close()

    def bind_again(self) -> None:
        """Have the socket's path, which leads elsewhere, lead to this one again.

        Raises:
            OSError: as of Listener.bind_again; nothing has changed.
        """
        self._answering.relisten(partial(self.listener.bind_again, mode=MODE))

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _admit(self, sock: socket.socket) -> bytes | None:
        uid = sockets.credentials(sock).uid
        if uid in self._uids:
            return None
        heard = " and ".join(map(str, sorted(self._uids)))
        return _line(_refusal(f"uid {uid} is not heard here, only uid {heard}: be one of these"))

    def _answer(self, caller: Caller, request: bytes) -> bytes | None:
        try:
            message = _parse(request)
            kind = message.get("do")
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                raise ControlError(f'"do" is {_shown(kind)}: known are {", ".join(self._handlers)}')
            reply = handler(caller, message)
            return None if reply is None else _line({"ok": True, **reply})
        except (IvshmemError, OSError, ValueError) as error:
            return _line(_refusal(_one_line(error)))
        except Exception as error:
            _log.exception("a request to the control socket failed")
            return _line(_refusal(f"the server has an error, and logged it: {_one_line(error)}"))

    # -- requests ---------------------------------------------------------------------------------

    def _version(self, _: Caller, __: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"version": __version__, "protocol": PROTOCOL, "pid": os.getpid()}

    def _status(self, _: Caller, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peers = message.get("peers", True)
        if not isinstance(peers, bool):
            raise ControlError(f'"peers" is {_shown(peers)}: true or false is allowed')
        regions = self._service.regions
        if message.get("region") is not None:
            name, served = self._named(message)
            regions = {name: served}
        shown = [self._region(name, served, peers) for name, served in regions.items()]
        known = {id(served.server.region) for served in self._service.regions.values()}
        self._directories = {k: v for k, v in self._directories.items() if k in known}
        return {"server": self._process(), "regions": shown}

    def _evict(self, caller: Caller, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peer = _id(message)
        name, served = self._named(message)
        with self._known(name):
            served.server.evict(peer)
        by = _who(caller)
        told = logs.fields("evicted", peer=peer, region=name, **by)
        _log.info(
            "peer %d of %s was evicted, as uid %d asked", peer, name, by["by_uid"], extra=told
        )
        return {"region": name}

    def _hold_leaves(self, caller: Caller, message: Mapping[str, Any]) -> Mapping[str, Any]:
        on = message.get("on")
        if not isinstance(on, bool):
            raise ControlError(f'"on" is {_shown(on)}: true or false is wanted')
        name, served = self._named(message)
        served.server.hold_leaves(on)
        by = _who(caller)
        told = logs.fields("held", on=on, region=name, **by)
        what = "is told of no leaves" if on else "is told of leaves if it connects later"
        _log.info("QEMU %s of %s, as uid %d asked", what, name, by["by_uid"], extra=told)
        return {"region": name}

    def _hold(self, caller: Caller, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peer, linger = _id(message), message.get("linger", LINGER)
        number = isinstance(linger, int | float) and not isinstance(linger, bool)
        if not number or not 0 < linger <= LONGEST_LINGER:
            raise ControlError(
                f'"linger" is {_shown(linger)}: allowed are more than 0 and at most'
                f" {LONGEST_LINGER:g} seconds"
            )
        name, served = self._named(message)
        with self._known(name):
            read = served.server.hold(peer, linger=float(linger), asker=caller)
        caller.at_end = functools.partial(self._asker_is_gone, caller)
        asked = self._askers.setdefault(caller, set())
        if (name, peer) not in asked:  # it does not ask again whether all was read
            asked.add((name, peer))
            by = _who(caller)
            told = logs.fields("holding", peer=peer, region=name, linger=linger, **by)
            by_uid = by["by_uid"]
            _log.info(
                "peer %d of %s is sent no news, as uid %d asked", peer, name, by_uid, extra=told
            )
        return {"region": name, "read": read}

    def _release(self, caller: Caller, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peer = _id(message)
        name, served = self._named(message)
        with self._known(name):
            held = served.server.release(peer)
        if held:
            by = _who(caller)
            told = logs.fields("released", peer=peer, region=name, **by)
            by_uid = by["by_uid"]
            _log.info(
                "peer %d of %s is sent news again, as uid %d asked", peer, name, by_uid, extra=told
            )
        return {"region": name, "held": held}

    def _asker_is_gone(self, caller: Caller) -> None:
        self._askers.pop(caller, None)
        for served in list(self._service.regions.values()):
            with contextlib.suppress(ClosedError):
                served.server.asker_is_gone(caller)

    def _reload(self, caller: Caller, _: Mapping[str, Any]) -> Mapping[str, Any]:
        by = _who(caller)
        try:
            changes = list(self._service.reload() or ())
        except (IvshmemError, OSError, ValueError) as error:
            reason = _one_line(error)
            told = logs.fields("unreloaded", reason=reason, **by)
            _log.warning("nothing was reloaded: %s", reason, extra=told)
            raise
        told = logs.fields("reloaded", changes=changes, **by)
        _log.info("reloaded: %s", "; ".join(changes) or "nothing has changed", extra=told)
        return {"changes": changes}

    def _named(self, message: Mapping[str, Any]) -> tuple[str, Served]:
        """The region that a message means."""
        regions = self._service.regions
        name = message.get("region")
        if name is None and len(regions) == 1:
            name = next(iter(regions))
        if isinstance(name, str) and name in regions:
            return name, regions[name]
        known = ", ".join(regions) or "none"
        if name is None:
            raise ControlError(f'there is not just one region: "region" has to be one of {known}')
        raise ControlError(f"no region {_shown(name)} is served here: there are {known}")

    @contextlib.contextmanager
    def _known(self, name: str) -> Iterator[None]:
        """Say of a peer that is not there of which region it is not."""
        try:
            yield
        except NoSuchPeer as error:
            listing = command(["ivshmem", "status", "--control", os.path.abspath(self.path)])
            raise ControlError(f"region {name}: {error} (`{listing}` lists who is)") from None

    # -- the state --------------------------------------------------------------------------------

    def _process(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "version": __version__,
            "protocol": PROTOCOL,
            "since": self._since,
            "time": time.time(),
            "cpu": used.ru_utime + used.ru_stime,
            "resident": _resident(),
            "fds": {"open": _open_fds(), "limit": _fd_limit()},
            "pid_namespace": pid_namespace(),
        }

    def _region(self, name: str, served: Served, peers: bool) -> dict[str, Any]:
        server = served.server
        region = server.region
        shown: dict[str, Any] = {
            "name": name,
            "socket": server.path,
            "unreachable": served.listener.astray(),
            "vectors": server.vectors,
            "size": region.size,
            "page_size": region.page_size,
            "file_system": _file_system(region),
            "source": region.source,
            "memory": region.name or "",
            "memory_leads_to": region.name_leads_to() or "",
            "paused": server.paused,
            "holds_leaves": server.holds_leaves,
            "counts": dict(server.counts),
        }
        if peers:
            names = self._names(region)
            shown["peers"] = [_peer(report, names) for report in server.report(interrupts=True)]
        return shown

    def _names(self, region: Region) -> dict[int, list[str]]:
        """What peers say in the directory of names that they are called, if there is one."""
        directory = self._directory(region)
        found: dict[int, list[str]] = {}
        if directory is not None:
            with contextlib.suppress(ClosedError):
                for entry in directory.entries():
                    found.setdefault(entry.id, []).append(entry.name)
        return found

    def _directory(self, region: Region) -> Directory | None:
        # Kept, so that it sees by whom an entry is kept alive. One may be made at any time.
        known = self._directories.get(id(region))
        if known is not None and known[1] is not None:
            return known[1]
        directory: Directory | None = None
        with contextlib.suppress(NoDirectory, ClosedError):
            if region.read(region.size - SLOT_BYTES, len(MAGIC)) == MAGIC:
                # Not before: the import takes a while, and nobody is served then.
                from .directory import Directory

                directory = Directory.open(region)
        self._directories[id(region)] = (region, directory)
        return directory


def listen(path: str | os.PathLike[str]) -> sockets.Listener:
    """A listener for a Control: nobody but this user may connect to it, from the beginning.

    Raises:
        OSError: as of sockets.Listener; ENAMETOOLONG for the default of a long socket path.
    """
    return sockets.Listener(path, mode=MODE)


def default_path(server: str | os.PathLike[str]) -> str:
    """Where the control socket of a server is, if nobody said otherwise."""
    return os.path.abspath(os.fsdecode(server)) + SUFFIX


def _cut_line(buffer: bytearray) -> bytes | None:
    end = buffer.find(b"\n")
    if end < 0:
        return None
    line = bytes(buffer[:end])
    del buffer[: end + 1]
    return line


def _parse(request: bytes) -> dict[str, Any]:
    try:
        message = shapes.loads(request)
    except shapes.Misshapen as error:
        raise ControlError(f'no JSON ({_one_line(error)}): send {{"do": "status"}}') from None
    if not isinstance(message, dict):
        raise ControlError(f'{_shown(message)} is no JSON object: send {{"do": "status"}}')
    return message


def _id(message: Mapping[str, Any]) -> int:
    peer = message.get("id")
    if not isinstance(peer, int) or isinstance(peer, bool):
        raise ControlError(f'"id" is {_shown(peer)}: the number of a peer is wanted')
    return peer


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _refusal(error: str) -> dict[str, Any]:
    return {"ok": False, "error": error[:_MOST_ERROR]}


def _shown(value: object) -> str:
    """What was sent, short."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a number of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}.."


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return plain(text)


def _who(caller: Caller) -> dict[str, Any]:
    who = sockets.credentials(caller.socket)
    return {"by_uid": who.uid, "by_pid": who.pid}


def _peer(report: PeerReport, names: Mapping[int, list[str]]) -> dict[str, Any]:
    peer = report.peer
    return {
        "id": peer.id,
        "pid": peer.pid,
        "uid": peer.uid,
        "gid": peer.gid,
        "process": peer.process,
        "names": names.get(peer.id, []),
        "vectors": peer.vectors,
        "since": peer.since,
        "readonly": report.readonly,
        "set_up": report.set_up,
        "pending": report.pending,
        "stalled_since": report.stalled_since,
        "leaves_told": report.leaves_told,
        "leaves_held": report.leaves_held,
        "held": report.held,
        "held_until": report.held_until,
        "interrupts": list(report.interrupts),
    }


@functools.cache
def pid_namespace() -> int:
    """The inode of this process's pid namespace, 0 if that is not known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _file_system(region: Region) -> str:
    from . import pages

    with contextlib.suppress(OSError):  # no descriptor is left, say
        return pages.file_system(region.fileno())
    return ""


def _resident() -> int:
    try:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def _open_fds() -> int:
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # the one that lists
    except OSError:
        return 0


def _fd_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


# -- the other side -------------------------------------------------------------------------------

_COUNT = shapes.integer(0)
_PEER = shapes.record(
    # Servers of older versions do not say these.
    {
        "leaves_told": _COUNT,
        "leaves_held": _COUNT,
        "held": shapes.flag(),
        "held_until": shapes.optional(shapes.moment()),
    },
    id=shapes.integer(0, MAX_ID),
    pid=shapes.integer(0, _MOST_PID),
    uid=shapes.integer(0, _MOST_UID),
    gid=shapes.integer(0, _MOST_UID),
    process=shapes.text(),
    names=shapes.array(shapes.text()),
    vectors=shapes.integer(0, MAX_VECTORS),
    since=shapes.moment(),
    readonly=shapes.flag(),
    set_up=shapes.flag(),
    pending=_COUNT,
    stalled_since=shapes.optional(shapes.moment()),
    interrupts=shapes.array(_COUNT, MAX_VECTORS),
)
_REGION = shapes.record(
    {
        "file_system": shapes.text(),
        "holds_leaves": shapes.flag(),
        "unreachable": shapes.text(),
        "memory_leads_to": shapes.text(),
    },
    name=shapes.text(),
    socket=shapes.text(),
    vectors=shapes.integer(0, MAX_VECTORS),
    size=_COUNT,
    page_size=_COUNT,
    source=shapes.text(),
    memory=shapes.text(),
    paused=shapes.text(),
    counts=shapes.table(_COUNT),
)
_SERVER = shapes.record(
    pid=shapes.integer(0, _MOST_PID),
    uid=shapes.integer(0, _MOST_UID),
    version=shapes.text(),
    protocol=_COUNT,
    since=shapes.moment(),
    time=shapes.moment(),
    cpu=shapes.number(),
    resident=_COUNT,
    fds=shapes.record(open=_COUNT, limit=shapes.optional(_COUNT)),
    pid_namespace=_COUNT,
)

# What a reply to each request has, for whoever reads it; more fields may come.
REPLIES: Mapping[str, shapes.Shape] = {
    "version": shapes.record(version=shapes.text(), protocol=_COUNT, pid=_COUNT),
    "status": shapes.record(server=_SERVER, regions=shapes.array(_REGION)),
    "evict": shapes.record(region=shapes.text()),
    "hold-leaves": shapes.record(region=shapes.text()),
    "hold": shapes.record(region=shapes.text(), read=shapes.flag()),
    "release": shapes.record(region=shapes.text(), held=shapes.flag()),
    "reload": shapes.record(changes=shapes.array(shapes.text())),
}
_PEERS = shapes.record(regions=shapes.array(shapes.record(peers=shapes.array(_PEER))))
_ANY_REPLY = shapes.record({"error": shapes.text()}, ok=shapes.flag())


def _check(message: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
    """Raise shapes.Misshapen if a reply to this message is not what it should be."""
    kind = message.get("do")
    if isinstance(kind, str) and kind in REPLIES:
        REPLIES[kind](reply, kind)
        if kind == "status" and message.get("peers", True):
            _PEERS(reply, kind)


class Client(Uncopied):
    """A connection to a control socket; a context manager.

    Args:
        timeout: seconds for connecting, and for each reply.
        users: uids whose servers are asked; None: root's and this process's, and root asks anybody.

    Attributes:
        server: who answers, as the kernel says.

    Raises:
        ControlError: another user answers at this path.
        TimeoutError, OSError: as of sockets.connect.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        timeout: float = 10.0,
        *,
        users: Collection[int] | None = None,
    ) -> None:
        self.path = os.fsdecode(path)
        self._timeout = timeout
        # From this address a server would take us for somebody with a question, not for a peer, if
        # this should be its other socket.
        address = sockets.ASK + os.urandom(8).hex().encode()
        self._socket = sockets.connect(path, timeout, address=address)
        self._rest = b""
        self.server = sockets.credentials(self._socket)
        mine = os.geteuid()
        heard = {0, mine} if users is None else users
        if self.server.uid not in heard and not (users is None and mine == 0):
            self._socket.close()
            whose = user_name(self.server.uid)
            raise ControlError(
                f"{self.path}: {whose} answers here, not your server: give the path of yours by -S"
                f" or --control, or ask as {whose} or as root"
            )

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request, but for "ok".

        Raises:
            ControlError: the server could not do it; or this is no control socket; or the reply
                makes no sense.
            TimeoutError: no reply within the time limit. The connection is of no use any more.
            ConnectionError: the server has closed the connection.
        """
        deadline = time.monotonic() + self._timeout
        try:
            self._send(_line(message), deadline)
            reply = self._receive(deadline)
        except TimeoutError:
            reason = f"no reply within {counted(self._timeout, 'second')}: is the server stopped?"
            raise TimeoutError(errno.ETIMEDOUT, reason, self.path) from None
        if reply.pop("ok"):
            try:
                _check(message, reply)
            except shapes.Misshapen as error:
                raise ControlError(
                    f"the server's reply makes no sense ({error}): is it of another version?"
                ) from None
            return reply
        raise ControlError(plain(reply.get("error", "it could not be done")))

    def hold(self, peer: int, *, linger: float = LINGER, region: str | None = None) -> None:
        """Have a peer sent no news, and wait until it has read what it was sent.

        It ends by `release`, when the peer disconnects, and `linger` seconds after this connection
        has ended. See Server.hold for why.

        Raises:
            ControlError: there is no such peer; or the server is of a version that cannot do it.
            TimeoutError: the peer did not read all within the time limit; it is held all the same.
            ConnectionError: the server has closed the connection.
        """
        deadline = time.monotonic() + self._timeout
        message = {"do": "hold", "id": peer, "linger": linger, "region": region}
        while not self.ask(message)["read"]:
            if time.monotonic() > deadline:
                reason = (
                    f"peer {peer} has not read all that it was sent within {self._timeout:g}"
                    " seconds: is it stopped? (It is sent nothing more until `ivshmem release"
                    f" {peer}`)"
                )
                raise TimeoutError(errno.ETIMEDOUT, reason, self.path)
            time.sleep(_LOOK)

    def release(self, peer: int, *, region: str | None = None) -> bool:
        """Have a peer sent news again; whether it was held.

        Raises:
            ControlError: there is no such peer; or the server is of a version that cannot do it.
        """
        reply = self.ask({"do": "release", "id": peer, "region": region})
        return bool(reply["held"])

    def _send(self, data: bytes, deadline: float) -> None:
        # Who refuses us says so and closes; so there may be something to read nonetheless.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(data)

    def _receive(self, deadline: float) -> dict[str, Any]:
        chunks = [self._rest]
        size = 0
        while b"\n" not in chunks[-1]:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = b""
            with contextlib.suppress(ConnectionResetError):
                data = self._socket.recv(1 << 18)
            if time.monotonic() > deadline:
                raise TimeoutError
            size += len(data)
            chunks.append(data)
            if size > _MOST_REPLY:
                raise self._stranger()
            if not data:
                if size or self._rest:
                    raise self._stranger()
                reason = "the server closed the connection: ask again"
                raise ConnectionResetError(errno.ECONNRESET, reason, self.path)
        line, _, self._rest = b"".join(chunks).partition(b"\n")
        with contextlib.suppress(shapes.Misshapen):
            reply = shapes.loads(line)
            _ANY_REPLY(reply, "reply")
            return dict(reply)
        raise self._stranger()

    def _stranger(self) -> ControlError:
        return ControlError(
            f"{self.path}: this is no control socket (that of a server on this socket would be"
            f" {self.path}{SUFFIX})"
        )

    def close(self) -> None:
        """Close the connection; may be called twice."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def request(
    path: str | os.PathLike[str], message: Mapping[str, Any], timeout: float = 10.0
) -> dict[str, Any]:
    """The reply to one request, but for "ok".

    Raises:
        ControlError, TimeoutError, OSError: as of Client.
    """
    with Client(path, timeout) as client:
        return client.ask(message)
