"""Each kind of channel between ends of one process, and of several."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.waiting import PATIENCE, Background, until

from ivshmem import ClosedError, Directory, Region, channel
from ivshmem.channel import Channels, streams


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("16M") as region:
        Directory.create(region, channels="8M").close()
        yield region


@pytest.fixture
def channels(region: Region) -> Iterator[Channels]:
    with channel.open(region) as channels:
        yield channels


def child(region: Region, work: Callable[[Channels], object]) -> int:
    """Run `work` in a process of its own, which ends by SIGKILL; return its PID.

    It has the memory by its descriptor, as a process has it that was started by itself.
    """
    fd = os.dup(region.fileno())
    pid = os.fork()
    if pid == 0:
        try:
            own = Region.from_fd(fd)
            work(channel.open(own))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(fd)
    return pid


# -- messages -------------------------------------------------------------------------------------


def test_each_reader_gets_every_message(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=100, slots=8)
    with messages.writer() as one, messages.writer() as two, messages.reader() as reader:
        with messages.reader() as other:
            one.put(b"one")
            two.put(memoryview(b"two"))
            assert {reader.get(0), reader.get(0)} == {b"one", b"two"}
            assert {other.get(0), other.get(0)} == {b"one", b"two"}
            assert reader.get(0) is None


def test_a_reader_that_blocks_holds_its_writers_up(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=4)
    with messages.writer() as writer, messages.reader("block") as reader:
        for i in range(4):
            writer.put(b"%d" % i)
        with pytest.raises(TimeoutError, match="channel 'a' is full"):
            writer.put(b"4", 0)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"took nothing for 0\.05 s"):
            writer.put(b"4", 0.05)
        assert time.monotonic() - began >= 0.05
        threading.Timer(0.02, reader.get).start()
        writer.put(b"4", PATIENCE)
        assert [reader.get(PATIENCE) for _ in range(4)] == [b"1", b"2", b"3", b"4"]


def test_a_reader_that_overwrites_is_told_what_it_lost(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=4)
    with messages.writer() as writer, messages.reader("overwrite") as reader:
        for i in range(10):
            writer.put(b"%d" % i, 0)
        assert [reader.get(0) for _ in range(4)] == [b"6", b"7", b"8", b"9"]
        assert reader.lost == 6


def test_a_reader_that_discards_keeps_the_oldest(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=4, overflow="discard")
    with messages.writer() as writer, messages.reader() as reader:
        assert [writer.put(b"%d" % i, 0) for i in range(6)] == [0, 0, 0, 0, 1, 1]
        assert writer.missed == 2
        assert [reader.get(0) for _ in range(5)] == [b"0", b"1", b"2", b"3", None]


def test_a_reader_that_polls_frees_the_slots_of_writers_that_ended(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=64, writers=2)
    with messages.reader("block") as reader:
        for i in range(6):
            with messages.writer() as writer:
                writer.put(b"%d" % i)
            assert reader.get(0) == b"%d" % i
            assert reader.get(0) is None


def test_a_late_reader_gets_history(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=8)
    with messages.writer() as writer:
        for i in range(5):
            writer.put(b"%d" % i)
        with messages.reader(history=2) as reader:
            assert [reader.get(0) for _ in range(3)] == [b"3", b"4", None]


def test_a_late_reader_gets_what_a_former_owner_of_the_slot_wrote(channels: Channels) -> None:
    """Processes that put one message each, as a command line does."""
    messages = channels.create_messages("a", limit=8, slots=4, writers=1)
    for i in range(10):
        with messages.writer() as writer:
            with messages.reader(history=3) as reader:
                there = [reader.get(0) for _ in range(4)]
            assert there == [*[b"%d" % j for j in range(max(0, i - 3), i)], *[None] * 4][:4]
            with messages.reader("block", history=3) as reader:
                writer.put(b"%d" % i)
                assert [*iter(lambda reader=reader: reader.get(0), None)][-1] == b"%d" % i  # type: ignore[misc]
                assert reader.lost == 0


def test_cells_of_former_owners_are_used_again(channels: Channels) -> None:
    """Loans that were dropped, and messages of many owners, in readers that drop the newest too."""
    messages = channels.create_messages(
        "a", limit=8, slots=4, loans=2, writers=1, overflow=("overwrite", "discard")
    )
    number = 0
    for _ in range(8):
        with messages.writer() as writer, messages.reader("discard") as discards:
            with pytest.raises(KeyError), writer.loan(8), writer.loan(8):
                raise KeyError
            for _ in range(6):
                with writer.loan(8) as one, writer.loan(8) as two:
                    memoryview(one)[:] = memoryview(two)[:] = b"%08d" % number
                number += 1
            assert discards.get(0) == b"%08d" % (number - 6)
            with messages.reader("overwrite", history=3) as reader:
                got = [reader.get(0) for _ in range(3)]
            assert got == [b"%08d" % (number - k) for k in (2, 1, 1)]


def test_history_that_is_not_there_is_not_lost(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=8)
    with messages.reader(history=7) as reader:
        assert reader.get(0) is None
        with messages.writer() as writer:
            writer.put(b"1")
            with messages.reader(history=7) as late:
                assert [late.get(0), late.get(0)] == [b"1", None]
        assert (reader.get(0), reader.lost, late.lost) == (b"1", 0, 0)


def test_a_spoiled_word_is_named_and_whose_it_is(region: Region, channels: Channels) -> None:
    """The other writers' messages are read as before."""
    messages = channels.create_messages("a", limit=8, slots=8, writers=2)
    with (
        channel.open(region, name="bad\n") as other,
        other.open("a").writer() as bad,  # type: ignore[attr-defined]
        messages.writer() as good,
        messages.reader() as reader,
    ):
        for _ in range(5):
            bad.put(b"bad")
        (place,) = (each.place for each in channels.places() if "bad" in each.name)
        words = memoryview(region.read(0, len(region))).cast("Q")
        heads = [8 * i for i, word in enumerate(words) if word == 5 << 24 | 1]
        assert len(heads) == 1
        region.write(heads[0], ((1 << 39) + 9 << 24 | 1).to_bytes(8, "little"))
        owner = rf"belongs to place {place} \(process {os.getpid()}, 'bad\\\\n'\)"
        with pytest.raises(
            channel.ChannelCorrupt, match=rf"'a': the head at {heads[0]:#x}, .*{owner}"
        ):
            reader.get(0)
        good.put(b"good")
        assert reader.get(0) == b"good"


