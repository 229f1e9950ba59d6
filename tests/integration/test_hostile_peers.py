"""Peers that mean harm, as processes of another user: the others go on, whatever these do.

The others are two that exchange messages by memory and doorbells, one that checks every message of
the server as a strict client would, newcomers, and QEMU. Nothing here is about time: bench_hostile
in bench/ measures what they notice.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO

import pytest
from support.children import Child, needs_root, python
from support.emulator import QEMU, needs_qemu
from support.hostile import (
    ATTACKS,
    CLEARS_NONBLOCK,
    FILLS_COUNTERS,
    FLOOD,
    FLOOD_READING,
    HOLDS_UP,
    NEVER_READS,
    attack,
)
from support.peer import RawPeer, eventfd_id
from support.waiting import PATIENCE, Background, sleeps_in_read_of, until

import ivshmem
from ivshmem.server.access import Rules
from ivshmem.system.listener import Listener

VECTORS = 2
SIZE = 64 * 1024
ASKED, ANSWERED = 0, 64  # where in the memory the two count their messages
END = 2**64 - 1

ECHO = f"""
    import sys, ivshmem
    with ivshmem.connect(sys.argv[1], timeout=60) as client:
        asked = client.region.atomic_u64({ASKED})
        answered = client.region.atomic_u64({ANSWERED})
        print(client.id)
        while True:
            client.wait(0)  # also when it was rung for nothing
            number = asked.load()
            if number == {END}:
                break
            if number != answered.load():
                answered.store(number)
                client.ring(0, 1)
