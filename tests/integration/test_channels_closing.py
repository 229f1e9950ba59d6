"""Channels, regions and ends that close, or are collected, while something uses them."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import functools
import gc
import operator
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.waiting import interrupt_when_asleep, until

from ivshmem import ClosedError, Directory, Region, channel
from ivshmem.channel import Channels
from ivshmem.channel.types import ArrayType

PATIENCE = 30.0
LARGE = 1 << 20  # of which a copy releases the GIL


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("32M") as region:
        Directory.create(region, channels="24M").close()
        yield region


@pytest.fixture
def channels(region: Region) -> Iterator[Channels]:
    with channel.open(region) as channels:
        yield channels


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


# What blocks, by its name: each makes ends and returns a call that waits for ever.
def _blocked_get(channels: Channels) -> Callable[[], Any]:
    return channels.create_messages("a", limit=8).reader().get


def _blocked_put(channels: Channels) -> Callable[[], Any]:
    messages = channels.create_messages("a", limit=8, slots=1)
    reader, writer = messages.reader("block"), messages.writer()
    writer.put(b"x")
    return lambda: (writer.put(b"y"), reader)


def _blocked_view(channels: Channels) -> Callable[[], Any]:
    messages = channels.create_messages("a", limit=8)
    reader, writer = messages.reader(), messages.writer()
    writer.put(b"x")
    view = reader.view(0)
    return lambda: (reader.view(), view)


def _blocked_take(channels: Channels) -> Callable[[], Any]:
    return channels.create_queue("a", limit=8).reader().take


def _blocked_value(channels: Channels) -> Callable[[], Any]:
    return channels.create_value("a", limit=8).reader().wait_changed


def _blocked_call(channels: Channels) -> Callable[[], Any]:
    caller = channels.create_calls("a", limit=8).caller()
    return lambda: caller.call(b"x")


def _blocked_server(channels: Channels) -> Callable[[], Any]:
    return channels.create_calls("a", limit=8).server().take


def _blocked_accept(channels: Channels) -> Callable[[], Any]:
    return channels.create_bytes("a").listen().accept


def _blocked_recv(channels: Channels) -> Callable[[], Any]:
    room = channels.create_bytes("a")
    listener = room.listen()
    stream = room.connect()
    return lambda: (stream.recv(1), listener)


def _blocked_send(channels: Channels) -> Callable[[], Any]:
    room = channels.create_bytes("a")
    listener = room.listen()
    stream = room.connect()
    return lambda: (stream.makefile("wb").write(bytes(1 << 20)), listener)


BLOCKED = [
    _blocked_get,
    _blocked_put,
    _blocked_view,
    _blocked_take,
    _blocked_value,
    _blocked_call,
    _blocked_server,
    _blocked_accept,
    _blocked_recv,
    _blocked_send,
]
_names = [each.__name__[9:] for each in BLOCKED]


@pytest.mark.parametrize("how", ["channels", "region"])
@pytest.mark.parametrize("begin", BLOCKED, ids=_names)
def test_close_ends_each_call_that_waits(
    region: Region, channels: Channels, begin: Callable[[Channels], Any], how: str
) -> None:
    call = begin(channels)
    raised: list[BaseException] = []
    begun = threading.Event()

    def work() -> None:
        begun.set()
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(PATIENCE)
    time.sleep(0.01)  # most of the time it sleeps now; the test is right if it does not
    with contextlib.suppress(BufferError):  # a View is alive
        (channels if how == "channels" else region).close()
    thread.join(PATIENCE)
    assert [type(error) for error in raised] == [ClosedError]


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C comes while it waits, and ends it at once."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
            yield
        assert time.monotonic() - began < PATIENCE / 2  # what is waited for never comes
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("begin", BLOCKED, ids=_names)
def test_a_signal_handler_that_raises_ends_each_call(
    channels: Channels, begin: Callable[[Channels], Any]
) -> None:
    call = begin(channels)
    for _ in range(2):
        with interrupted():
            call()


def test_nothing_is_lost_by_a_signal(channels: Channels) -> None:
    """After each call that Ctrl-C ended, the next one gets what there is, once."""
    messages = channels.create_messages("a", limit=8, slots=2)
    with messages.reader("block") as reader, messages.writer() as writer:
        with interrupted():
            reader.get()
        for text in (b"1", b"2"):
            writer.put(text)
        with interrupted():
            writer.put(b"3")
        with interrupted(), writer.loan(1) as loan:
            memoryview(loan)[:] = b"4"  # the end of `with` waits
        assert [reader.get(0) for _ in range(3)] == [b"1", b"2", None]
        writer.put(b"5")
        with reader.view(0) as view:  # type: ignore[union-attr]
            with interrupted():
                reader.view()
            assert bytes(view) == b"5"
        assert reader.get(0) is None
    queue = channels.create_queue("b", limit=8, slots=2)
    with queue.reader() as worker, queue.writer() as writer:
        with interrupted():
            worker.take()
        with interrupted():
            worker.get()
        writer.put(b"1")
        writer.put(b"2")
        with interrupted():
            writer.put(b"3")
        with contextlib.suppress(KeyboardInterrupt), worker.take(0):  # type: ignore[union-attr]
            raise KeyboardInterrupt  # it is given back
        assert sorted([worker.get(0), worker.get(0)]) == [b"1", b"2"]
        assert worker.get(0) is None
    calls = channels.create_calls("c", limit=8)
    with calls.caller() as caller, calls.server() as server:
        with interrupted():
            server.take()
        pending = caller.submit(b"x")
        with interrupted():
            pending.result()
        call = server.take(0)
        assert call is not None
        call.reply(b"y")
        assert pending.result(PATIENCE) == b"y"
        with interrupted():
            caller.call(b"z")  # it is given up: no server begins with it
        assert server.take(0) is None
    room = channels.create_bytes("d", buffer=64)
    with room.listen() as listener:
        with interrupted():
            listener.accept()
        with room.connect() as stream, listener.accept(0) as other:  # type: ignore[union-attr]
            with interrupted():
                other.recv(1)
            stream.send(b"abc")
            assert other.recv(10) == b"abc"
            with interrupted():
                stream.sendall(bytes(100))
            assert other.recv(100) == bytes(64)  # what had room; as of a socket


class Late(Exception):
    """What a signal handler raises."""


@contextlib.contextmanager
def decoding(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Iterator[None]:
    """Let a handler raise while a message is decoded, as one does in the middle of Python code."""

    def raise_it(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ArrayType, "array", raise_it)
        with pytest.raises(type(error)):
            yield


@pytest.mark.parametrize("error", [Late(), KeyboardInterrupt(), MemoryError()])
def test_what_was_not_decoded_is_the_next_calls(
    channels: Channels, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    numpy = pytest.importorskip("numpy")

    def content(values: list[int]) -> Any:
        return numpy.array(values, "u1")

    typed: dict[str, Any] = {"dtype": "|u1", "shape": (2,)}
    messages = channels.create_messages("a", slots=2, writers=1, **typed)
    with messages.reader("block") as reader, messages.writer() as writer:
        for each in ([1, 2], [3, 4]):
            writer.put(content(each))
        with decoding(monkeypatch, error):
            reader.get(0)
        with pytest.raises(TimeoutError):
            writer.put(content([0, 0]), 0)  # no room was given back
        with decoding(monkeypatch, error):
            reader.get(0)
        assert [list(reader.get(0)) for _ in range(2)] == [[1, 2], [3, 4]]
        assert reader.get(0) is None
        for _ in range(2):
            writer.put(content([0, 0]), 0)  # all room was given back
    queue = channels.create_queue("b", **typed)
    with queue.reader() as worker, queue.writer() as writer:
        writer.put(content([1, 2]))
        with decoding(monkeypatch, error):
            worker.get(0)
        assert list(worker.get(0)) == [1, 2]
        assert worker.get(0) is None
    value = channels.create_value("c", **typed)
    with value.reader() as changes, value.writer() as setter:
        setter.put(content([1, 2]))
        with decoding(monkeypatch, error):
            changes.wait_changed(0)
        assert list(changes.wait_changed(0)) == [1, 2]
        assert changes.wait_changed(0) is None


def test_what_can_never_be_decoded_is_lost(channels: Channels) -> None:
    """The next call does not raise the same again, for ever."""
    for make in (channels.create_messages, channels.create_queue):
        made = make(make.__name__, limit=100)
        with made.reader(pickle=True) as reader, made.writer() as writer:
            writer.put(b"no pickle")
            with pytest.raises(channel.ChannelTypeError):
                reader.get(0)
            assert reader.get(0) is None


def test_what_had_no_memory_is_the_next_calls() -> None:
    # In a process of its own: the heap of this one may have room.
    script = """