def test_loans_and_views_copy_nothing(region: Region, channels: Channels) -> None:
    messages = channels.create_messages("a", limit=100)
    with messages.writer() as writer, messages.reader() as reader:
        with writer.loan(5) as loan:
            memoryview(loan)[:] = b"abcde"
        view = reader.view(0)
        assert view is not None
        with view:
            assert bytes(view) == b"abcde"
            assert view.offset % 64 == 0
            region.write(view.offset, b"X")
            assert bytes(view) == b"Xbcde"
            assert memoryview(view).readonly
        with pytest.raises(KeyError), writer.loan(5):
            raise KeyError
        assert reader.get(0) is None
        with pytest.raises(ClosedError, match="released"):
            memoryview(view)


def test_a_view_that_is_overtaken(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=2)
    with messages.writer() as writer, messages.reader("overwrite") as reader:
        writer.put(b"0")
        view = reader.view(0)
        assert view is not None
        for i in range(4):
            writer.put(b"%d" % i)
        with pytest.raises(channel.Overtaken, match="channel 'a': the writer overwrote message 0"):
            view.release()
        view.release()


def test_buffers_keep_what_they_show(region: Region, channels: Channels) -> None:
    messages = channels.create_messages("a", limit=100)
    with messages.writer() as writer, messages.reader() as reader:
        loan = writer.loan(5)
        buffer = memoryview(loan)
        with pytest.raises(BufferError, match="1 memoryview"):
            loan.publish()
        buffer.release()
        loan.publish()
        view = reader.view(0)
        assert view is not None
        buffer = memoryview(view)
        with pytest.raises(BufferError, match="1 memoryview"):
            view.release()
        with pytest.raises(BufferError, match="1 view of messages"):
            reader.close()
        with pytest.raises(BufferError):
            region.close()
        buffer.release()
        view.release()