"""


class Scene:
    """A server, its honest peers (ids 0, 1 and 2), and what they do all the time."""

    def __init__(self, stack: ExitStack, path: str, rules: Rules) -> None:
        self.path = path
        listener = Listener(path, mode=0o666)
        server = ivshmem.Server(listener, SIZE, VECTORS, gate=rules.judge)
        self.server = stack.enter_context(server).start()
        self.client = stack.enter_context(ivshmem.connect(path, timeout=PATIENCE))
        self.echo: Child = stack.enter_context(python(ECHO, path))
        self.echo.expect("1")
        self.witness = stack.enter_context(RawPeer(path)).set_up(VECTORS)
        self.number = 0

    def knows(self, peer: int) -> bool:
        """Whether the strict peer was told of all vectors of that one."""
        self.witness.drain()
        return self.witness.counts.get(peer) == VECTORS

    def round_trip(self) -> None:
        """A message there and back, whoever rings in between."""
        self.number += 1
        self.client.region.atomic_u64(ASKED).store(self.number)
        self.client.ring(1, 0)
        answered = self.client.region.atomic_u64(ANSWERED)
        while answered.load() != self.number:
            assert self.client.wait(1, PATIENCE), "no answer"

    def join(self) -> None:
        """Somebody comes, is set up completely, is announced to all who read, rings, and goes."""
        with ivshmem.connect(self.path, timeout=PATIENCE) as newcomer:
            assert newcomer.vectors == VECTORS
            assert {0, 1, 2} <= set(newcomer.peers)
            newcomer.ring(1, 0)
            until(lambda: newcomer.id in self.client.peers)
            until(lambda: self.knows(newcomer.id))
        until(lambda: newcomer.id not in self.client.peers)
        until(lambda: not self.knows(newcomer.id))
        assert newcomer.id in self.witness.left
        self.client.peer_events()

    def go_on(self, times: int = 10) -> None:
        for _ in range(times):
            for _ in range(20):
                self.round_trip()
            self.join()
        assert self.client.connected
        assert os.fstat(self.client.region.fileno()).st_size == SIZE

    def all_quiet(self) -> None:
        """The hostile ones have gone; everybody knows who is there, and the doorbells work."""
        until(lambda: len(self.server.peers) == 3, "the others have gone")
        until(lambda: self.client.peers == [1, 2])
        until(lambda: self.witness.drain() >= 0 and set(self.witness.counts) == {0, 1, 2})
        self.go_on(1)
        self.client.region.atomic_u64(ASKED).store(END)
        self.client.ring(1, 0)
        assert self.echo.finish() == ""


@pytest.fixture
def make_scene(socket_path: str) -> Iterator[Callable[[Rules], Scene]]:
    with ExitStack() as stack:
        yield lambda rules: Scene(stack, socket_path, rules)


@pytest.fixture
def scene(make_scene: Callable[[Rules], Scene]) -> Scene:
    return make_scene(Rules())


# -- the others go on -----------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ATTACKS)
def test_the_others_go_on(scene: Scene, name: str) -> None:
    source, processes = ATTACKS[name]
    with attack(source, processes, scene.path, VECTORS) as children:
        scene.go_on()
        if name not in ("sends", "floods", "floods, reading"):
            until(lambda: len(scene.server.peers) > 3, "it is a peer")
            scene.go_on(1)
        for child in children:
            child.process.send_signal(signal.SIGTERM)
            done = int(child.line())
            assert done > 0 or name in ("never reads", "half set up"), "it did nothing"
            child.finish()
    scene.all_quiet()


@pytest.mark.nightly
def test_all_at_once(scene: Scene) -> None:
    with ExitStack() as stack:
        for name, (source, _) in ATTACKS.items():
            if name != "clears O_NONBLOCK":  # with full counters, that holds up who rings
                stack.enter_context(attack(source, 1, scene.path, VECTORS))
        scene.go_on(5)
    scene.all_quiet()


@pytest.mark.nightly
def test_descriptors_of_the_server_during_a_flood(scene: Scene) -> None:
    """Those who have gone do not pile up."""
    with attack(FLOOD, 2, scene.path, VECTORS), attack(FLOOD_READING, 1, scene.path, VECTORS):
        for _ in range(5):
            scene.go_on(1)
            # beyond the honest ones, as many as were accepted in one step and have not gone yet
            assert len(os.listdir("/proc/self/fd")) < 64 * (1 + VECTORS) + 300
    scene.all_quiet()


def test_who_left_while_it_waited_takes_no_id(socket_path: str) -> None:
    """The queue is full of those who have gone: the next one is the first peer there is."""
    with ivshmem.Server(socket_path, SIZE, VECTORS) as server:
        for _ in range(200):
            RawPeer(socket_path).close()
        with RawPeer(socket_path) as half_open, RawPeer(socket_path) as witness:
            half_open.socket.shutdown(socket.SHUT_WR)  # it never sends, as anybody, and is there
            while len(server.peers) < 2:
                server.step(0)
            server.step(0)
            assert half_open.set_up(VECTORS).id == 0
            assert witness.set_up(VECTORS).id == 1
            assert not witness.left
            assert set(witness.counts) == {0, 1}


@needs_root
def test_ids_are_used_up_no_faster_than_joins_are_allowed(
    make_scene: Callable[[Rules], Scene],
) -> None:
    """Without the limit thousands a second are gone for as long as anybody stays."""
    scene = make_scene(Rules(joins_per_minute=50))
    with attack(FLOOD_READING, 2, scene.path, VECTORS) as children:
        scene.go_on(2)
        until(lambda: scene.server.counts.refused > 1000)
        for child in children:
            child.process.send_signal(signal.SIGTERM)
            assert int(child.line()) > 0
            child.finish()
    until(lambda: len(scene.server.peers) == 3)
    # As many as can come at once, and more with time: at most one a second here.
    assert scene.server.counts.joins <= 3 + 2 + 50 + 2 * PATIENCE


@needs_root
def test_who_is_refused_harms_nobody(make_scene: Callable[[Rules], Scene]) -> None:
    scene = make_scene(Rules(deny=["uid:nobody"]))
    with attack(FLOOD, 2, scene.path, VECTORS), attack(FLOOD_READING, 1, scene.path, VECTORS):
        scene.go_on(1)
        assert {peer.uid for peer in scene.server.peers} == {0}
    scene.all_quiet()
    assert scene.witness.left == {3, 4}, "who was refused had an id"


def test_a_peer_that_never_reads_costs_bounded_memory(scene: Scene) -> None:
    """What it must still be told is a difference between two states, not a queue of events."""
    with attack(NEVER_READS, 1, scene.path, VECTORS):
        until(lambda: len(scene.server.peers) == 4)
        (lazy,) = {peer.id for peer in scene.server.peers} - {0, 1, 2}
        for _ in range(400):
            ivshmem.connect(scene.path, timeout=PATIENCE).close()
            scene.witness.drain()
        until(lambda: len(scene.server.peers) == 4)
        report = scene.server._engine.report(interrupts=False)  # nothing happens any more
        (pending,) = [each.pending for each in report if each.peer.id == lazy]
        assert pending <= 278, "only leaves of those whom it was told of"
    scene.all_quiet()


# -- what a peer can do, and SECURITY.md says so --------------------------------------------------


def test_a_full_counter_is_no_lost_interrupt(scene: Scene) -> None:
    """Who is rung though its counter is full wakes up all the same; the count means nothing."""
    with attack(FILLS_COUNTERS, 1, scene.path, VECTORS):
        until(lambda: (scene.client.wait(0, PATIENCE) or 0) > 2**62, "somebody fills it")
        scene.go_on(1)
    scene.all_quiet()


def test_a_peer_can_take_the_interrupts_of_another(scene: Scene) -> None:
    """Everybody has everybody's eventfds, and whoever reads one first has the interrupt."""
    fds: dict[tuple[int, int], int] = {}
    try:
        with RawPeer(scene.path, lambda *key: fds.update({key[:2]: key[2]})) as thief:
            thief.set_up(VECTORS)
            until(lambda: scene.knows(thief.id))
            with ivshmem.connect(scene.path, timeout=PATIENCE) as other:
                other.ring(0, 1)
            assert os.eventfd_read(fds[0, 1]) == 1
            assert not scene.client.wait(1, 0)
    finally:
        for fd in fds.values():
            os.close(fd)
    scene.all_quiet()


