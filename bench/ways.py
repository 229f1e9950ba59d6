"""The ways in which two processes can wake one another, ours among them.

Knows: of each way, what both ends share, and what each does in a turn. Does not know: how that is
measured.

What a library needs is imported when a way is used: none of them has to be installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import context, get_context, popen_spawn_posix
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ivshmem.bench.roundtrip import End, python_end
from ivshmem.bench.worker import Steps

ROOT = Path(__file__).parent.parent  # where the ends find this module

SPIN = 0.00005  # seconds: what our own spinning way spins for at most


class Shared(NamedTuple):
    """What the two ends are given: arguments for `Way.steps`, and descriptors that both inherit."""

    ping: list[Any]
    echo: list[Any]
    fds: list[int] = []  # noqa: RUF012


class Way:
    """One way to wake one another.

    Attributes:
        name: what it is called in tables.
        needs: the module that has to be installed for it.
        like: the name of what does the same in C, if that is not FLOOR.
    """

    def __init__(self, name: str, needs: str = "", like: str = "") -> None:
        self.name = name
        self.needs = needs
        self.like = like

    def missing(self) -> str | None:
        """Why it cannot be used here; None if it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None

    def library(self) -> Any:
        """The module that it needs."""
        return importlib.import_module(self.needs)

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        """The two ends, which can be started as long as the block lasts."""

        def end(role: str, arguments: list[Any]) -> End:
            factory = f"{__name__}:enter"
            return python_end(role, factory, self.name, *arguments, fds=shared.fds, directory=ROOT)

        with self.shared() as shared:
            yield end("ping", shared.ping), end("echo", shared.echo)

    def shared(self) -> contextlib.AbstractContextManager[Shared]:
        """What both ends share, as long as the block lasts."""
        raise NotImplementedError

    def steps(self, role: str, *arguments: Any) -> contextlib.AbstractContextManager[Steps]:
        """What an end does, in its own process, given what it shares with the other."""
        raise NotImplementedError


# -- the floor -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _closing(*fds: int) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in set(fds):
            os.close(fd)


class Floor(Way):
    """A case of baseline.c."""

    def __init__(self, name: str, case: str, program: Path) -> None:
        super().__init__(name)
        self._case = case
        self._program = program

    def _descriptors(self) -> tuple[int, int]:
        if self._case == "word":
            memory = os.memfd_create("word")
            os.ftruncate(memory, 4096)
            return memory, memory
        flags = os.EFD_CLOEXEC | (0 if self._case == "block" else os.EFD_NONBLOCK)
        return os.eventfd(0, flags), os.eventfd(0, flags)

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        a, b = fds = self._descriptors()
        with _closing(*fds):
            command = [str(self._program), "trips", self._case]
            yield (
                End([*command, "ping", str(a), str(b)], fds),
                End([*command, "echo", str(b), str(a)], fds),
            )


# -- descriptors -----------------------------------------------------------------------------------


def _eventfds() -> tuple[int, int, int, int]:
    a, b = os.eventfd(0), os.eventfd(0)
    return a, b, b, a


def _pipes() -> tuple[int, int, int, int]:
    (here, answer), (question, there) = os.pipe(), os.pipe()
    return there, here, answer, question


def _sockets() -> tuple[int, int, int, int]:
    a, b = (end.detach() for end in socket.socketpair())
    return a, a, b, b


class Descriptors(Way):
    """A system call of Python's `os` that writes, and one that reads and blocks.

    Args:
        make: opens for the one end: what it writes to, what it reads from; and for the other.
        ring, wait: statements that know `write`, `read`, `there` and `here`.
    """

    def __init__(
        self, name: str, make: Callable[[], tuple[int, int, int, int]], ring: str, wait: str
    ) -> None:
        super().__init__(name)
        self._make = make
        self._ring = ring
        self._wait = wait

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        fds = self._make()
        with _closing(*fds):
            yield Shared([fds[0], fds[1]], [fds[2], fds[3]], list(fds))

    @contextlib.contextmanager
    def steps(self, role: str, there: int, here: int) -> Iterator[Steps]:
        calls = {"eventfd_write": os.eventfd_write, "eventfd_read": os.eventfd_read}
        calls |= {"write": os.write, "read": os.read}
        yield Steps(self._ring, self._wait, {**calls, "there": there, "here": here})