def test_rows(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=4, slots=8)
    with messages.writer() as writer, messages.reader() as reader:
        rows = memoryview(bytes(range(24))).cast("B", (6, 4))
        assert writer.put_rows(rows) == 6
        into = bytearray(40)
        assert reader.get_rows(memoryview(into).cast("B", (10, 4)), 0) == 6
        assert into[:24] == bytes(range(24))
        assert reader.get_rows(memoryview(into).cast("B", (10, 4)), 0) == 0
        assert writer.put_rows(memoryview(bytes(48)).cast("B", (12, 4)), 0) == 8


def table(rows: int) -> memoryview:
    data = b"".join(i.to_bytes(4, "little") for i in range(rows))
    return memoryview(data).cast("B", (rows, 4))


def test_rows_have_one_time_limit(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=4, slots=4)
    with messages.writer() as writer, messages.reader("block") as reader:

        def read_slowly() -> None:
            for _ in range(8):
                time.sleep(0.1)
                reader.get(0)

        reading = Background(read_slowly)
        assert 4 <= writer.put_rows(table(12), 0.25) < 9  # each room came in 0.1 s
        reading.result()


def test_rows_of_asyncio_are_all_published(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=4, slots=4)
    got = bytearray(80)

    async def work() -> None:
        with messages.writer() as writer, messages.reader("block") as reader:
            putting = asyncio.ensure_future(writer.put_rows_async(table(20), PATIENCE))
            into = memoryview(got).cast("B", (20, 4))
            done = 0
            while done < 20:
                done += await reader.get_rows_async(into[done:], PATIENCE)
            assert await putting == 20
            assert got == table(20).tobytes()
            assert await writer.put_rows_async(table(20), 0.01) == 4
            with pytest.raises(TimeoutError):
                await writer.put_rows_async(table(20), 0.01)
            none: Any = into[20:]
            assert await asyncio.wait_for(reader.get_rows_async(none), PATIENCE) == 0
            while reader.get(0):
                pass
            parts = (part for part in (b"a", b"b"))
            writer.put_rows(table(4), 0)
            putting = asyncio.ensure_future(writer.put_parts_async(parts, PATIENCE))
            await asyncio.sleep(0)  # it has no room yet
            for _ in range(4):
                reader.get(0)
            await putting
            assert reader.get(0) == b"ab"

    asyncio.run(work())


def test_a_message_that_does_not_fit_waits(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=100)
    with messages.writer() as writer, messages.reader() as reader:
        with pytest.raises(channel.MessageTooLong, match="101 bytes, and its limit is 100"):
            writer.put(bytes(101))
        writer.put(b"abc")
        with pytest.raises(channel.MessageTooLong, match="3 bytes, and the buffer has 2"):
            reader.get_into(bytearray(2))
        buffer = bytearray(3)
        assert reader.get_into(buffer, 0) == 3
        assert buffer == b"abc"
        assert reader.get_into(buffer, 0) is None


# -- the others -----------------------------------------------------------------------------------


def test_a_queue_gives_each_message_to_one(channels: Channels) -> None:
    queue = channels.create_queue("a", limit=8)
    with queue.writer() as writer, queue.reader() as one, queue.reader() as two:
        for i in range(4):
            writer.put(b"%d" % i)
        assert [one.get(0), two.get(0)] == [b"0", b"1"]
        with one.take(0) as taken:  # type: ignore[union-attr]
            assert (bytes(taken), taken.redelivered) == (b"2", False)
        with pytest.raises(KeyError), two.take(0):  # type: ignore[union-attr]
            raise KeyError
        taken = one.take(0)
        assert taken is not None
        assert (bytes(taken), taken.redelivered) == (b"3", True)
        taken.done()
        taken.done()
        assert one.get(0) is two.get(0) is None


