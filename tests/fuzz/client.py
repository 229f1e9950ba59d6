"""A server that means harm, and our client at the other end of a real socket.

Every byte and descriptor is sent by the script, cut as it likes; what the client waits for comes
when it waits: its poll is where the script goes on, and its clock is one that the poll moves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import select
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from random import Random
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import ivshmem
from ivshmem.native import descriptors
from ivshmem.peer import client as module
from ivshmem.peer.endpoint import Event
from ivshmem.protocol.limits import MAX_ID, MAX_VECTORS

from .script import Grammar, Op
from .target import Finding, Scripted

_MESSAGES, _MOST_MESSAGES = 100, 5200  # in one input; some may send more than fits into a batch
_MOST_POLLS = 500  # of a client that has a time limit of a tenth of a second

# -- descriptors that a server may send -----------------------------------------------------------


def _eventfd(flags: int = os.EFD_NONBLOCK, count: int = 0) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | flags)
    if count:
        os.eventfd_write(fd, count)
    return fd


def _memfd(size: int, seals: int = 0, flags: int = 0) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _again(fd: int, flags: int) -> int:
    """The same file, opened another way."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _pipe(end: int, *, other: bool = False) -> int:
    fds = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    if other:
        os.write(fds[1], b"12345678" * 2)
    os.close(fds[1 - end])
    return fds[end]


def _socket(kind: int) -> int:
    one, other = socket.socketpair(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    other.close()
    return one.detach()


def _file(size: int) -> int:
    fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    return fd


def _timer() -> int:
    timer = descriptors.Timer()
    try:
        timer.set(1e-9)
        return os.dup(timer.fileno())
    finally:
        timer.close()


def _epoll() -> int:
    epoll = select.epoll()
    try:
        return os.dup(epoll.fileno())
    finally:
        epoll.close()


_IN_CLOEXEC, _IN_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
_FULL = 2**64 - 2
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE, which fcntl does not name
_libc = ctypes.CDLL(None, use_errno=True)


class Kind(NamedTuple):
    """A kind of descriptor.

    `holds`: to ring it takes for ever, as the documentation says of a hostile peer's eventfd.
    """

    name: str
    make: Callable[[], int]
    holds: bool = False


KINDS: Sequence[Kind | None] = (
    None,
    Kind("eventfd", _eventfd),
    Kind("memory", lambda: _memfd(4096)),
    Kind("eventfd that blocks", lambda: _eventfd(0)),
    Kind("eventfd with a count", lambda: _eventfd(count=7)),
    Kind("eventfd, full", lambda: _eventfd(count=_FULL)),
    Kind("eventfd, full, that blocks", lambda: _eventfd(0, _FULL), holds=True),
    Kind("eventfd as a semaphore", lambda: _eventfd(os.EFD_SEMAPHORE | os.EFD_NONBLOCK, 3)),
    Kind("memory, empty", lambda: _memfd(0)),
    Kind("memory of a byte", lambda: _memfd(1)),
    Kind("memory of three pages", lambda: _memfd(12288)),
    Kind("memory of a terabyte", lambda: _memfd(1 << 40)),
    Kind("memory beyond all addresses", lambda: _memfd((1 << 63) - 1)),
    Kind("memory, sealed", lambda: _memfd(4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)),
    Kind("memory that is not to be written", lambda: _memfd(4096, _FUTURE_WRITE)),
    Kind("memory that is never written", lambda: _memfd(4096, fcntl.F_SEAL_WRITE)),
    Kind("memory for reading", lambda: _again(_memfd(4096), os.O_RDONLY)),
    Kind("memory for writing", lambda: _again(_memfd(4096), os.O_WRONLY)),
    Kind("memory by its path", lambda: _again(_memfd(4096), os.O_PATH)),
    Kind("huge pages", lambda: _memfd(2 << 20, flags=os.MFD_HUGETLB)),
    Kind("file", lambda: _file(4096)),
    Kind("file, empty", lambda: _file(0)),
    Kind("file of /proc", lambda: os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)),
    Kind("directory", lambda: os.open("/", os.O_RDONLY | os.O_CLOEXEC)),
    Kind("/dev/null", lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)),
    Kind("/dev/zero", lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)),
    Kind("pipe to read", lambda: _pipe(0)),
    Kind("pipe to read, with bytes in it", lambda: _pipe(0, other=True)),
    Kind("pipe to write", lambda: _pipe(1)),
    Kind("stream socket", lambda: _socket(socket.SOCK_STREAM)),
    Kind("datagram socket", lambda: _socket(socket.SOCK_DGRAM)),
    Kind("epoll object", _epoll),
    Kind("timer", _timer),
    Kind("inotify object", lambda: int(_libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK))),
    Kind("process", lambda: os.pidfd_open(os.getpid())),
)
_BY_NAME = {kind.name: number for number, kind in enumerate(KINDS) if kind}
EVENTFD, MEMORY = _BY_NAME["eventfd"], _BY_NAME["memory"]
_EVENTFDS = {number for name, number in _BY_NAME.items() if name.startswith("eventfd")}

