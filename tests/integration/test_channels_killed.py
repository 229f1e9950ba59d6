"""Processes that are killed, or stopped, at any moment while they use channels."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import mmap
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.waiting import until

import ivshmem
from ivshmem import ClosedError, Directory, Region, channel, testing
from ivshmem.channel import Channels, ReaderInfo, WriterInfo

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
def child(
    region: Region, work: Callable[[Channels], object], lease: float = LEASE
) -> Iterator[int]:
    """Run `work` in a process of its own, which is killed at the end; give its PID."""
    fd = os.dup(region.fileno())
    pid = os.fork()
    if pid == 0:
        try:
            work(channel.open(Region.from_fd(fd), beat=min(BEAT, lease / 4), lease=lease))
            signal.pause()
        finally:
            os._exit(1)
    os.close(fd)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# How often a process is killed, and about how many messages pass before that each time.
LOADS = [
    pytest.param(8, 1250),
    pytest.param(1000, 10_000, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)]),
]
killing = pytest.mark.parametrize(("kills", "each"), LOADS)


def numbers(seed: int, kills: int, each: int) -> Iterator[int]:
    """How many messages pass before each kill."""
    draw = random.Random(seed)  # noqa: S311
    return (draw.randrange(1, 2 * each) for _ in range(kills))


@contextlib.contextmanager
def all_comes_back(channels: Channels) -> Iterator[None]:
    """At the end no place is taken but the test's own, and all memory can be used again."""

    def use_all() -> None:  # of the 8 MiB
        channels.create_messages("whole", limit=1984 << 10, slots=1, writers=1, readers=1, views=1)
        channels.remove("whole")

    use_all()
    yield
    until(lambda: len(channels.places()) == 1, "the places were freed")
    for each in channels.list():
        ends: list[WriterInfo | ReaderInfo] = [*each.writers, *each.readers]
        assert {end.state for end in ends} <= {"gone"}
        until(functools.partial(_removed, channels, each.name), "the channel was removed")
    use_all()


def _removed(channels: Channels, name: str) -> bool:
    try:
        channels.remove(name)
    except channel.ChannelError:  # the ends of a process that was killed just now
        return False
    return True


def test_what_a_killed_process_had_can_be_taken_at_once(region: Region) -> None:
    """Nobody waits for the lease of a process that has ended: an hour, here."""
    with channel.open(region, beat=BEAT, lease=3600) as channels:
        messages = channels.create_messages("m", limit=8, writers=1, readers=1)
        bytes_ = channels.create_bytes("b", connections=1)
        calls = channels.create_calls("c", limit=8, callers=1, servers=1)
        listener = bytes_.listen()

        def take_all(own: Channels) -> None:
            ends = own.open("m"), own.open("c"), own.open("b")
            both: Any = ends[0]
            kept.extend([both.writer(), both.reader()])
            both = ends[1]
            kept.extend([both.caller(), both.server()])
            both = ends[2]
            kept.append(both.connect())

        kept: list[object] = []
        with child(region, take_all, lease=3600):
            accepted = listener.accept(PATIENCE)
            assert accepted is not None
            takes: list[Callable[[], Any]] = [
                *(messages.writer, messages.reader, calls.caller, calls.server, bytes_.connect)
            ]
            for take in takes:
                with pytest.raises(channel.ChannelError, match="its only"):
                    take()
        accepted.close()
        for take in takes:
            take().close()
        listener.close()

        with child(region, lambda own: kept.append(own.open("b").listen())):  # type: ignore[attr-defined]
            until(lambda: channels.list()[0].readers, "it listens")
            with pytest.raises(channel.ChannelError, match="its only listener is open"):
                bytes_.listen()
        bytes_.listen().close()

        with child(region, lambda own: kept.append(own.open("m").reader())):  # type: ignore[attr-defined]
            until(lambda: channels.list()[2].readers, "it reads")
            with pytest.raises(channel.ChannelError, match="in use"):
                channels.remove("m")
        channels.remove("m")