def test_a_value_has_the_latest_content(channels: Channels) -> None:
    value = channels.create_value("a", limit=8)
    with value.writer() as writer, value.reader() as reader:
        assert reader.get() is None
        writer.put(b"1")
        writer.put(b"2")
        assert reader.wait_changed(0) == b"2"
        assert reader.wait_changed(0) is None
        assert reader.get() == b"2"
    with value.reader() as reader:
        assert reader.get() == b"2"
        with value.writer() as writer:
            assert reader.get() == b"2"
            threading.Timer(0.02, writer.put, [b"3"]).start()
            assert reader.wait_changed(PATIENCE) == b"3"


def test_calls_have_replies(channels: Channels) -> None:
    calls = channels.create_calls("a", limit=64)

    def work(request: bytes) -> bytes:
        if request == b"bad":
            raise ValueError("not this\x1b[2J")
        return request.upper()

    with calls.server() as server, calls.caller() as caller:
        thread = threading.Thread(target=server.serve, args=(work, 0.2))
        thread.start()
        pending = [caller.submit(b"x%d" % i) for i in range(5)]
        assert [each.result(PATIENCE) for each in pending] == [b"X%d" % i for i in range(5)]
        with pytest.raises(channel.CallFailed, match=r"ValueError: not this\\x1b") as error:
            caller.call(b"bad", PATIENCE)
        assert "\x1b" not in str(error.value)
        thread.join()
        with pytest.raises(TimeoutError, match="no server has begun with it"):
            caller.call(b"late", 0.02)
        held = server.take(0)
        assert held is None  # a call that was given up is not served


def test_connections_work_as_sockets(channels: Channels) -> None:
    room = channels.create_bytes("a", buffer=64)
    with pytest.raises(ConnectionRefusedError, match="no process listens"):
        room.connect()
    with room.listen() as listener, room.connect() as caller:
        caller.sendall(b"before it is accepted")
        with listener.accept(0) as server:  # type: ignore[union-attr]
            assert server.recv(100) == b"before it is accepted"
            data = os.urandom(10000)
            sender = threading.Thread(target=caller.sendall, args=(data,))
            sender.start()
            got = b""
            while len(got) < len(data):
                got += server.recv(1000)
            sender.join()
            assert got == data
            caller.shutdown(1)
            assert server.recv(1) == b""
            server.sendall(b"one\ntwo\n")
        with caller.makefile("r") as lines:
            assert list(lines) == ["one\n", "two\n"]
        with pytest.raises(BrokenPipeError):
            caller.send(b"x")


@pytest.mark.parametrize("first", ["listener", "caller"])
def test_a_connection_that_was_never_accepted_comes_back(channels: Channels, first: str) -> None:
    room = channels.create_bytes("a", buffer=64, connections=1)
    for _ in range(3):
        ends = {"listener": room.listen(), "caller": room.connect()}
        ends.pop(first).close()
        ends.popitem()[1].close()


def test_a_listener_that_is_started_again_gets_those_that_wait(channels: Channels) -> None:
    room = channels.create_bytes("a", buffer=64)
    listener = room.listen()
    with room.connect() as caller:
        caller.sendall(b"a")
        listener.close()
        with room.listen() as again, again.accept(0) as stream:  # type: ignore[union-attr]
            assert stream.recv(1) == b"a"


def test_limits_of_connections(channels: Channels) -> None:
    room = channels.create_bytes("a", buffer=64, connections=1)
    with room.listen() as listener, room.connect() as caller:
        with pytest.raises(channel.ChannelError, match="its only connection is in use"):
            room.connect()
        caller.settimeout(0)
        with pytest.raises(BlockingIOError):
            caller.recv(1)
        caller.settimeout(0.02)
        with pytest.raises(TimeoutError):
            caller.recv(1)
        with pytest.raises(TimeoutError):
            caller.sendall(bytes(100))
        assert listener.accept(0) is not None
        assert listener.accept(0) is None


# -- asyncio, and loops of others -----------------------------------------------------------------