VALUES = (
    *(0, 1, -1, 2, 3, 4, 5, 6, 7, MAX_ID, MAX_ID - 1, MAX_ID + 1, -2, MAX_VECTORS),
    *(1 << 16, 1 << 31, 1 << 32, -(1 << 31), -(1 << 32), (1 << 63) - 1, -(1 << 63), 1 << 56),
)
_AT = {value: number for number, value in enumerate(VALUES)}

# -- scripts --------------------------------------------------------------------------------------

FORMS = {
    "send": "bb",  # value (of VALUES), kind of descriptor
    "turn": "bb",  # the client's: what it does (of Player.ACTIONS), with which number
    "group": "bbb",  # value, kind, how often
    "number": "qb",  # the value itself, kind
    "fds": "bbbb",  # value, three descriptors
    "part": "bbb",  # value, kind, how many bytes of it now; the others come with what is next
    "bytes": "sb",  # as they are, kind
    "crowd": "ww",  # each of so many ids from one on, with an eventfd
    "leaves": "ww",  # the same, without
    "told": "",  # the server shuts down its receiving side: set-up is over
    "eof": "",  # its sending side
    "gone": "",  # both, and closes
    "limit": "b",  # so many descriptors are left until the client's next turn is over
    "start": "bb",  # how the client is made, where it stands first: vectors, bits of FLAGS
}
_READONLY, _HURRY, _PATIENT = 1, 2, 4  # bits
_MANY = 250  # flags from here on: so many messages as take long


def send(value: int, kind: int = 0) -> Op:
    return Op("send", (_AT[value], kind))


def turn(action: str, number: int = 0) -> Op:
    return Op("turn", (list(Player.ACTIONS).index(action), number))


def greeting(own: int = 1) -> list[Op]:
    return [send(0), send(own), send(-1, MEMORY)]


