"""Out of descriptors, out of descriptors in flight, out of ids: nobody is dropped, everybody is
served in the end, and the server does not burn the processor while it waits.
"""

from __future__ import annotations

import resource
import threading
from contextlib import ExitStack

import pytest
from support.children import NOBODY, Child, needs_root, python
from support.peer import RawPeer
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem.protocol import roster

SERVE = """
    import logging, resource, selectors, sys, ivshmem
    path, vectors, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(format="%(message)s")
    with ivshmem.Server(path, 4096, vectors) as server:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        server.start()
        print("READY")
        for line in sys.stdin:
            print([peer.id for peer in server.peers], server.paused)
"""

# The same in a loop of one's own, which steps only when the server asks for it.
EMBED = (
    SERVE[: SERVE.index("server.start()")]
    + """
        loop = selectors.DefaultSelector()
        loop.register(server, selectors.EVENT_READ)
        loop.register(sys.stdin, selectors.EVENT_READ)
        print("READY")
        going = True
        while going:
            for key, _ in loop.select():
                if key.fileobj is server:
                    server.step(0)
                elif sys.stdin.readline():
                    print([peer.id for peer in server.peers], server.paused)
                else:
                    going = False
        loop.close()
"""
)
each_way = pytest.mark.parametrize("program", [SERVE, EMBED], ids=["thread", "embedded"])

VECTORS = 4
LIMIT = 64


def ask(child: Child) -> str:
    child.tell("peers")
    return child.line()


@pytest.mark.sampled(2)
@each_way
def test_newcomers_wait_for_descriptors(socket_path: str, program: str) -> None:
    """Not one is accepted and let down; each leave lets the next in; waiting costs nothing."""
    with python(program, socket_path, str(VECTORS), str(LIMIT)) as child, ExitStack() as stack:
        child.expect("READY")
        inside: list[RawPeer] = []
        # Each takes a socket and its eventfds.
        while (peer := stack.enter_context(RawPeer(socket_path))).readable(0.5):
            inside.append(peer.set_up(VECTORS))
        waiting = [peer, *(stack.enter_context(RawPeer(socket_path)) for _ in range(4))]
        assert LIMIT // 2 < len(inside) * (1 + VECTORS) < LIMIT
        assert ask(child) == f"{[p.id for p in inside]} Too many open files"

        begin = child.cpu_seconds()
        assert not waiting[0].readable(1.0), "somebody was accepted who cannot be set up"
        assert child.cpu_seconds() - begin < 0.3, "it waits by trying all the time"

        for peer in inside:
            assert peer.drain() >= 0
            assert not peer.left
        for leaving, entering in zip(inside, waiting, strict=False):
            leaving.close()
            entering.set_up(VECTORS)
            inside[-1].take_until(lambda p=entering: inside[-1].counts.get(p.id) == VECTORS)  # type: ignore[misc]
        assert "newcomers have to wait: Too many open files" in end(child)