def test_asyncio(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=4)
    calls = channels.create_calls("b", limit=8)
    room = channels.create_bytes("c")

    async def double(request: bytes) -> bytes:
        await asyncio.sleep(0)
        return request * 2

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with messages.writer() as writer, messages.reader() as reader:
            loop.call_later(0.02, writer.put, b"x")
            assert await reader.get_async(PATIENCE) == b"x"
            assert await reader.get_async(0.01) is None
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(reader.get_async(), 0.01)

            async def produce() -> None:
                for i in range(50):
                    await writer.put_async(b"%d" % i)

            producer = asyncio.ensure_future(produce())
            got = []
            async for message in reader:
                got.append(message)
                if len(got) == 50:
                    break
            await producer
            assert got == [b"%d" % i for i in range(50)]
        with calls.server() as server, calls.caller() as caller:
            serving = asyncio.ensure_future(server.serve_async(double))
            asked = [caller.call_async(b"%d" % i, PATIENCE) for i in range(10)]
            assert await asyncio.gather(*asked) == [b"%d%d" % (i, i) for i in range(10)]
            assert await caller.submit(b"z") == b"zz"
            serving.cancel()
        with room.listen() as listener:
            caller_end = await room.connect_async()
            server_end = await listener.accept_async(PATIENCE)
            assert server_end is not None
            await caller_end.sendall_async(b"hello")
            assert await server_end.recv_async(10) == b"hello"
            caller_end.close()
            assert await server_end.recv_async(10) == b""
            server_end.close()

    asyncio.run(main())


def test_a_descriptor_for_other_loops(channels: Channels) -> None:
    import select

    messages = channels.create_messages("a", limit=8)
    with messages.writer() as writer, messages.reader() as reader:
        poll = select.poll()
        poll.register(reader.fileno(), select.POLLIN)
        while poll.poll(0):
            assert reader.get(0) is None
        for i in range(3):
            writer.put(b"%d" % i)
            assert poll.poll(PATIENCE * 1000)
            assert reader.get(0) == b"%d" % i
            assert reader.get(0) is None
            until(lambda: not poll.poll(0) or reader.get(0), "quiet")


# -- several processes ----------------------------------------------------------------------------


def test_a_reader_of_a_queue_that_dies(region: Region, channels: Channels) -> None:
    queue = channels.create_queue("a", limit=8)
    with queue.writer() as writer, queue.reader() as reader:
        writer.put(b"x")

        def work(own: Channels) -> None:
            taken = own.open("a").reader().take(PATIENCE)  # type: ignore[attr-defined]
            own.open("b").writer().put(bytes(taken))  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)

        told = channels.create_messages("b", limit=8).reader()
        os.waitpid(child(region, work), 0)
        assert told.get(PATIENCE) == b"x"
        taken = reader.take(PATIENCE)
        assert taken is not None
        assert (bytes(taken), taken.redelivered) == (b"x", True)
        taken.done()
        until(lambda: len(channels.places()) == 1, "its place was freed")


def test_a_connection_whose_other_end_dies(region: Region, channels: Channels) -> None:
    room = channels.create_bytes("a")
    with room.listen() as listener:

        def work(own: Channels) -> None:
            stream = own.open("a").connect()  # type: ignore[attr-defined]
            stream.sendall(b"bye")
            os.kill(os.getpid(), signal.SIGKILL)

        os.waitpid(child(region, work), 0)
        stream = listener.accept(PATIENCE)
        assert stream is not None
        assert stream.recv(10) == b"bye"
        stream.settimeout(PATIENCE)
        with pytest.raises(ConnectionResetError, match="the other end is gone"):
            stream.recv(10)


def test_a_server_that_dies(region: Region, channels: Channels) -> None:
    calls = channels.create_calls("a", limit=8)
    with calls.caller() as caller:
        pending = caller.submit(b"x")

        def work(own: Channels) -> None:
            call = own.open("a").server().take(PATIENCE)  # type: ignore[attr-defined]
            assert bytes(call) == b"x"
            os.kill(os.getpid(), signal.SIGKILL)

        os.waitpid(child(region, work), 0)
        with pytest.raises(channel.ServerLost, match="whether it did the work is not known"):
            pending.result(PATIENCE)