import resource
from ivshmem import Directory, Region, channel
with Region.create("128M") as region:
    Directory.create(region, channels="120M").close()
    with channel.open(region) as channels:
        messages = channels.create_messages("a", limit=33 << 20, slots=1, writers=1, readers=1)
        with messages.writer() as writer, messages.reader() as reader:
            with writer.loan() as loan, memoryview(loan) as content:
                content[0] = 7
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (1 << 20, before[1]))
            try:
                raise SystemExit(f"got {reader.get(0)[:1]}")
            except MemoryError:
                resource.setrlimit(resource.RLIMIT_AS, before)
            assert reader.get(0)[0] == 7
            assert reader.lost == 0
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, timeout=PATIENCE)
    assert ended.returncode == 0


@pytest.mark.parametrize("taken", [False, True])
def test_a_signal_during_a_cancel_leaves_no_call(channels: Channels, taken: bool) -> None:
    # The handler runs in the first code of Python's that cancel() calls, if there is any.
    calls = channels.create_calls("a", limit=8, slots=1)

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGUSR1, late)
    try:
        with calls.caller() as caller, calls.server() as server:
            pending = caller.submit(b"x", 0)
            call = server.take(0) if taken else None
            steps = [functools.partial(_thread.interrupt_main, signal.SIGUSR1), pending.cancel]
            with pytest.raises(Late):
                list(map(operator.methodcaller("__call__"), steps))  # no bytecode between them
            with pytest.raises(channel.CallFailed, match="it was cancelled"):
                pending.result(0)
            if call is not None:
                call.reply(b"y")
            caller.submit(b"z", 0)  # its slot is free
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_threads_close_of_an_end(channels: Channels) -> None:
    room = channels.create_bytes("a")
    listener = room.listen()
    stream = room.connect()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            stream.recv(1)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.01)  # as above
    stream.close()
    thread.join(PATIENCE)
    assert [str(error) for error in raised] == ["this Stream of 'a' is closed"]
    listener.close()


