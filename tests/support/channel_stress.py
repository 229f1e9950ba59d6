"""Threads at the ends of channels of each kind; run by itself, also by a Python without a GIL.

python -m support.channel_stress SECONDS    for each kind; prints what failed, and the GIL
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import ivshmem
from ivshmem import ClosedError, Directory, channel, testing
from ivshmem.channel import Channels

Job = Callable[[], object]
FAILED: list[str] = []
COUNTING = threading.Lock()


def together(seconds: float, *jobs: Job, last: tuple[Job, ...] = ()) -> None:
    """Run each job again and again in a thread of its own; `last` until the others have ended."""
    over = time.monotonic() + seconds
    begin = threading.Barrier(len(jobs) + len(last))
    running = len(jobs)

    def run(job: Job, is_last: bool) -> None:
        nonlocal running
        begin.wait()
        try:
            while running if is_last else time.monotonic() < over:
                job()
        except BaseException:
            FAILED.append(traceback.format_exc())
        finally:
            if not is_last:
                with COUNTING:
                    running -= 1

    threads = [threading.Thread(target=run, args=(job, job in last)) for job in (*jobs, *last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def allowing(job: Job, *errors: type[BaseException]) -> Job:
    def run() -> None:
        with contextlib.suppress(*errors):
            job()

    return run


def messages(one: Channels, two: Channels, seconds: float) -> None:
    made = one.create_messages("messages", limit=64, slots=16, loans=4)
    writer, other = made.writer(), made.writer()
    joined: Any = two.open("messages")
    reader, late = joined.reader("block"), joined.reader("overwrite")

    def loan() -> None:
        with writer.loan(8) as borrowed:
            memoryview(borrowed)[:] = b"12345678"
            if time.monotonic_ns() % 3 == 0:
                borrowed.drop()
            else:
                borrowed.publish(0.1)

    def view(end: Any) -> Job:
        def look() -> None:
            with end.view(0.01) as seen:
                assert len(bytes(memoryview(seen))) <= 64

        # None: nothing came; too many views or loans at once; a reader that was overtaken.
        return allowing(look, TypeError, channel.ChannelError)

    together(
        seconds,
        allowing(lambda: writer.put(b"a" * 8, 0.1), TimeoutError),
        allowing(lambda: writer.put(b"b" * 64, 0.1), TimeoutError),
        allowing(lambda: other.put(b"c", 0.1), TimeoutError),
        allowing(loan, channel.ChannelError, TimeoutError),
        lambda: reader.get(0.01),
        lambda: reader.get(0.01),
        view(reader),
        view(late),
    )
    for end in (writer, other, reader, late):
        end.close()


def queue(one: Channels, two: Channels, seconds: float) -> None:
    made = one.create_queue("queue", limit=64)
    writer = made.writer()
    readers: list[Any] = [two.open("queue").reader() for _ in range(2)]  # type: ignore[attr-defined]

    def take(reader: Any) -> Job:
        def work() -> None:
            taken = reader.take(0.01)
            if taken is not None:
                taken.done() if time.monotonic_ns() % 5 else taken.give_back()

        return work

    put = allowing(lambda: writer.put(b"a", 0.01), TimeoutError)
    together(
        seconds,
        put,
        put,
        take(readers[0]),
        take(readers[0]),
        take(readers[1]),
        lambda: readers[1].get(0.01),
    )


def calls(one: Channels, two: Channels, seconds: float) -> None:
    server = one.create_calls("calls", limit=64, slots=8).server()
    caller: Any = two.open("calls").caller()  # type: ignore[attr-defined]

    def serve() -> None:
        call = server.take(0.01)
        if call is not None:
            call.reply(call.get())

    def ask() -> None:
        data = b"%d" % threading.get_ident()
        assert caller.call(data, 30) == data

    cancel = allowing(lambda: caller.submit(b"a", 0.01).cancel(), TimeoutError)
    together(seconds, ask, ask, ask, cancel, last=(serve, lambda: serve()))


def stream(one: Channels, two: Channels, seconds: float) -> None:
    listener = one.create_bytes("bytes", buffer=4096).listen()
    caller: Any = two.open("bytes").connect()  # type: ignore[attr-defined]
    accepted: Any = listener.accept()
    caller.settimeout(0.1)
    accepted.settimeout(0.1)
    sent, received = [0, 0], [0, 0]

    def send(i: int) -> Job:
        def work() -> None:
            sent[i] += caller.send(b"a" * 100)

        return allowing(work, TimeoutError)

    def receive(i: int) -> Job:
        def work() -> None:
            received[i] += len(accepted.recv(333))

        return allowing(work, TimeoutError)

    together(seconds, send(0), send(1), receive(0), receive(1))
    while sum(received) < sum(sent):
        received[0] += len(accepted.recv(1000))
    assert sum(received) == sum(sent)


def value(one: Channels, two: Channels, seconds: float) -> None:
    writer = one.create_value("value", limit=64).writer()
    reader: Any = two.open("value").reader()  # type: ignore[attr-defined]

    def get() -> None:
        seen = reader.get()
        assert seen is None or len(set(seen)) == 1

    together(
        seconds,
        lambda: writer.put(bytes([time.monotonic_ns() % 250]) * 64),
        get,
        get,
        lambda: reader.wait_changed(0.01),
        lambda: reader.view() and None,
    )


def opening(one: Channels, two: Channels, seconds: float) -> None:
    made = one.create_messages("opening", limit=64, writers=8, readers=8)

    def write() -> None:
        with made.writer() as writer:
            writer.put(b"a", 0)

    def read() -> None:
        with made.reader("overwrite") as reader:
            reader.get(0)

    together(
        seconds,
        *2 * [allowing(write, channel.ChannelError, TimeoutError)],
        read,
        two.list,
        one.places,
    )


def closing(one: Channels, two: Channels, seconds: float) -> None:
    made = one.create_messages("closing", limit=64)
    for _ in range(max(int(seconds * 20), 1)):
        reader, writer = made.reader("block"), made.writer()

        use(reader, writer)
    assert len(two.list()) > 1


def use(reader: Any, writer: Any) -> None:
    """Use two ends while they are closed."""
    over = (ClosedError, BufferError, TimeoutError)

    def view() -> None:
        seen = reader.view(0.01)
        if seen is not None:
            seen.release()

    def close() -> None:
        time.sleep(0.02)
        reader.close()
        writer.close()

    together(
        0.04,
        allowing(lambda: reader.get(0.01), *over),
        allowing(lambda: writer.put(b"a", 0.01), *over),
        allowing(view, *over),
        allowing(close, *over),
    )


def main() -> None:
    seconds = float(sys.argv[1])
    with testing.server("16M") as server:
        with ivshmem.connect(server.path) as client:
            Directory.create(client.region, channels="8M").close()
        with ivshmem.connect(server.path) as a, ivshmem.connect(server.path) as b:
            # A lease that no load exceeds: what a reader loses while it is silent is no fault.
            with channel.open(a, lease=60) as one, channel.open(b, lease=60) as two:
                for kind in (messages, queue, calls, stream, value, opening, closing):
                    kind(one, two, seconds)
    print(*FAILED, getattr(sys, "_is_gil_enabled", lambda: True)())


if __name__ == "__main__":
    main()