def test_a_forked_child_may_only_close(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8)
    with messages.writer() as writer, messages.reader() as reader:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for use in (lambda: writer.put(b"x"), lambda: reader.get(0), channels.list):
                    with pytest.raises(RuntimeError, match="forked child"):
                        use()
                reader.close()
                channels.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        writer.put(b"y")
        assert reader.get(0) == b"y"


# -- names and ends -------------------------------------------------------------------------------


def test_names_and_types(channels: Channels) -> None:
    channels.create_value("a", dtype="<f4", shape=(2, 3))
    with pytest.raises(channel.ChannelExists, match="there is a channel 'a' already"):
        channels.create_value("a", limit=3)
    assert channels.create_value("a", dtype="<f4", shape=(2, 3), exist_ok=True).limit == 24
    with pytest.raises(channel.ChannelTypeError, match=r"'array <f4 2x3'.*'array <f8 2x3'"):
        channels.create_value("a", dtype="<f8", shape=(2, 3), exist_ok=True)
    with pytest.raises(channel.ChannelTypeError, match="of kind value, not queue"):
        channels.open("a", "queue")
    assert channels.open("a", "value", dtype="<f4", shape=(2, 3)).limit == 24
    with pytest.raises(channel.ChannelTypeError, match=r"of type 'array <f4 2x3', not 'array <f4"):
        channels.open("a", dtype="<f4", shape=(3, 2))
    with pytest.raises(channel.NoSuchChannel, match="no channel 'b' \\(there: a\\)"):
        channels.open("b")
    with pytest.raises(channel.NoSuchChannel, match=r"no channel 'a\\x00' \(there: a\)"):
        channels.open("a\0")
    channels.remove("a")
    assert channels.list() == []


