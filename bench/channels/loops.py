"""Round trips in an event loop: a channel, beside a bare eventfd and `loop.add_reader`.

Knows: what both ends do in their loops. Does not know: what becomes of the durations.

    python -m bench.channels.loops ping|echo LOOP bare|task THERE HERE
    python -m bench.channels.loops ping|echo LOOP channel DIRECTORY

is one end, as src/ivshmem/bench/worker.py says of ends. THERE and HERE are inherited eventfds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
from array import array
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise, repeat
from time import perf_counter_ns as now

from ivshmem.bench.roundtrip import End
from ivshmem.native.descriptors import Signaller
from ivshmem.peer.waiting_tasks import Waiter

from ..ways import ROOT, Way
from .exchange import ANSWER
from .ours import Blocking

LOOPS = ("asyncio", "uvloop")

_PR_SET_PDEATHSIG = 1

Turns = Callable[[int], Awaitable[list[int]]]


class InLoop(Way):
    """Two ends, each with an event loop of its own."""

    def __init__(self, label: str, loop: str) -> None:
        super().__init__(f"{label}, {loop}", loop)
        self.loop = loop

    def command(self, role: str, *words: str) -> list[str]:
        return [sys.executable, "-m", __name__, role, self.loop, *words]


class Bare(InLoop):
    """The floor: a callback reads an eventfd, and writes to another; no task, no future."""

    label, kind = "bare eventfd", "bare"
    settings = "loop.add_reader, os.eventfd_read, os.eventfd_write"

    def __init__(self, loop: str) -> None:
        super().__init__(self.label, loop)

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        a, b = fds = os.eventfd(0), os.eventfd(0)
        try:
            yield (
                End(self.command("ping", self.kind, str(a), str(b)), fds, ROOT),
                End(self.command("echo", self.kind, str(b), str(a)), fds, ROOT),
            )
        finally:
            for fd in fds:
                os.close(fd)


class Gently(Bare):
    """The least that a channel could cost: a task that is resumed by the callback, no message."""

    label, kind = "a task, a ring that never waits", "task"
    settings = "loop.add_reader, os.eventfd_read, completion of an AIO read"


class Awaited(InLoop):
    """A channel of messages, with a task at each end."""

    settings = "put(data, 0), await get_async()"

    def __init__(self, loop: str) -> None:
        super().__init__("put, await get_async", loop)

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        with Blocking().shared() as shared:
            (directory,) = shared.ping
            yield (
                End(self.command("ping", "channel", directory), (), ROOT),
                End(self.command("echo", "channel", directory), (), ROOT),
            )


# -- in the process of an end ----------------------------------------------------------------------


def _bare(role: str, there: int, here: int) -> Turns:
    async def turns(count: int) -> list[int]:
        loop = asyncio.get_running_loop()
        read, write, done = os.eventfd_read, os.eventfd_write, loop.create_future()
        times: list[int] = []
        pinging = role == "ping"

        def answered() -> None:
            read(here)
            times.append(now())
            if len(times) < count + pinging or not pinging:
                write(there, 1)
            if len(times) == count + pinging:
                done.set_result(None)

        loop.add_reader(here, answered)
        if pinging:
            times.append(now())
            write(there, 1)
        await done
        loop.remove_reader(here)
        return times

    return turns


def _task(role: str, there: int, here: int) -> Turns:
    async def turns(count: int) -> list[int]:
        loop = asyncio.get_running_loop()
        read, ring, rung = os.eventfd_read, Signaller().signal, (there,)
        waiter = Waiter(loop)
        times: list[int] = []

        def answered() -> None:
            read(here)
            waiter.resume(None)

        loop.add_reader(here, answered)
        if role == "ping":
            times.append(now())
            ring(rung)
        for _ in repeat(None, count):
            waiter = Waiter(loop)
            await waiter
            times.append(now())
            if role != "ping" or len(times) <= count:
                ring(rung)
        loop.remove_reader(here)
        return times

    return turns


@contextlib.contextmanager
def _channel(role: str, directory: str) -> Iterator[Turns]:
    with Blocking().link(role, directory) as link:
        put, get = link.names["put"], link.names["reader"].get_async
        data = bytes(ANSWER)

        async def ping(count: int) -> list[int]:
            times = [now()]
            for _ in repeat(None, count):
                put(data, 0)
                await get()
                times.append(now())
            return times

        async def echo(count: int) -> list[int]:
            for _ in repeat(None, count):
                put(await get(), 0)
            return []

        yield ping if role == "ping" else echo


def _new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def main(role: str, name: str, kind: str, *words: str) -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    with contextlib.ExitStack() as stack:
        if kind == "bare":
            turns = _bare(role, *map(int, words))
        elif kind == "task":
            turns = _task(role, *map(int, words))
        else:
            turns = stack.enter_context(_channel(role, *words))
        loop = _new_loop(name)
        stack.callback(loop.close)
        print("ready", flush=True)
        for line in sys.stdin:
            times = loop.run_until_complete(turns(int(line)))
            if role == "ping":
                took = array("q", (after - before for before, after in pairwise(times)))
                sys.stdout.buffer.write(took.tobytes())
                sys.stdout.buffer.flush()


def present() -> list[str]:
    """The loops that are installed."""
    return [name for name in LOOPS if importlib.util.find_spec(name) is not None]


if __name__ == "__main__":
    main(*sys.argv[1:])