@each_way
def test_descriptors_that_others_give_back(socket_path: str, program: str) -> None:
    """No leave says that there are some again: it looks from time to time."""
    with python(program, socket_path, str(VECTORS), "20") as child, ExitStack() as stack:
        child.expect("READY")
        for _ in range(4):
            stack.enter_context(RawPeer(socket_path))
        until(lambda: "Too many" in ask(child))
        resource.prlimit(
            child.pid, resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
        until(lambda: ask(child) == "[0, 1, 2, 3] ")
        end(child)


def end(child: Child) -> str:
    """Close its input and return what it logged."""
    assert child.process.stdin is not None
    child.process.stdin.close()
    child.process.stdin = None
    return child.finish()


@pytest.mark.sampled(2)
@each_way
@needs_root
def test_too_many_descriptors_in_flight(socket_path: str, program: str) -> None:
    """Without privileges only so many may be in flight as may be open; later the rest is sent."""
    vectors, count = 1, 100  # a small buffer holds a handful of messages
    with (
        python(program, socket_path, str(vectors), "256", user=NOBODY) as child,
        ExitStack() as stack,
    ):
        child.expect("READY")
        # They do not read: their buffers have room, and yet it cannot be sent.
        peers = [stack.enter_context(RawPeer(socket_path)) for _ in range(count)]
        # Whoever was accepted by then is told at once that it exists; the others are let in later.
        assert child.log_line().startswith("sending has to wait: Too many references")

        begin = child.cpu_seconds()
        assert peers[0].readable(0)
        threading.Event().wait(1.0)
        assert child.cpu_seconds() - begin < 0.5, "it waits by trying all the time"

        def complete() -> bool:
            for peer in peers:
                peer.drain()
            return all(sum(p.counts.values()) == count * vectors for p in peers)

        until(complete, "everyone knows everyone")
        whole = {p.id: p.vectors[p.id] for p in peers}
        for peer in peers:
            assert peer.vectors == whole
        assert "sending has to wait: Too many references: cannot splice" in end(child)


def test_log_is_not_flooded(socket_path: str) -> None:
    with python(SERVE, socket_path, str(VECTORS), "20") as child, ExitStack() as stack:
        child.expect("READY")
        for _ in range(4):
            stack.enter_context(RawPeer(socket_path))
        until(lambda: "Too many" in ask(child))
        assert not stack.enter_context(RawPeer(socket_path)).readable(1.0)
        assert end(child).count("newcomers have to wait") == 1


def test_out_of_ids(socket_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stays knows them all: newcomers wait until it has gone."""
    monkeypatch.setattr(roster, "MAX_ID", 4)
    with ivshmem.Server(socket_path, 4096) as server, ExitStack() as stack:
        server.start()
        stayer = stack.enter_context(RawPeer(socket_path)).set_up(1)
        for number in range(1, 5):
            with RawPeer(socket_path) as guest:
                assert guest.set_up(1).id == number
                stayer.take_until(lambda n=number: n in stayer.counts)  # type: ignore[misc]
            stayer.take_until(lambda n=number: n in stayer.left)  # type: ignore[misc]
        waiting = [stack.enter_context(RawPeer(socket_path)) for _ in range(2)]
        until(lambda: server.paused)
        assert server.paused == "every id is taken, or known to a connected peer"
        assert not waiting[0].readable(0.2)
        assert len(server.peers) == 1
        stayer.close()
        assert [peer.set_up(1).id for peer in waiting] == [0, 1]
        assert server.paused == ""


def test_a_newcomer_that_goes_while_it_waits(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "MAX_ID", 0)
    with ivshmem.Server(socket_path, 4096) as server, ExitStack() as stack:
        server.start()
        first = stack.enter_context(RawPeer(socket_path)).set_up(1)
        RawPeer(socket_path).close()
        last = stack.enter_context(RawPeer(socket_path))
        until(lambda: server.paused)
        first.close()
        assert last.set_up(1).id == 0
        until(lambda: len(server.peers) == 1)


CLIENT = """
    import resource, sys, ivshmem
    with ivshmem.connect(sys.argv[1], timeout=60) as client:
        print("READY")
        sys.stdin.readline()
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        for event in client.events(timeout=60):
            print(type(event).__name__)
            if isinstance(event, ivshmem.Disconnected):
                print(event.reason)
                break
        client.ring(client.id, 1)
        print(client.wait(1, 60))
"""


def test_client_out_of_descriptors(socket_path: str) -> None:
    """It loses the server, not its doorbells; the others see it leave."""
    with ivshmem.Server(socket_path, 4096, 4) as server, ExitStack() as stack:
        server.start()
        watcher = stack.enter_context(ivshmem.connect(socket_path, timeout=PATIENCE))
        with python(CLIENT, socket_path) as child:
            child.expect("READY")
            child.tell()
            until(lambda: watcher.peers == [1])
            for _ in range(10):
                stack.enter_context(RawPeer(socket_path)).set_up(4)
            while (line := child.line()) == "PeerJoined":
                pass
            assert line == "Disconnected"
            assert "too many open files" in child.line()
            child.expect("1")
            child.finish()
            until(lambda: 1 not in watcher.peers)
        assert len(watcher.peers) == 10