class Player:
    """One input: the server plays the script, and the client has its turns."""

    def __init__(self, script: Sequence[Op]) -> None:
        self.script = deque(script)
        self.server, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.setblocking(False)
        self.unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self.clock = 0.0
        self.polls = 0
        self.messages = _MESSAGES  # that may still be sent
        self.vectors: int | None = None
        self.flags = 0
        self.limit: int | None = None
        self.kinds: set[int] = set()  # that were sent
        self.memories = 0  # how many of the kind that is no bell, and is expected once
        self.next = ""  # what the client does in this turn
        self.number = 0
        self.known: set[int] = set()  # peers, as its events say
        self.lost = 0  # how often it was told so
        if script and script[0].name == "start":
            vectors, self.flags = _numbers(self.script.popleft())
            self.vectors = (None, None, None, 1, 2, 3, 0, MAX_VECTORS)[vectors % 8]
            self.messages = _MOST_MESSAGES if self.flags >= _MANY else _MESSAGES

    # -- the server -------------------------------------------------------------------------------

    def feed(self) -> bool:
        """Play on until the client's next turn; whether there is one."""
        self._unlimit()
        while self._flush() and self.script:
            op = self.script.popleft()
            if op.name == "turn":
                action, self.number = _numbers(op)
                self.next = list(self.ACTIONS)[action % len(self.ACTIONS)]
                self._limit()
                return True
            getattr(self, f"_op_{op.name}")(*op.args)
        # What does not go out waits for the client to read.
        self.next, self.number = "peers", 0
        self._limit()
        return bool(self.unsent or self.script)

    def _flush(self) -> bool:
        """Whether all that was to be sent is out."""
        while self.unsent:
            data, kinds = self.unsent[0]
            fds: list[int] = []
            try:
                for number in kinds:
                    kind = KINDS[number]
                    assert kind is not None
                    fds.append(kind.make())
                sent = socket.send_fds(self.server, [data], fds) if fds else self.server.send(data)
            except BlockingIOError:
                return False
            except OSError as error:
                # The client has hung up; or so many are on their way that no more may be sent.
                if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ETOOMANYREFS):
                    raise
                sent = len(data)
            finally:
                for fd in fds:
                    os.close(fd)
            self.unsent.popleft()
            if sent < len(data):
                self.unsent.appendleft((data[sent:], ()))
            self.kinds.update(kinds)
            self.memories += kinds.count(MEMORY)
        return True

    def _send(self, data: bytes, *kinds: int) -> None:
        self.messages -= 1
        if data and self.messages >= 0 and self.server.fileno() >= 0:
            self.unsent.append((data, tuple(k % len(KINDS) for k in kinds if k % len(KINDS))))

    def _op_send(self, value: int, kind: int) -> None:
        self._send(_message(VALUES[value % len(VALUES)]), kind)

    def _op_group(self, value: int, kind: int, count: int) -> None:
        for _ in range(min(count, self.messages)):
            self._op_send(value, kind)

    def _op_number(self, value: int, kind: int) -> None:
        self._send(_message(value), kind)

    def _op_fds(self, value: int, *kinds: int) -> None:
        self._send(_message(VALUES[value % len(VALUES)]), *kinds)

    def _op_part(self, value: int, kind: int, count: int) -> None:
        self._send(_message(VALUES[value % len(VALUES)])[: count % 8], kind)

    def _op_bytes(self, data: bytes, kind: int) -> None:
        self._send(data, kind)

    def _op_crowd(self, first: int, count: int) -> None:
        for peer in range(first, first + min(count, self.messages)):
            self._send(_message(peer), EVENTFD)

    def _op_leaves(self, first: int, count: int) -> None:
        for peer in range(first, first + min(count, self.messages)):
            self._send(_message(peer))

    def _op_told(self) -> None:
        self._shut(socket.SHUT_RD)

    def _op_eof(self) -> None:
        self._shut(socket.SHUT_WR)

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self.server.shutdown(how)

    def _op_gone(self) -> None:
        self.server.close()

    def _op_limit(self, count: int) -> None:
        self.limit = count % 8

    def _op_start(self, *_: int) -> None:
        pass  # only the first counts

    def _limit(self) -> None:
        if self.limit is not None:
            fd = os.dup(0)
            os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (fd + self.limit, _HARD))

    def _unlimit(self) -> None:
        if self.limit is not None:
            self.limit = None
            resource.setrlimit(resource.RLIMIT_NOFILE, (_SOFT, _HARD))

    # -- what the client takes for poll and clock -------------------------------------------------

    def poll(self) -> SimpleNamespace:
        return SimpleNamespace(register=lambda *_: None, poll=self._poll)

    def _poll(self, milliseconds: float) -> list[tuple[int, int]]:
        self.polls += 1
        if self.polls > _MOST_POLLS:
            raise Finding("the client waits for ever")
        self.clock += max(milliseconds, 1.0) / 1000
        if not self.feed() and self.flags & _PATIENT:
            self.server.close()  # or it would be right to wait for ever
        return []

    # -- the client -------------------------------------------------------------------------------

    def play(self) -> None:
        try:
            with _instead(module, self):
                self.feed()
                client = self._connect()
            if client is None:
                return
            try:
                self._use(client)
            finally:
                self._unlimit()
                client.close()
                client.close()
        finally:
            self._unlimit()
            self.server.close()
            self.socket.close()

    def _connect(self) -> ivshmem.Client | None:
        limit = None if self.flags & _PATIENT else 0.05 if self.flags & _HURRY else 0.3
        readonly = bool(self.flags & _READONLY)
        try:
            client = ivshmem.Client._join(self.socket, "/fuzz", limit, self.vectors, readonly)
        except ivshmem.RegionError as error:
            self._check_reason(error)
        except (ivshmem.ServerGone, ivshmem.ProtocolError, TimeoutError) as error:
            self._check_reason(error)
            if isinstance(error, TimeoutError) and self.flags & _PATIENT:
                raise Finding("a time limit ran out that was not given") from error
        except OSError as error:
            self._check_reason(error)
            by_path = error.errno == errno.EBADF and _BY_NAME["memory by its path"] in self.kinds
            if error.errno not in _MAY_FAIL and not by_path:
                raise Finding(f"set-up failed with {error!r}") from error
        else:
            self.known = self._first_known(client)
            return client
        return None

    def _first_known(self, client: ivshmem.Client) -> set[int]:
        """Who was there at the end of set-up, by which what is queued since makes sense."""
        known = set(client._session.peers)
        for event in reversed(list(client._queue.values())):
            if isinstance(event, ivshmem.PeerJoined):
                known.remove(event.peer)
            elif isinstance(event, ivshmem.PeerLeft):
                known.add(event.peer)
        return known

    def _use(self, client: ivshmem.Client) -> None:
        self._check(client)
        while True:
            action = self.ACTIONS[self.next]
            with self._documented():
                action(self, client)
            if not client.closed:
                self._check(client)
            if not self.feed():
                break
        self._unlimit()
        if client.closed:
            return
        self._news(client)
        if self.known != set(client._session.peers):
            raise Finding(f"told of {self.known}, and there are {client._session.peers}")
        if self.lost != (not client.connected):
            raise Finding(f"connected: {client.connected}, told {self.lost} times that it is lost")

    @contextlib.contextmanager
    def _documented(self) -> Iterator[None]:
        try:
            yield
        except (ivshmem.NoSuchPeer, ivshmem.NoSuchVector, ivshmem.ClosedError) as error:
            self._check_reason(error)
        except OSError as error:
            # A peer's bell may be anything; epoll objects and the like need a descriptor.
            strange = self.kinds - _EVENTFDS - {MEMORY} or self.memories > 1
            short = self.limit is not None and error.errno in (errno.EMFILE, errno.ENFILE)
            if not strange and not short:
                raise Finding(f"{self.next} failed with {error!r}") from error

    def _check_reason(self, error: BaseException) -> None:
        text = str(error)
        if not text or not text.isprintable():
            raise Finding(f"what an error says is not one line: {text!r}") from error

    def _check(self, client: ivshmem.Client) -> None:
        peers = client._session.peers
        if not 0 <= client.id <= MAX_ID or client.id in peers or peers != sorted(set(peers)):
            raise Finding(f"id {client.id}, peers {peers}")
        if not 0 <= client.vectors <= MAX_VECTORS or client.region.size <= 0:
            raise Finding(f"{client.vectors} vectors, {client.region.size} bytes")

    def _follow(self, client: ivshmem.Client, event: Event) -> None:
        if isinstance(event, ivshmem.PeerJoined):
            if event.peer in self.known:
                raise Finding(f"{event} again")
            self.known.add(event.peer)
        elif isinstance(event, ivshmem.PeerLeft):
            if event.peer not in self.known:
                raise Finding(f"{event}, and nobody had joined")
            self.known.remove(event.peer)
        elif isinstance(event, ivshmem.Disconnected):
            self._check_text(event.reason)
            self.lost += 1
        elif isinstance(event, ivshmem.IdChanged):
            raise Finding(f"{event}, of a client")
        elif not (0 <= event.vector < client.vectors and event.rings > 0):
            raise Finding(f"{event} of {client.vectors} vectors")

    def _check_text(self, text: str) -> None:
        if not text or not text.isprintable():
            raise Finding(f"not one line: {text!r}")

    # -- what it does in a turn -------------------------------------------------------------------

    def _peers(self, client: ivshmem.Client) -> None:
        peers = client.peers
        if client.id in peers or peers != sorted(set(peers)):
            raise Finding(f"peers of {client.id}: {peers}")

    def _news(self, client: ivshmem.Client) -> None:
        for event in client.peer_events():
            self._follow(client, event)

    def _events(self, client: ivshmem.Client) -> None:
        for _ in range(self.number % 8):
            event = client.next_event(0)
            if event is None:
                break
            self._follow(client, event)

    def _ring(self, client: ivshmem.Client) -> None:
        if not self._held_up():
            client.ring(VALUES[self.number % len(VALUES)], self.number // 128)

    def _ring_all(self, client: ivshmem.Client) -> None:
        if not self._held_up():
            client.ring_all(None, 0 if self.number % 2 else range(client.vectors))

    def _ring_all_peers(self, client: ivshmem.Client) -> None:
        for peer in client.peers[:20]:
            if not self._held_up():
                client.doorbell(peer, self.number % 3).ring()

    def _wait(self, client: ivshmem.Client) -> None:
        client.wait(None if self.number == 0 else self.number - 1, 0)

    def _wait_some(self, client: ivshmem.Client) -> None:
        client.wait(range(self.number % 4 + 1), 0)

    def _fileno(self, client: ivshmem.Client) -> None:
        fd = client.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        there = poll.poll(0)
        if not there and client._queue:
            raise Finding("there are events, and fileno() does not say so")

    def _memory(self, client: ivshmem.Client) -> None:
        if self.number == 1:  # it takes long
            client.region.info()
        repr(client)
        # All descriptors but these have their memory, and nobody takes it away.
        client.region.read(client.region.size - 1, 1)

    def _close(self, client: ivshmem.Client) -> None:
        client.close()
        repr(client)

    def _held_up(self) -> bool:
        kinds = (KINDS[number] for number in self.kinds)
        return any(kind is not None and kind.holds for kind in kinds)

    ACTIONS: dict[str, Callable[[Player, ivshmem.Client], None]] = {  # noqa: RUF012
        "news": _news,
        "peers": _peers,
        "events": _events,
        "ring": _ring,
        "ring all": _ring_all,
        "ring each": _ring_all_peers,
        "wait": _wait,
        "wait some": _wait_some,
        "fileno": _fileno,
        "memory": _memory,
        "close": _close,
    }


# What set-up may say of a descriptor that cannot be mapped, or if there are no more descriptors.
_MAY_FAIL = {errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ENODEV, errno.EOVERFLOW}

_SOFT, _HARD = resource.getrlimit(resource.RLIMIT_NOFILE)


def _message(value: int) -> bytes:
    return struct.pack("<q", value)


def _numbers(op: Op) -> tuple[int, int]:
    one, other = op.args
    assert isinstance(one, int)
    assert isinstance(other, int)
    return one, other


@contextlib.contextmanager
def _instead(client: object, player: Player) -> Iterator[None]:
    """Let the client's module wait by the script, and not by the kernel."""
    clock = SimpleNamespace(monotonic=lambda: player.clock)
    waiting = SimpleNamespace(poll=player.poll, POLLIN=select.POLLIN)
    with mock.patch.object(client, "time", clock), mock.patch.object(client, "select", waiting):
        yield


class ClientTarget(Scripted):
    """What servers send."""

    name = "client"
    modules = (
        "peer/client",
        "peer/endpoint",
        "protocol/framing",
        "protocol/session",
        "memory/region",
    )
    share = 5
    grammar = Grammar(
        FORMS,
        [
            greeting(),
            [*greeting(), send(1, EVENTFD), Op("told"), turn("news")],
            [*greeting(), send(2, EVENTFD), send(1, EVENTFD), turn("news")],
            [],
        ],
    )

    def mutate(self, data: bytes, numbers: Random, other: bytes) -> bytes:
        script = self.grammar.decode(super().mutate(data, numbers, other))
        # What takes a hundred times as long must not breed.
        if script and script[0].name == "start" and numbers.random() < 0.99:
            vectors, flags = _numbers(script[0])
            script[0] = Op("start", (vectors, flags % _MANY))
        return self.grammar.encode(script)

    def play(self, script: Sequence[Op]) -> None:
        Player(script).play()

    def scripts(self) -> Sequence[Sequence[Op]]:
        ours = [*greeting(), send(1, EVENTFD), send(1, EVENTFD), Op("told")]
        example = [*greeting(), *[send(peer, EVENTFD) for peer in (2, 2, 3, 3, 1, 1)]]
        used = [turn(action, 1) for action in Player.ACTIONS]
        return [
            [*ours, *used],
            [*example, *used],
            [*example, send(3), turn("news"), send(3, EVENTFD), turn("events", 5), Op("eof")],
            [Op("start", (4, 0)), *ours, turn("wait"), Op("gone"), turn("news")],
            [Op("start", (6, _PATIENT)), *greeting(), Op("told")],
            [Op("start", (0, _HURRY)), *greeting()],
            [*greeting(), send(2, EVENTFD), turn("peers"), send(1, EVENTFD), turn("fileno")],
            [*[Op("part", (_AT[0], 0, n)) for n in (1, 7)], send(1)],
            [
                Op("start", (0, _MANY)),
                *example,
                Op("crowd", (5, 2500)),
                turn("news"),
                Op("leaves", (5, 2500)),
                turn("news"),
            ],
            [*example, Op("limit", (1,)), Op("crowd", (5, 9)), turn("news"), turn("events")],
            [*greeting()[:2], send(-1, _BY_NAME["directory"])],
            [*greeting(), send(1, _BY_NAME["pipe to read"])],
            # One that is there leaves during set-up, and comes again.
            [*example[:7], send(3), send(3, EVENTFD), send(1, EVENTFD), Op("told"), turn("news")],
        ]
