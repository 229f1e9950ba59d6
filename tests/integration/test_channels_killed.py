"""Processes that are killed, or stopped, at any moment while they use channels."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest
from support.waiting import until

import ivshmem
from ivshmem import ClosedError, Directory, Region, channel, testing
from ivshmem.channel import Channels

PATIENCE = 30.0
BEAT, LEASE = 0.01, 0.1  # short: what is killed is found sooner


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("16M") as region:
        Directory.create(region, channels="8M").close()
        yield region


@pytest.fixture
def channels(region: Region) -> Iterator[Channels]:
    with channel.open(region, beat=BEAT, lease=LEASE) as channels:
        yield channels


@contextlib.contextmanager
def child(region: Region, work: Callable[[Channels], object]) -> Iterator[int]:
    """Run `work` in a process of its own, which is killed at the end; give its PID."""
    fd = os.dup(region.fileno())
    pid = os.fork()
    if pid == 0:
        try:
            work(channel.open(Region.from_fd(fd), beat=BEAT, lease=LEASE))
            signal.pause()
        finally:
            os._exit(1)
    os.close(fd)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


KILLS = [pytest.param(8), pytest.param(1000, marks=pytest.mark.nightly)]


def _pause(draw: random.Random) -> None:
    time.sleep(draw.uniform(0, 0.01))  # of which the moment of the kill is drawn


@pytest.mark.parametrize("kills", KILLS)
def test_killed_writers_of_messages(region: Region, channels: Channels, kills: int) -> None:
    """A reader that blocks gets what each writer published, in order and without a gap."""
    messages = channels.create_messages("a", limit=16, slots=8, writers=2)
    draw = random.Random(1)  # noqa: S311
    with messages.reader("block") as reader:
        for turn in range(kills):

            def write(own: Channels, turn: int = turn) -> None:
                writer = own.open("a").writer()  # type: ignore[attr-defined]
                i = 0
                while True:
                    writer.put(b"%d %d" % (turn, i))
                    i += 1

            got = []
            with child(region, write):
                got.append(reader.get(PATIENCE))
                end = time.monotonic() + draw.uniform(0, 0.01)
                while time.monotonic() < end:
                    got.append(reader.get(PATIENCE))
            while (message := reader.get(0)) is not None:
                got.append(message)
            assert got == [b"%d %d" % (turn, i) for i in range(len(got))]
    until(lambda: len(channels.places()) == 1, "the places were freed")


@pytest.mark.parametrize("kills", KILLS)
def test_killed_readers_of_messages(region: Region, channels: Channels, kills: int) -> None:
    """A reader that was killed holds its writer up no longer than until its end is proven."""
    messages = channels.create_messages("a", limit=16, slots=4, readers=2)
    draw = random.Random(2)  # noqa: S311
    told = channels.create_messages("b", limit=1, readers=1).reader()
    with messages.writer() as writer:
        for _ in range(kills):

            def read(own: Channels) -> None:
                reader = own.open("a").reader("block")  # type: ignore[attr-defined]
                own.open("b").writer().put(b"x")  # type: ignore[attr-defined]
                last = -1
                for message in reader:
                    assert last in (-1, int(message) - 1), (last, message)
                    last = int(message)

            with child(region, read):
                assert told.get(PATIENCE) == b"x"
                end = time.monotonic() + draw.uniform(0, 0.01)
                i = 0
                while time.monotonic() < end:
                    writer.put(b"%d" % i, PATIENCE)
                    i += 1
            for i in range(8):
                writer.put(b"%d" % i, PATIENCE)
        messages.reader().close()
        messages.reader().close()


@pytest.mark.parametrize("kills", KILLS)
def test_killed_readers_of_a_queue(region: Region, channels: Channels, kills: int) -> None:
    """Each message is acknowledged: once, or again where its reader died before that was told."""
    queue = channels.create_queue("a", limit=16, slots=4, readers=2)
    results = channels.create_messages("b", limit=16, slots=64, writers=64, overflow="block")
    draw = random.Random(3)  # noqa: S311
    sent = 0
    done: list[int] = []
    with queue.writer() as writer, results.reader() as reader:

        def work(own: Channels) -> None:
            out = own.open("b").writer()  # type: ignore[attr-defined]
            for_ever = own.open("a").reader()  # type: ignore[attr-defined]
            while True:
                with for_ever.take() as taken:
                    out.put(bytes(taken))

        def collect() -> list[int]:
            while (result := reader.get(0)) is not None:
                done.append(int(result))
            return done

        for _ in range(kills):
            with child(region, work):
                end = time.monotonic() + draw.uniform(0, 0.02)
                while time.monotonic() < end:
                    with contextlib.suppress(TimeoutError):
                        writer.put(b"%d" % sent, 0.001)
                        sent += 1
                    collect()
        with child(region, work):
            until(lambda: set(collect()) == set(range(sent)), "all were acknowledged")
    assert len(done) <= sent + kills  # at most one message of each that was killed came twice


@pytest.mark.parametrize("kills", KILLS)
def test_killed_setters_of_a_value(region: Region, channels: Channels, kills: int) -> None:
    """The value is never torn, and never goes back."""
    value = channels.create_value("a", limit=256)
    draw = random.Random(4)  # noqa: S311
    with value.reader() as reader:
        last = 0
        for _ in range(kills):

            def write(own: Channels, after: int = last) -> None:
                with own.open("a").writer() as writer:  # type: ignore[attr-defined]
                    i = after
                    while True:
                        i += 1
                        writer.put(i.to_bytes(8, "little") * 32)

            with child(region, write):
                end = time.monotonic() + draw.uniform(0.001, 0.01)
                while time.monotonic() < end or last == 0:
                    content = reader.wait_changed(0.1)
                    if content is None:
                        continue
                    now = int.from_bytes(content[:8], "little")
                    assert content == now.to_bytes(8, "little") * 32
                    assert now >= last
                    last = now
            content = reader.get()
            last = int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("kills", KILLS)
def test_killed_servers(region: Region, channels: Channels, kills: int) -> None:
    """A call has its reply, or an error; it never hangs, and no other server repeats it."""
    calls = channels.create_calls("a", limit=16, servers=2)
    draw = random.Random(5)  # noqa: S311
    outcomes: set[str] = set()
    with calls.caller() as caller:
        for _ in range(kills):

            def serve(own: Channels) -> None:
                server = own.open("a").server()  # type: ignore[attr-defined]

                def reply(request: bytes) -> bytes:
                    time.sleep(0.001)  # so that a kill finds it at work
                    return request

                server.serve(reply)

            with child(region, serve):
                pending = caller.submit(b"x", PATIENCE)
                assert pending.result(PATIENCE) == b"x"
                pending = caller.submit(b"y", PATIENCE)
                _pause(draw)
            try:
                assert pending.result(0.5) == b"y"
                outcomes.add("reply")
            except channel.ServerLost:
                outcomes.add("lost")
            except TimeoutError:
                assert pending.cancel()  # no server had begun
                outcomes.add("never")
    assert outcomes <= {"reply", "lost", "never"}


@pytest.mark.parametrize("kills", KILLS)
def test_killed_senders_of_bytes(region: Region, channels: Channels, kills: int) -> None:
    """What was sent comes whole and in order, and then the reset; connections come back."""
    room = channels.create_bytes("a", buffer=64, connections=1)
    draw = random.Random(6)  # noqa: S311
    pattern = bytes(range(256)) * 64
    with room.listen() as listener:
        for _ in range(kills):

            def send(own: Channels) -> None:
                stream = own.open("a").connect(wait_for_listener=True)  # type: ignore[attr-defined]
                while True:
                    stream.sendall(pattern)

            with child(region, send) as pid:
                stream = listener.accept(PATIENCE)
                assert stream is not None
                stream.settimeout(PATIENCE)
                count = 0
                end = time.monotonic() + draw.uniform(0, 0.01)
                with pytest.raises(ConnectionResetError), stream:  # noqa: PT012 - any of them
                    while True:
                        data = stream.recv(64)
                        assert data == (pattern + pattern)[count : count + len(data)]
                        count = (count + len(data)) % len(pattern)
                        if time.monotonic() >= end:
                            os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def test_a_stopped_reader_is_not_waited_for_and_is_told(region: Region, channels: Channels) -> None:
    messages = channels.create_messages("a", limit=8, slots=4)
    told = channels.create_messages("b", limit=100).reader()

    def read(own: Channels) -> None:
        reader = own.open("a").reader("block")  # type: ignore[attr-defined]
        out = own.open("b").writer()  # type: ignore[attr-defined]
        out.put(b"ready")
        while True:
            try:
                out.put(reader.get())
            except channel.MessagesLost as error:
                out.put(b"lost %d" % error.count)

    with child(region, read) as pid, messages.writer() as writer:
        assert told.get(PATIENCE) == b"ready"
        stop(pid)
        began = time.monotonic()
        for i in range(20):
            writer.put(b"%d" % i, PATIENCE)
        assert time.monotonic() - began < 5 * LEASE + 1
        os.kill(pid, signal.SIGCONT)
        # What it had read before is not lost, and neither is the newest.
        got = [told.get(PATIENCE)]
        while got[-1] not in (b"19", None):
            got.append(told.get(PATIENCE))
        lost = [int(each.split()[1]) for each in got if each.startswith(b"lost")]
        assert sum(lost) + len([each for each in got if not each.startswith(b"lost")]) == 20
        assert lost


def test_a_stopped_reader_of_a_queue(region: Region, channels: Channels) -> None:
    queue = channels.create_queue("a", limit=8)
    told = channels.create_messages("b", limit=100).reader()

    def work(own: Channels) -> None:
        out = own.open("b").writer()  # type: ignore[attr-defined]
        reader = own.open("a").reader()  # type: ignore[attr-defined]
        taken = reader.take()
        out.put(bytes(taken))
        signal.sigwait([signal.SIGUSR1])
        try:
            taken.done()
        except channel.Redelivered:
            out.put(b"redelivered")

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with child(region, work) as pid, queue.writer() as writer, queue.reader() as reader:
            writer.put(b"x")
            assert told.get(PATIENCE) == b"x"
            stop(pid)
            with reader.take(PATIENCE) as taken:  # type: ignore[union-attr]
                assert (bytes(taken), taken.redelivered) == (b"x", True)
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGCONT)
            assert told.get(PATIENCE) == b"redelivered"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def test_a_process_whose_place_was_freed_is_told(region: Region, channels: Channels) -> None:
    messages = channels.create_messages("a", limit=100, writers=1)
    with messages.reader() as reader:
        done, out = os.pipe()

        def write(own: Channels) -> None:
            writer = own.open("a").writer()  # type: ignore[attr-defined]
            try:
                while True:
                    writer.put(b"from the child")
            except ClosedError as error:
                os.write(out, str(error).encode())

        with child(region, write) as pid:
            assert reader.get(PATIENCE) == b"from the child"
            stop(pid)
            [place] = [each.place for each in channels.places() if each.process == pid]
            assert channels.free_place(place)
            while reader.get(0) is not None:
                pass
            with messages.writer() as writer:
                os.kill(pid, signal.SIGCONT)
                assert b"place among the channels was freed" in os.read(done, 1000)
                writer.put(b"mine")
                assert reader.get(PATIENCE) == b"mine"
                assert reader.get(0) is None
        os.close(done)
        os.close(out)


def test_the_reason_stays(channels: Channels) -> None:
    writer = channels.create_messages("a", limit=8).writer()
    [place] = channels.places()
    assert channels.free_place(place.place)
    for call in (lambda: writer.put(b"x"), channels.list, lambda: writer.put(b"x")):
        with pytest.raises(ClosedError, match=r"was freed, .*: open the channels again"):
            call()


# -- stopped in the middle, and evicted -----------------------------------------------------------


LONG = 1 << 20


@contextlib.contextmanager
def evicted(
    server: ivshmem.Server, work: Callable[[Channels], object]
) -> Iterator[tuple[int, ivshmem.Client]]:
    """Run `work` in a child that stops itself; give its PID, and its peer's id is used again."""
    pid = os.fork()
    if pid == 0:
        try:
            client = ivshmem.connect(server.path)
            work(channel.open(client, beat=BEAT, lease=LEASE))
            signal.pause()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        [peer] = [each for each in server.peers if each.pid == pid]
        server.evict(peer.id)
        until(lambda: peer.id not in [each.id for each in server.peers], "it was evicted")
        with ivshmem.connect(server.path) as successor:
            yield pid, successor
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_writer_that_was_stopped_in_the_middle_of_a_message() -> None:
    """Others write and read on; when it continues, its message comes whole, and theirs stay."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(testing.server("16M", vectors=1, channels="12M"))
        client = stack.enter_context(ivshmem.connect(server.path))
        channels = stack.enter_context(channel.open(client, beat=BEAT, lease=LEASE))
        messages = channels.create_messages("a", limit=LONG, slots=2, writers=2, readers=2, views=1)
        reader = stack.enter_context(messages.reader("block"))

        def write(own: Channels) -> None:
            writer = own.open("a").writer()  # type: ignore[attr-defined]
            loan = writer.loan()
            memory = memoryview(loan)
            memory[: LONG // 2] = b"c" * (LONG // 2)
            os.kill(os.getpid(), signal.SIGSTOP)
            memory[LONG // 2 :] = b"c" * (LONG // 2)
            memory.release()
            loan.publish()

        with evicted(server, write) as (pid, successor):
            other = stack.enter_context(channel.open(successor, beat=BEAT, lease=LEASE))
            writer = stack.enter_context(other.open("a").writer())  # type: ignore[attr-defined]
            with pytest.raises(channel.ChannelError, match="all its 2 writers are open"):
                messages.writer()  # the stopped one's slot is not used again: it may store
            for i in range(6):
                writer.put(bytes([i]) * LONG, PATIENCE)
                assert reader.get(PATIENCE) == bytes([i]) * LONG
            until(
                lambda: (
                    {place.process: place.state for place in channels.places()}[pid] == "silent"
                ),
                "it was silent",
            )
            writer.put(b"d" * LONG)
            os.kill(pid, signal.SIGCONT)
            got = [reader.get(PATIENCE), reader.get(PATIENCE)]
            assert sorted(got) == [b"c" * LONG, b"d" * LONG]


def test_a_reader_that_was_stopped_before_it_lets_a_message_go() -> None:
    """Its slot has another reader when it continues: that one's words stay as they are."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(testing.server("16M", vectors=1, channels="12M"))
        client = stack.enter_context(ivshmem.connect(server.path))
        channels = stack.enter_context(channel.open(client, beat=BEAT, lease=LEASE))
        messages = channels.create_messages("a", limit=8, slots=4, writers=1, readers=1)
        told, tell = os.pipe()
        writer = stack.enter_context(messages.writer())

        def read(own: Channels) -> None:
            reader = own.open("a").reader("block")  # type: ignore[attr-defined]
            os.write(tell, b"x")
            view = reader.view(PATIENCE)
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                with contextlib.suppress(channel.Overtaken):  # it is told that, too
                    view.release()
                reader.get(0)
            except ClosedError as error:
                os.write(tell, str(error).encode())

        with contextlib.ExitStack() as inner:
            thread = threading.Thread(target=lambda: (os.read(told, 1), writer.put(b"first")))
            thread.start()
            pid, successor = inner.enter_context(evicted(server, read))
            thread.join()
            [place] = [each.place for each in channels.places() if each.process == pid]
            assert channels.free_place(place)  # the user's word, which was wrong
            other = inner.enter_context(channel.open(successor, beat=BEAT, lease=LEASE))
            reader = inner.enter_context(other.open("a").reader("block"))  # type: ignore[attr-defined]
            for i in range(4):
                writer.put(b"%d" % i, 0)
            os.kill(pid, signal.SIGCONT)
            assert b"place among the channels was freed" in os.read(told, 1000)
            with pytest.raises(TimeoutError):
                writer.put(b"4", 0.05)  # the reader holds the writer up, as before
            assert [reader.get(0) for _ in range(5)] == [b"0", b"1", b"2", b"3", None]
            writer.put(b"4", 0)
            assert reader.get(PATIENCE) == b"4"
        os.close(told)
        os.close(tell)