@killing
def test_killed_writers_of_messages(
    channels: Channels, region: Region, kills: int, each: int
) -> None:
    """A reader that blocks gets what each writer published, in order.

    Nothing is missing, except where it is told: if the machine was so busy that it looked silent.
    """
    with all_comes_back(channels):
        messages = channels.create_messages("a", limit=16, slots=64, writers=2)
        next_ = 0
        with messages.reader("block") as reader:

            def get(timeout: float) -> tuple[int, int] | None:
                nonlocal next_
                while True:
                    try:
                        message = reader.get(timeout)
                    except channel.MessagesLost as error:
                        next_ += error.count
                    else:
                        break
                if message is None:
                    return None
                next_ += 1
                turn, number = message.split()
                return int(turn), int(number)

            returned = counter()
            for turn, most in enumerate(numbers(1, kills, each)):
                next_ = 0

                def write(own: Channels, turn: int = turn) -> None:
                    writer = own.open("a").writer()  # type: ignore[attr-defined]
                    for i in itertools.count():
                        writer.put(b"%d %d" % (turn, i))
                        returned[0] = i + 1

                returned[0] = 0
                with child(region, write):
                    while next_ < most:
                        assert get(PATIENCE) == (turn, next_ - 1)
                while (found := get(0)) is not None:
                    assert found == (turn, next_ - 1)
                assert returned[0] <= next_ <= returned[0] + 1


@killing
def test_killed_readers_of_messages(
    channels: Channels, region: Region, kills: int, each: int
) -> None:
    """Each gets all from its beginning to its end; then its writer is not held up any more."""
    with all_comes_back(channels):
        messages = channels.create_messages("a", limit=16, slots=64, readers=2)
        told = channels.create_messages("b", limit=1, readers=1)
        # The number that comes next, and whether something was wrong.
        seen = memoryview(mmap.mmap(-1, 4096)).cast("Q")
        sent = behind = 0
        with messages.writer() as writer, told.reader() as ready:

            def read(own: Channels) -> None:
                reader = own.open("a").reader("block")  # type: ignore[attr-defined]
                own.open("b").writer().put(b"x")  # type: ignore[attr-defined]
                while True:
                    try:
                        number = int(reader.get())
                    except channel.MessagesLost as error:  # as above
                        seen[0] += error.count
                    else:
                        seen[1] |= number != seen[0]
                        seen[0] = number + 1

            for most in numbers(2, kills, each):
                seen[0] = sent
                with child(region, read):
                    assert ready.get(PATIENCE) == b"x"
                    for _ in range(most):
                        writer.put(b"%d" % sent, PATIENCE)
                        sent += 1
                assert seen[1] == 0
                behind += sent - seen[0]
            # Of what it did not read it had room for 64 each time; more only if it looked silent.
            assert behind < sent / 2
            for _ in range(128):
                writer.put(b"", PATIENCE)


@killing
@pytest.mark.parametrize("way", ["take", "get"])
def test_killed_readers_of_a_queue(
    channels: Channels, region: Region, kills: int, each: int, way: str
) -> None:
    """With `take` each message is done once, or more often if its reader died before it said so.

    With `get` each message is got at most once; the last one of each reader that died may be lost.
    """
    with all_comes_back(channels):
        queue = channels.create_queue("a", limit=16, slots=64, readers=2)
        done = mmap.mmap(-1, 2 * kills * each + 1)  # for each message: how often it was got
        sent = 0

        def work(own: Channels) -> None:
            reader = own.open("a").reader()  # type: ignore[attr-defined]
            while way == "get":
                done[int(reader.get())] += 1
            while True:
                with reader.take() as taken:
                    done[int(bytes(taken))] += 1

        with queue.writer() as writer:
            for most in numbers(3, kills, each):
                with child(region, work):
                    for _ in range(most):
                        writer.put(b"%d" % sent, PATIENCE)
                        sent += 1
            with child(region, work):
                writer.put(b"%d" % sent, PATIENCE)
                sent += 1
                until(lambda: _unfinished(channels) == 0, "all were taken")
                counts = collections.Counter(done[:sent])
        # A reader that was killed between the record and the end of `take`; or the other way round.
        if way == "take":
            assert counts[0] == 0
            assert sum((count - 1) * times for count, times in counts.items()) <= kills + 1
        else:
            assert counts.keys() <= {0, 1}
            assert counts[0] <= kills + 1