def test_what_does_not_pass_ends_a_wait_for_a_listener(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a listener, and for a connection that is free; not for a spoiled word."""
    errors = [channel.ChannelCorrupt("spoiled"), channel.ChannelError(), ConnectionRefusedError()]

    def connect(*_: object) -> object:
        raise errors.pop()

    monkeypatch.setattr(streams, "connect", connect)
    with pytest.raises(channel.ChannelCorrupt, match="spoiled"):
        channels.create_bytes("a").connect(wait_for_listener=True, timeout=PATIENCE)
    assert errors == []


MADE: dict[str, Any] = {"limit": 8, "overflow": "block", "views": 2}
DIFFER: dict[str, tuple[Any, str]] = {
    "limit": (9, "limit 8 and not 9"),
    "slots": (32, "slots 16 and not 32"),
    "writers": (2, "writers 4 and not 2"),
    "readers": (2, "readers 8 and not 2"),
    "loans": (4, "loans 1 and not 4"),
    "views": (3, "views 2 and not 3"),
    "overflow": (("block", "discard"), "overflow block and not block, discard"),
    "times": (True, "times False and not True"),
    "ring_always": (True, "ring_always False and not True"),
}


@pytest.mark.parametrize("what", DIFFER)
def test_a_channel_that_is_there_and_differs(channels: Channels, what: str) -> None:
    channels.create_messages("a", **MADE)
    channels.create_messages("a", **MADE, exist_ok=True)
    wanted, said = DIFFER[what]
    with pytest.raises(channel.ChannelExists, match=f"^channel 'a' is there, with {said}$"):
        channels.create_messages("a", **{**MADE, what: wanted}, exist_ok=True)


def test_a_channel_of_another_kind_that_differs(channels: Channels) -> None:
    """The words are those of its arguments."""
    channels.create_bytes("bytes", buffer=64)
    with pytest.raises(channel.ChannelExists, match="buffer 64 and not 128"):
        channels.create_bytes("bytes", buffer=100, exist_ok=True)
    channels.create_calls("calls", limit=8)
    with pytest.raises(channel.ChannelExists, match="callers 8 and not 2"):
        channels.create_calls("calls", limit=8, callers=2, exist_ok=True)


@pytest.mark.parametrize(
    ("kind", "numbers", "said"),
    [
        ("messages", {"writers": 0}, "writers 0: 1 to 64 are possible"),
        ("messages", {"writers": 65}, "writers 65: 1 to 64 are possible"),
        ("messages", {"readers": 65}, "readers 65: 0 to 64 are possible"),
        ("messages", {"slots": 0}, "slots 0: 1 or more are needed"),
        ("messages", {"slots": 1 << 20}, "slots 1048576: 1 to 65536 are possible"),
        ("messages", {"loans": 256}, "loans 256: 0 to 255 are possible"),
        ("messages", {"loans": -1}, "loans -1: 0 to 255 are possible"),
        ("messages", {"views": 99}, "views 99: 1 to 16 are possible"),
        ("messages", {"views": 0}, "views 0: 1 to 16 are possible"),
        ("messages", {"slots": 1 << 16, "overflow": "discard"}, "131072 cells"),
        ("calls", {"callers": 65}, "callers 65: 1 to 64 are possible"),
        ("calls", {"servers": 65}, "servers 65: 0 to 64 are possible"),
        ("bytes", {"connections": 4097}, "connections 4097: 1 to 4096 are possible"),
        ("bytes", {"listeners": 0}, "listeners 0: 1 to 64 are possible"),
        ("bytes", {"buffer": 1 << 31}, "buffer 2147483648: 64 to 1073741824 are possible"),
    ],
)
def test_a_number_that_is_not_allowed(
    channels: Channels, kind: str, numbers: dict[str, Any], said: str
) -> None:
    limit = {} if kind == "bytes" else {"limit": 8}
    with pytest.raises(ValueError, match=said):
        getattr(channels, f"create_{kind}")("a", **limit, **numbers)
    assert channels.list() == []


def test_a_name_that_is_taken(region: Region, channels: Channels) -> None:
    """The error says by whom, as far as the memory tells."""

    def error() -> str:
        with pytest.raises(channel.ChannelExists) as raised:
            channels.create_queue("a", limit=8)
        return str(raised.value)

    with channel.open(region, name="maker\x1b[2J") as maker:
        place = next(each for each in channels.places() if "maker" in each.name)
        made = maker.create_messages("a", limit=8)
        with maker.create_messages("b", limit=8).writer():
            assert error() == (
                f"there is a channel 'a' already, made by place {place.place} (process"
                f" {os.getpid()}, 'maker\\\\x1b[2J')"
            )
    assert made.name == "a"
    with channel.open(region, name="user") as user:
        place = next(each for each in channels.places() if each.name == "user")
        with user.open("a", "messages").reader():  # type: ignore[attr-defined]
            assert error() == (
                "there is a channel 'a' already, made by a process that has left, used by place"
                f" {place.place} (process {os.getpid()}, 'user')"
            )
    assert error() == (
        "there is a channel 'a' already, made by a process that has left, used by nobody:"
        " `ivshmem channel rm a` removes it"
    )
    channels.remove("a")  # as that command does
    assert channels.create_queue("a", limit=8).kind == "queue"


def test_a_channel_in_use_is_not_removed(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8)
    with messages.reader() as reader:
        with pytest.raises(channel.ChannelError, match="channel 'a' is in use"):
            messages.remove()
        [info] = channels.list()
        assert [each.state for each in info.readers] == ["open"]
        assert reader.get(0) is None
    messages.remove()
    with pytest.raises(ClosedError, match="channel 'a' was removed"):
        messages.reader()


def test_close_ends_what_waits(channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8)
    reader = messages.reader()
    raised = []

    def wait() -> None:
        with pytest.raises(ClosedError) as error:
            reader.get()
        raised.append(error.value)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    channels.close()
    thread.join(PATIENCE)
    assert raised


def test_a_region_without_room(region: Region) -> None:
    with Region.create("64K") as other, pytest.raises(channel.NoChannels, match="--channels SIZE"):
        channel.open(other)


def test_asyncio_watches_once_for_many_sleeps(channels: Channels) -> None:
    """And stops when the channels end."""
    messages = channels.create_messages("a", limit=8)
    watched: list[int] = []
    removed: list[int] = []

    class Loop(asyncio.SelectorEventLoop):
        def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
            watched.append(fd)
            super().add_reader(fd, callback, *args)

        def remove_reader(self, fd: Any) -> bool:
            removed.append(fd)
            return super().remove_reader(fd)

    async def main() -> None:
        with messages.writer() as writer, messages.reader() as reader:
            for i in range(5):
                task = asyncio.ensure_future(reader.get_async(PATIENCE))
                await asyncio.sleep(0)
                assert not task.done()
                writer.put(b"%d" % i)
                assert await task == b"%d" % i
            assert len(watched) == 1
            assert not removed
            channels.close()
            began = time.monotonic()
            while removed != watched:
                assert time.monotonic() - began < PATIENCE
                await asyncio.sleep(0)

    loop = Loop()
    loop.run_until_complete(main())
    loop.close()


def test_as_many_ends_as_there_can_be(region: Region, channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=1, writers=64, readers=64)
    with ExitStack() as opened:
        readers = [opened.enter_context(messages.reader("block")) for _ in range(64)]
        writers = [opened.enter_context(messages.writer()) for _ in range(64)]
        for number, writer in enumerate(writers):
            writer.put(b"%d" % number, 0)
        for reader in readers:
            assert {reader.get(0) for _ in range(64)} == {b"%d" % number for number in range(64)}
            assert reader.get(0) is None
        with pytest.raises(channel.ChannelError, match="64 writers are open"):
            messages.writer()
        with pytest.raises(channel.ChannelError, match="64 readers are open"):
            messages.reader()


@pytest.mark.parametrize("by", ["serve", "serve_async"])
def test_a_reply_that_cannot_be_pickled(channels: Channels, by: str) -> None:
    class Unpicklable:
        def __reduce__(self) -> Any:
            raise AttributeError("no pickle of it")

    def work(request: int) -> Any:
        return request if request else Unpicklable()

    room = channels.create_calls("calls", limit=200)
    with room.server(pickle=True) as server, room.caller(pickle=True) as caller:
        if by == "serve":
            serving = Background(lambda: server.serve(work, timeout=1))
        else:
            serving = Background(lambda: asyncio.run(server.serve_async(work, timeout=1)))
        with pytest.raises(channel.CallFailed, match="AttributeError: no pickle of it"):
            caller.call(0, timeout=PATIENCE)
        assert caller.call(1, timeout=PATIENCE) == 1
        serving.result()


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def answer(request: bytes) -> Any:
    """What a server may get wrong, one after the other."""
    if request == b"surrogate":
        raise ValueError("file \udcff")
    if request == b"unspeakable":
        raise Unspeakable
    return {b"long": bytes(100), b"nothing": None, b"right": b"reply"}[request]


@pytest.mark.parametrize("by", ["serve", "serve_async"])
def test_a_server_of_calls_goes_on(channels: Channels, by: str) -> None:
    """Whatever becomes of one call, the next one is answered."""
    room = channels.create_calls("calls", limit=64)
    with room.server() as server, room.caller() as caller:
        if by == "serve":
            serving = Background(lambda: server.serve(answer, timeout=1))
        else:
            serving = Background(lambda: asyncio.run(server.serve_async(answer, timeout=1)))
        for request, why in {
            b"surrogate": r"ValueError: file \\udcff",
            b"unspeakable": "Unspeakable",
            b"unknown": "KeyError",
            b"long": "MessageTooLong: a reply of 100 bytes",
            b"nothing": "TypeError",
        }.items():
            with pytest.raises(channel.CallFailed, match=why):
                caller.call(request, timeout=PATIENCE)
            assert caller.call(b"right", timeout=PATIENCE) == b"reply"
        serving.result()
        pending = caller.submit(b"x")
        taken = server.take(PATIENCE)
        assert taken is not None
        with contextlib.suppress(ValueError), taken:
            raise ValueError("file \udcff")
        with pytest.raises(channel.CallFailed, match=r"file \\udcff"):
            pending.result(PATIENCE)


def test_names_that_no_channel_can_have(channels: Channels) -> None:
    for name in ("\udcff", "x" * 1000, ""):
        with pytest.raises(channel.NoSuchChannel):
            channels.open(name)
        with pytest.raises(channel.NoSuchChannel):
            channels.remove(name)