def test_asyncio_tasks_hear_of_close(region: Region) -> None:
    async def main(what: Callable[[Channels], object]) -> None:
        channels = channel.open(region)
        name = f"a{id(channels)}"
        reader = channels.create_messages(name, limit=8).reader()
        task = asyncio.ensure_future(reader.get_async())
        await asyncio.sleep(0.01)
        what(channels)
        with pytest.raises(ClosedError):
            await asyncio.wait_for(task, PATIENCE)
        channels.close()

    asyncio.run(main(Channels.close))
    asyncio.run(main(lambda _: region.close()))


def test_what_is_collected_is_closed(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=1, writers=1, readers=1)
    for _ in range(3):
        messages.reader("block")
        writer = messages.writer()
        assert [writer.put(b"x", 0), writer.put(b"y", 0)] == [0, 0]
        del writer
    room = channels.create_bytes("b", connections=1)
    listener = room.listen()
    for _ in range(3):
        room.connect()
        assert listener.accept(0).recv(1) == b""  # type: ignore[union-attr]
    queue = channels.create_queue("c", limit=8, readers=1)
    queue.writer().put(b"x")
    assert bytes(queue.reader().take(0)) == b"x"  # type: ignore[arg-type]
    assert queue.reader().get(0) == b"x"


def test_cycles_of_everything(region: Region) -> None:
    channels = channel.open(region)
    messages = channels.create_messages("a", limit=8)
    queue = channels.create_queue("b", limit=8)
    calls = channels.create_calls("c", limit=8)
    writer, reader = messages.writer(), messages.reader()
    writer.put(b"x")
    work = queue.writer()
    work.put(b"y")
    caller = calls.caller()
    everything: list[Any] = [
        channels, messages, queue, writer, reader, reader.view(0), writer.loan(), work,
        queue.reader().take(0), caller, caller.submit(b"z"), calls.server().take(0),
    ]  # fmt: skip
    everything += [memoryview(everything[6]), memoryview(everything[5]), everything]
    gone = weakref.ref(channels)
    thread = channels._thread
    del channels, messages, queue, calls, writer, reader, work, caller, everything
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    assert gone() is None
    thread.join(PATIENCE)
    with channel.open(region) as again:
        assert len(again.places()) == 1