# -- the standard library --------------------------------------------------------------------------


class _Carrier(popen_spawn_posix.Popen):
    """What multiprocessing pickles for: a child that it would spawn. Here others do that."""

    def __init__(self) -> None:
        self._fds: list[int] = []


def pickled(thing: Any) -> tuple[str, list[int]]:
    """As multiprocessing would hand it to a child: in hexadecimal, and the descriptors for it."""
    carrier = _Carrier()
    context.set_spawning_popen(carrier)
    try:
        return bytes(ForkingPickler.dumps(thing)).hex(), carrier._fds
    finally:
        context.set_spawning_popen(None)


class Multiprocessing(Way):
    """Something of multiprocessing.

    Args:
        make: from a context, for each end the names that its statements know.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]],
        ring: str,
        wait: str,
    ) -> None:
        super().__init__(name)
        self._make = make
        self._ring = ring
        self._wait = wait

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        things = self._make(get_context("spawn"))  # they live until both ends are gone
        (ping, ping_fds), (echo, echo_fds) = map(pickled, things)
        yield Shared([ping], [echo], [*ping_fds, *echo_fds])
        del things

    @contextlib.contextmanager
    def steps(self, role: str, names_pickled: str) -> Iterator[Steps]:
        names = pickle.loads(bytes.fromhex(names_pickled))  # noqa: S301
        yield Steps(self._ring, self._wait, names)


def _mp_pipe(of: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    a, b = of.Pipe()
    return {"end": a}, {"end": b}


def _mp_events(of: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    a, b = of.Event(), of.Event()
    return {"there": a, "here": b}, {"there": b, "here": a}


def _mp_queues(of: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    a, b = of.SimpleQueue(), of.SimpleQueue()
    return {"there": a, "here": b}, {"there": b, "here": a}


# -- other libraries -------------------------------------------------------------------------------


class PosixIpc(Way):
    """Two named semaphores."""

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        posix_ipc = self.library()
        with contextlib.ExitStack() as stack:
            names = []
            for _ in range(2):
                semaphore = posix_ipc.Semaphore(None, posix_ipc.O_CREX)
                stack.callback(semaphore.close)
                stack.callback(semaphore.unlink)
                names.append(semaphore.name)
            yield Shared(names, names[::-1])

    @contextlib.contextmanager
    def steps(self, role: str, there: str, here: str) -> Iterator[Steps]:
        posix_ipc = self.library()
        names = {"there": posix_ipc.Semaphore(there), "here": posix_ipc.Semaphore(here)}
        yield Steps("there.release()", "here.acquire()", names)


class InDirectory(Way):
    """Ends that find one another by a path in a directory of their own."""

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        with tempfile.TemporaryDirectory(prefix="ivb", dir="/tmp") as directory:
            yield Shared([directory], [directory])


class Zmq(InDirectory):
    """Two PAIR sockets by ipc."""

    @contextlib.contextmanager
    def steps(self, role: str, directory: str) -> Iterator[Steps]:
        zmq = self.library()
        with zmq.Context() as library, library.socket(zmq.PAIR) as end:
            end.linger = 0
            address = f"ipc://{directory}/socket"
            end.bind(address) if role == "ping" else end.connect(address)
            yield Steps('send(b"x")', "receive()", {"send": end.send, "receive": end.recv})


class Nng(InDirectory):
    """Two Pair0 sockets by ipc."""

    @contextlib.contextmanager
    def steps(self, role: str, directory: str) -> Iterator[Steps]:
        pynng = self.library()
        address = f"ipc://{directory}/socket"
        with pynng.Pair0() as end:
            if role == "ping":
                end.listen(address)
            else:
                end.dial(address, block=False)  # and tries again until somebody listens
            yield Steps('send(b"x")', "receive()", {"send": end.send, "receive": end.recv})


class Iceoryx(InDirectory):
    """iceoryx2, configured so that what a killed end leaves behind can be found and removed."""

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        with super().shared() as shared:
            try:
                yield shared
            finally:
                for left in Path("/dev/shm").glob(f"{prefix_of(shared.ping[0])}*"):  # noqa: S108
                    left.unlink(missing_ok=True)

    def node(self, directory: str) -> Any:
        iceoryx2 = self.library()
        config = iceoryx2.config.default()
        config.global_cfg.root_path = iceoryx2.Path.new(directory)
        config.global_cfg.prefix = iceoryx2.FileName.new(prefix_of(directory))
        return iceoryx2.NodeBuilder.new().config(config).create(iceoryx2.ServiceType.Ipc)


def prefix_of(directory: str) -> str:
    return f"{Path(directory).name}_"


class IceoryxEvent(Iceoryx):
    """Notifier and listener, blocking."""

    @contextlib.contextmanager
    def steps(self, role: str, directory: str) -> Iterator[Steps]:
        iceoryx2 = self.library()
        node = self.node(directory)
        there, here = [
            node.service_builder(iceoryx2.ServiceName.new(name)).event().open_or_create()
            for name in _directions(role)
        ]
        listener = here.listener_builder().create()
        notifier = there.notifier_builder().create()
        while there.dynamic_config.number_of_listeners < 1:
            time.sleep(0.001)
        names = {"notify": notifier.notify, "wait": listener.blocking_wait}
        yield Steps("notify()", "wait()", names)


class IceoryxSamples(Iceoryx):
    """Publisher and subscriber, which has no way to wait but asking again and again."""

    @contextlib.contextmanager
    def steps(self, role: str, directory: str) -> Iterator[Steps]:
        iceoryx2 = self.library()
        node = self.node(directory)
        there, here = [
            node.service_builder(iceoryx2.ServiceName.new(name))
            .publish_subscribe(ctypes.c_uint64)
            .open_or_create()
            for name in _directions(role)
        ]
        subscriber = here.subscriber_builder().create()
        publisher = there.publisher_builder().create()
        while there.dynamic_config.number_of_subscribers < 1:
            time.sleep(0.001)
        publisher.update_connections()
        names = {"send": publisher.send_copy, "receive": subscriber.receive}
        names["value"] = ctypes.c_uint64(1)
        yield Steps("send(value)", "while receive() is None: pass", names)


def _directions(role: str) -> tuple[str, str]:
    return ("question", "answer") if role == "ping" else ("answer", "question")


# -- ours ------------------------------------------------------------------------------------------


class Ours(InDirectory):
    """Two clients of a server, which has no part in a round trip.

    Args:
        wait: a statement that knows `wait`; `ring` one that knows `ring` and `peer`. If `call` is
            "wait_word", both know the words `there` and `here`, which are counted up, and
            `asleep` and `sleeping`, which say whether an end has to be rung.
        echo: the other end is `Client.echo`, a loop in C, with this `spin`.
        call: the method of a client without which there is nothing to measure.
    """

    def __init__(
        self,
        name: str,
        wait: str,
        ring: str = "ring(peer)",
        echo: float | Literal["auto"] | None = None,
        call: str = "wait",
        like: str = "",
    ) -> None:
        super().__init__(name, like=like)
        self._wait = wait
        self._ring = ring
        self._echo = echo
        self._call = call

    def missing(self) -> str | None:
        import ivshmem

        if not hasattr(ivshmem.Client, self._call):
            return f"this version has no Client.{self._call}"
        return None

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        with super().shared() as shared:
            (directory,) = shared.ping
            with serving(Path(directory) / "socket"):
                yield shared

    @contextlib.contextmanager
    def steps(self, role: str, directory: str) -> Iterator[Steps]:
        import ivshmem

        with ivshmem.connect(f"{directory}/socket") as client:
            while not client.peers:  # not events(): those would make each ring dearer
                time.sleep(0.001)
            (peer,) = client.peers
            names: dict[str, Any] = {"ring": client.ring, "wait": client.wait, "peer": peer}
            answers = None
            if self._call == "wait_word":
                names |= {"wait_word": client.wait_word, "old": 0}
                places = (0, 128, 256, 384) if role == "ping" else (128, 0, 384, 256)
                words = map(client.region.atomic_u32, places)
                names |= zip(("there", "here", "asleep", "sleeping"), words, strict=True)
            elif self._echo is not None and role == "echo":
                spin = self._echo

                def answers(count: int) -> object:
                    return client.echo(peer, rounds=count, spin=spin)

            yield Steps(self._ring, self._wait, names, answers)


@contextlib.contextmanager
def serving(path: Path, vectors: int = 1, memory: str = "4K", channels: str = "") -> Iterator[None]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "ivshmem", "serve", "--quiet"]
    command += ["-S", str(path), "-n", str(vectors), "-l", memory]
    command += ["--channels", channels] if channels else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            yield
        finally:
            server.terminate()


# -- all of them -----------------------------------------------------------------------------------

FLOOR = "C: eventfd, blocking read"
SPINS = "C: spin on an eventfd"
WORD = "C: spin on a word"


def floors(program: Path) -> list[Way]:
    """The cases of baseline.c, which has been compiled; the first is what ratios are taken to."""
    return [
        Floor(FLOOR, "block", program),
        Floor("C: eventfd, poll then read", "poll", program),
        Floor(SPINS, "spin", program),
        Floor(WORD, "word", program),
    ]


_SPIN, _AUTO = f"wait(0, spin={SPIN})", 'wait(0, spin="auto")'

OURS: list[Way] = [
    Ours("ivshmem: wait(0)", "wait(0)"),
    Ours(f"ivshmem: {_SPIN}", _SPIN, call="echo", like=SPINS),
    Ours(f"ivshmem: {_AUTO}", _AUTO, call="echo", like=SPINS),
    Ours(
        "ivshmem: wait_word",
        "old = wait_word(here, old, sleeping=sleeping)",
        ring='there.fetch_add(1); asleep.load("seq_cst") and ring(peer)',
        call="wait_word",
        like=WORD,
    ),
    Ours("ivshmem: wait(0), echo in C", "wait(0)", echo=0.0, call="echo"),
    Ours(f"ivshmem: {_AUTO}, echo in C", _AUTO, echo="auto", call="echo", like=SPINS),
]

PEERS: list[Way] = [
    Descriptors("os.eventfd", _eventfds, ring="eventfd_write(there, 1)", wait="eventfd_read(here)"),
    Descriptors("os.pipe", _pipes, ring='write(there, b"x")', wait="read(here, 1)"),
    Descriptors("socketpair", _sockets, ring='write(there, b"x")', wait="read(here, 1)"),
    Multiprocessing(
        "multiprocessing.Pipe", _mp_pipe, ring='end.send_bytes(b"x")', wait="end.recv_bytes()"
    ),
    Multiprocessing(
        "multiprocessing.Event", _mp_events, ring="there.set()", wait="here.wait(); here.clear()"
    ),
    Multiprocessing(
        "multiprocessing.SimpleQueue", _mp_queues, ring="there.put(None)", wait="here.get()"
    ),
    PosixIpc("posix_ipc semaphore", "posix_ipc"),
    Zmq("pyzmq PAIR, ipc", "zmq"),
    Nng("pynng Pair0, ipc", "pynng"),
    IceoryxEvent("iceoryx2 event", "iceoryx2"),
    IceoryxSamples("iceoryx2 publish-subscribe, spinning", "iceoryx2"),
]

_PYTHON = {way.name: way for way in [*OURS, *PEERS]}


def enter(role: str, name: str, *arguments: Any) -> contextlib.AbstractContextManager[Steps]:
    """What an end of a way in Python does; called in its process."""
    return _PYTHON[name].steps(role, *arguments)