@killing
def test_killed_writers_of_a_queue(
    channels: Channels, region: Region, kills: int, each: int
) -> None:
    """What `put` returned from comes once, in order; what comes next is the next writer's."""
    with all_comes_back(channels):
        queue = channels.create_queue("a", limit=16, slots=64, writers=2)
        with queue.reader() as reader:
            returned = counter()
            for turn, most in enumerate(numbers(7, kills, each)):

                def write(own: Channels, turn: int = turn) -> None:
                    writer = own.open("a").writer()  # type: ignore[attr-defined]
                    for i in itertools.count():
                        writer.put(b"%d %d" % (turn, i))
                        returned[0] = i + 1

                returned[0] = 0
                got = 0
                with child(region, write):
                    while got < most:
                        assert reader.get(PATIENCE) == b"%d %d" % (turn, got)
                        got += 1
                while (message := reader.get(0)) is not None:
                    assert message == b"%d %d" % (turn, got)
                    got += 1
                assert returned[0] <= got <= returned[0] + 1


@killing
def test_killed_callers(channels: Channels, region: Region, kills: int, each: int) -> None:
    """A server gets each request once, in order; whoever died, its slot comes back."""
    with all_comes_back(channels):
        calls = channels.create_calls("a", limit=16, slots=4, callers=1)
        with calls.server() as server:
            returned = counter()
            for turn, most in enumerate(numbers(8, kills, each // 5)):

                def ask(own: Channels, turn: int = turn) -> None:
                    caller = own.open("a").caller()  # type: ignore[attr-defined]
                    for i in itertools.count():
                        request = b"%d %d" % (turn, i)
                        assert caller.call(request) == request
                        returned[0] = i + 1

                def reply(number: int, timeout: float, turn: int = turn) -> bool:
                    call = server.take(timeout)
                    if call is None:
                        return False
                    request = bytes(call)
                    assert request == b"%d %d" % (turn, number)
                    call.reply(request)
                    return True

                returned[0] = 0
                served = 0
                with child(region, ask):
                    while served < most:
                        assert reply(served, PATIENCE)
                        served += 1
                while reply(served, 0):
                    served += 1
                assert returned[0] <= served <= returned[0] + 2


def counter() -> memoryview:
    """A word that a process counts in and another one reads, whatever becomes of the first."""
    return memoryview(mmap.mmap(-1, 4096)).cast("Q")


def _unfinished(channels: Channels) -> int:
    return channels.list()[0].unfinished


@killing
def test_killed_setters_of_a_value(
    channels: Channels, region: Region, kills: int, each: int
) -> None:
    """The value is never torn, and never goes back."""
    with all_comes_back(channels):
        value = channels.create_value("a", limit=256)
        with value.reader() as reader:
            last = 0
            returned = counter()
            for most in numbers(4, kills, each):

                def write(own: Channels, after: int = last) -> None:
                    with own.open("a").writer() as writer:  # type: ignore[attr-defined]
                        for i in itertools.count(after + 1):
                            writer.put(i.to_bytes(8, "little") * 32)
                            returned[0] = i

                returned[0] = last
                end = last + most
                with child(region, write):
                    while last < end:
                        content = reader.wait_changed(PATIENCE)
                        now = int.from_bytes(content[:8], "little")
                        assert content == now.to_bytes(8, "little") * 32
                        assert now > last
                        last = now
                last = int.from_bytes(reader.get()[:8], "little")
                assert returned[0] <= last <= returned[0] + 1


@killing
def test_killed_servers(channels: Channels, region: Region, kills: int, each: int) -> None:
    """A call has its reply, or an error; it never hangs, and no other server repeats it."""
    with all_comes_back(channels):
        calls = channels.create_calls("a", limit=16, slots=16, servers=2)
        served = mmap.mmap(-1, 2 * kills * each + 1)  # for each call: how often it was begun
        pending: collections.deque[tuple[int, Any]] = collections.deque()
        lost = 0

        def serve(own: Channels) -> None:
            def reply(request: bytes) -> bytes:
                served[int(request)] += 1
                return request

            own.open("a").server().serve(reply)  # type: ignore[attr-defined]

        def finish() -> None:
            nonlocal lost
            number, call = pending.popleft()
            try:
                assert call.result(PATIENCE) == b"%d" % number
                assert served[number] == 1
            except channel.ServerLost:
                assert served[number] <= 1
                lost += 1

        sent = 0
        with calls.caller() as caller:
            for most in numbers(5, kills, each):
                with child(region, serve):
                    for _ in range(most):
                        pending.append((sent, caller.submit(b"%d" % sent, PATIENCE)))
                        sent += 1
                        if len(pending) == 8:
                            finish()
            with child(region, serve):
                while pending:
                    finish()
        assert lost <= kills
        assert set(served[:sent]) <= {0, 1}
        assert served[:sent].count(0) <= lost


@killing
def test_killed_senders_of_bytes(channels: Channels, region: Region, kills: int, each: int) -> None:
    """What was sent comes whole and in order, and then the reset; connections come back."""
    with all_comes_back(channels):
        room = channels.create_bytes("a", buffer=4096, connections=1)
        pattern = bytes(range(256)) * 64
        with room.listen() as listener:
            returned = counter()
            for most in numbers(6, kills, each):

                def send(own: Channels) -> None:
                    stream = own.open("a").connect(wait_for_listener=True)  # type: ignore[attr-defined]
                    for i in itertools.cycle(range(0, len(pattern), 64)):
                        stream.sendall(pattern[i : i + 64])
                        returned[0] += 64

                returned[0] = 0
                with child(region, send) as pid:
                    stream = listener.accept(PATIENCE)
                    assert stream is not None
                    stream.settimeout(PATIENCE)
                    count = 0
                    with pytest.raises(ConnectionResetError), stream:  # noqa: PT012 - any of them
                        while True:
                            data = stream.recv(4096)
                            at = count % len(pattern)
                            assert data == (pattern + pattern)[at : at + len(data)]
                            if count <= 64 * most < count + len(data):
                                os.kill(pid, signal.SIGKILL)
                            count += len(data)
                    assert returned[0] <= count <= returned[0] + 64


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", ["get", "get_rows"])
def test_what_a_reader_got_and_what_it_lost_is_all_there_was(region: Region, way: str) -> None:
    """It is stopped again and again while its writer does not wait for it any more."""
    lease = 0.05
    # The number that comes next, what was wrong, how often something was lost, whether it reads.
    seen = memoryview(mmap.mmap(-1, 4096)).cast("Q")

    def read(own: Channels) -> None:
        reader = own.open("a").reader("block")  # type: ignore[attr-defined]
        rows = bytearray(8 * 16)
        seen[3] = 1
        while True:
            try:
                if way == "get":
                    numbers = [int.from_bytes(reader.get(), "little")]
                else:
                    count = reader.get_rows(memoryview(rows).cast("B", (16, 8)))
                    numbers = memoryview(rows).cast("Q")[:count].tolist()
            except channel.MessagesLost as error:
                seen[0] += error.count
                seen[2] += 1
            else:
                for number in numbers:
                    seen[1] += number != seen[0]
                    seen[0] = number + 1

    with channel.open(region, beat=lease / 4, lease=lease) as channels:
        messages = channels.create_messages("a", limit=8, slots=4, readers=1)
        with child(region, read, lease) as pid, messages.writer() as writer:
            until(lambda: seen[3], "it reads")
            sent = 0
            for _ in range(6):
                for signal_, seconds in ((signal.SIGSTOP, 2 * lease), (signal.SIGCONT, lease / 2)):
                    os.kill(pid, signal_)
                    end = time.monotonic() + seconds
                    while time.monotonic() < end:
                        writer.put(sent.to_bytes(8, "little"), PATIENCE)
                        sent += 1
            until(lambda: seen[0] == sent, "it got all")
        assert seen[1] == 0
        assert seen[2] > 0


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