def test_a_loan_in_use_keeps_its_writer(region: Region, channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, writers=1)
    writer = messages.writer()
    loan = writer.loan()
    buffer = memoryview(loan)
    with pytest.raises(BufferError, match="1 memoryview or arrays of loans are in use"):
        writer.close()
    buffer[:1] = b"x"
    with pytest.raises(BufferError):
        channels.close()
    # The place is this process's until no store can come.
    with channel.open(region) as other:
        assert len(other.places()) == 2
        with pytest.raises(channel.ChannelError, match="its only writer is open"):
            other.open("a").writer()  # type: ignore[attr-defined]
        buffer.release()
        until(lambda: len(other.places()) == 1, "the place was freed")
        other.open("a").writer().put(b"y")  # type: ignore[attr-defined]


def test_close_during_large_copies(region: Region) -> None:
    """Another writer never gets a cell that a copy without the GIL still writes to."""
    data = bytes(LARGE)
    for turn in range(6):
        channels = channel.open(region)
        messages = channels.create_messages("a", limit=LARGE, slots=2, overflow="overwrite")
        writer, reader = messages.writer(), messages.reader()

        def work(call: Callable[..., object], *args: bytes) -> None:
            with contextlib.suppress(ClosedError):
                while True:
                    call(*args)

        threads = [
            threading.Thread(target=work, args=(writer.put, data)),
            threading.Thread(target=work, args=(reader.get,)),
        ]
        for thread in threads:
            thread.start()
        assert messages.reader().get(PATIENCE) == data
        (writer if turn % 2 else channels).close()
        threads[0].join(PATIENCE)
        channels.close()
        threads[1].join(PATIENCE)
        with channel.open(region) as again:
            again.remove("a")


def test_a_forked_child_changes_nothing(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=1)
    queue = channels.create_queue("b", limit=8)
    calls = channels.create_calls("c", limit=8)
    writer, reader = messages.writer(), messages.reader("block")
    things: dict[str, Any] = {}
    writer.put(b"x")
    things["view"] = reader.view(0)
    with queue.writer() as one:
        one.put(b"y")
    things["taken"] = queue.reader().take(0)
    things["pending"] = calls.caller().submit(b"z")
    things["call"] = calls.server().take(0)
    assert in_child(things.clear) == 0
    with pytest.raises(TimeoutError):
        writer.put(b"w", 0)  # the view still holds it
    assert queue.reader().get(0) is None
    things["call"].reply(b"ok")
    assert things["pending"].result(PATIENCE) == b"ok"
    things["taken"].done()
    things["view"].release()
    writer.put(b"w", PATIENCE)


@pytest.mark.parametrize("begin", BLOCKED, ids=_names)
def test_a_forked_child_is_told_at_each_call(
    channels: Channels, begin: Callable[[Channels], Any]
) -> None:
    call = begin(channels)

    def work() -> None:
        with pytest.raises(RuntimeError, match="a forked child may only close what it has of"):
            call()

    assert in_child(work) == 0


def test_a_forked_child_opens_channels_of_its_own(region: Region, channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8)
    reader = messages.reader()
    fds = len(os.listdir("/proc/self/fd"))

    def work() -> None:
        channels.close()
        with channel.open(region) as own:
            own.open("a").writer().put(b"x")  # type: ignore[attr-defined]
        assert len(os.listdir("/proc/self/fd")) < fds

    assert in_child(work) == 0
    assert reader.get(PATIENCE) == b"x"


def test_a_zombie_has_ended(region: Region, channels: Channels) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            own = channel.open(region)
            assert len(own.places()) == 2
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        until(lambda: len(channels.places()) == 1, "the place was freed")
    finally:
        os.waitpid(pid, 0)