def test_a_peer_can_hold_up_who_rings_it(scene: Scene) -> None:
    """And nobody else: not the server, no other thread; until somebody reads its eventfd."""
    fds: dict[tuple[int, int], int] = {}
    with attack(HOLDS_UP, 1, scene.path, VECTORS) as (child,):
        peer = int(child.line())
        until(lambda: peer in scene.client.peers)
        try:
            with RawPeer(scene.path, lambda *key: fds.update({key[:2]: key[2]})) as helper:
                helper.set_up(VECTORS)
                assert eventfd_id(fds[0, 0]) == scene.witness.vectors[0][0]
                held = Background(lambda: scene.client.ring(peer))
                held.wait_until_writing()
                scene.go_on(1)
                assert held.running
                os.eventfd_read(fds[peer, 0])
                held.result()
        finally:
            for fd in fds.values():
                os.close(fd)
    scene.all_quiet()


def test_flags_that_were_cleared_do_not_matter_to_the_server(scene: Scene) -> None:
    """It never reads or writes a peer's eventfd."""
    with attack(CLEARS_NONBLOCK, 1, scene.path, VECTORS):
        scene.go_on(1)
    scene.all_quiet()


# -- QEMU -----------------------------------------------------------------------------------------


@pytest.fixture
def qemu(scene: Scene) -> Iterator[subprocess.Popen[bytes]]:
    """One that is a peer, with id 3, and has not started its guest."""
    command = [QEMU, "-accel", "tcg", "-machine", "q35", "-nodefaults"]
    command += ["-display", "none", "-S", "-qmp", "stdio"]
    command += ["-chardev", f"socket,id=bells,path={scene.path}"]
    command += ["-device", f"ivshmem-doorbell,chardev=bells,vectors={VECTORS}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert b"QMP" in process.stdout.readline()
            assert b"return" in ask(process, "qmp_capabilities").readline()
            assert b"return" in ask(process, "query-status").readline()
            until(lambda: scene.knows(3))
            yield process
        finally:
            process.kill()


def hangs(process: subprocess.Popen[bytes]) -> bool:
    """Whether its main thread waits in read(2), where it never does otherwise."""
    return sleeps_in_read_of(process.pid)


def ask(process: subprocess.Popen[bytes], question: str) -> IO[bytes]:
    """Where the answer will be."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b'{"execute":"%s"}\n' % question.encode())
    process.stdin.flush()
    return process.stdout


def answers(process: subprocess.Popen[bytes]) -> bool:
    """Whether its main loop answers. If it hangs, the answer comes later."""
    answer = ask(process, "query-status")
    until(lambda: select.select([answer], [], [], 0)[0] or hangs(process))
    return bool(select.select([answer], [], [], 0)[0]) and b"return" in answer.readline()


@pytest.mark.sampled(3)
@needs_qemu
@pytest.mark.qemu
@pytest.mark.parametrize("name", sorted({*ATTACKS} - {"clears O_NONBLOCK"}))
def test_qemu_goes_on(scene: Scene, qemu: subprocess.Popen[bytes], name: str) -> None:
    source, _ = ATTACKS[name]
    with attack(source, 1, scene.path, VECTORS):
        for _ in range(20):
            scene.client.ring(3)
            assert answers(qemu)
        scene.go_on(2)
    assert answers(qemu)
    qemu.kill()
    scene.all_quiet()


@needs_qemu
@pytest.mark.qemu
def test_a_peer_can_stop_qemu(scene: Scene, qemu: subprocess.Popen[bytes]) -> None:
    """It rings, and takes the interrupt away between QEMU's poll and its read, which then waits.

    The next ring lets it go on.
    """
    fds: dict[tuple[int, int], int] = {}
    try:
        with RawPeer(scene.path, lambda *key: fds.update({key[:2]: key[2]})) as thief:
            thief.set_up(VECTORS)
            bell = fds[3, 0]

            def steal() -> bool:
                for _ in range(1000):
                    os.eventfd_write(bell, 1)
                    os.set_blocking(bell, False)
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(bell)
                    os.set_blocking(bell, True)
                return hangs(qemu)

            until(steal, "QEMU hangs")
            scene.go_on(1)
            assert not answers(qemu)
            scene.client.ring(3, 0)
            assert qemu.stdout is not None
            assert b"return" in qemu.stdout.readline()
    finally:
        for fd in fds.values():
            os.close(fd)
    qemu.kill()
    scene.all_quiet()