def test_a_failure_in_the_middle_leaves_nothing(
    region: Region, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(MemoryError):
            channel.open(region)
    assert len(channels.places()) == 1
    messages = channels.create_messages("a", limit=8, writers=1, readers=1)
    room = channels.create_bytes("b", listeners=1, connections=1)
    with monkeypatch.context() as patch:
        patch.setattr(weakref, "ref", fail)
        for make in (messages.writer, messages.reader, room.listen):
            with pytest.raises(MemoryError):
                make()
    messages.writer().put(b"x")
    messages.reader()
    with room.listen():
        with monkeypatch.context() as patch:
            patch.setattr(weakref, "ref", fail)
            with pytest.raises(MemoryError):
                room.connect()


def test_the_interpreter_ends_with_everything_open() -> None:
    code = """if True:
        import threading
        from ivshmem import Directory, Region, channel
        region = Region.create("16M")
        Directory.create(region, channels="8M").close()
        channels = channel.open(region)
        messages = channels.create_messages("a", limit=8)
        writer, reader = messages.writer(), messages.reader()
        writer.put(b"x")
        view, loan = reader.view(), writer.loan()
        buffers = memoryview(view), memoryview(loan)
        pending = channels.create_calls("b", limit=8).caller().submit(b"x")
        room = channels.create_bytes("c")
        listener, stream = room.listen(), room.connect()
        for call in (reader.get, stream.recv, pending.result, listener.accept, listener.accept):
            args = (1,) if call == stream.recv else ()
            threading.Thread(target=call, args=args, daemon=True).start()
    """
    made = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (made.returncode, made.stderr) == (0, "")


def test_threads_share_an_end(channels: Channels) -> None:
    """Several threads at one writer and one reader, with copies without the GIL: none is lost."""
    for name in ("a", "b"):
        make = channels.create_messages if name == "a" else channels.create_queue
        one = make(name, limit=LARGE, slots=2, writers=1)
        writer, reader = one.writer(), one.reader()
        got: list[bytes] = []

        def write(number: int, writer: Any = writer) -> None:
            for i in range(40):
                writer.put(b"%d.%d " % (number, i) + bytes(LARGE // 2 if i % 4 == 0 else 0))

        def read(reader: Any = reader, got: list[bytes] = got) -> None:
            while (message := reader.get(PATIENCE)) != b"end":
                got.append(message.split(b" ")[0])

        writers = [threading.Thread(target=write, args=(i,)) for i in range(3)]
        readers = [threading.Thread(target=read) for _ in range(3)]
        for thread in writers + readers:
            thread.start()
        for thread in writers:
            thread.join(PATIENCE)
        for _ in readers:
            writer.put(b"end")
        for thread in readers:
            thread.join(PATIENCE)
        assert sorted(got) == sorted(b"%d.%d" % (i, j) for i in range(3) for j in range(40))


def test_asyncio_where_nothing_rings(channels: Channels) -> None:
    calls = channels.create_calls("a", limit=8, slots=1)
    room = channels.create_bytes("b", buffer=64)

    async def main() -> None:
        with calls.server() as server, calls.caller() as caller:
            thread = threading.Thread(target=server.serve, args=(bytes, 0.2))
            thread.start()
            began = time.monotonic()
            for _ in range(3):  # with its only slot in use
                assert await caller.call_async(b"x", PATIENCE) == b"x"
            assert time.monotonic() - began < PATIENCE / 2
            thread.join()
        with room.listen() as listener, room.connect() as stream:
            other = listener.accept(0)
            assert other is not None

            def drain() -> None:
                count = 0
                while count < 500:
                    count += len(other.recv(100))

            thread = threading.Thread(target=drain)
            thread.start()
            await stream.sendall_async(bytes(500), PATIENCE)
            thread.join()
            other.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": 0},
        {"slots": -1},
        {"slots": 1 << 40},
        {"writers": 0},
        {"writers": -1},
        {"readers": 1 << 40},
        {"loans": -1},
        {"views": 0},
        {"limit": 0},
        {"limit": 1 << 40},
        {"overflow": ()},
        {"schema": "\0"},
    ],
)
def test_numbers_that_are_not_allowed(channels: Channels, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        channels.create_messages("a", **{"limit": 8, **wrong})
    assert channels.list() == []


def test_types_that_are_wrong(region: Region, channels: Channels) -> None:
    for wrong in ({"limit": 1.5}, {"limit": "x"}, {"schema": 5}, {"writers": "x"}):
        with pytest.raises(TypeError):
            channels.create_messages("a", **{"limit": 8, **wrong})  # type: ignore[arg-type]
    for place in (None, "x", 5):
        with pytest.raises(TypeError, match="channels are those of an endpoint or a region"):
            channel.open(place)  # type: ignore[arg-type]
    for times in ({"beat": 1e-9}, {"lease": float("inf")}, {"beat": -1.0}, {"beat": 0.5}):
        with pytest.raises(ValueError, match="lease"):
            channel.open(region, **times)  # type: ignore[arg-type]
    with channel.open(region, name="\udcff\0x" * 40):
        pass
