"""A peer whose news are held: what it is sent, how that ends, and who can ask for it."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import commands
from support.peer import RawPeer
from support.served import Served
from support.waiting import PATIENCE, Background, until

import ivshmem
import ivshmem.system.listener
from ivshmem import control, testing
from ivshmem.control import ControlError
from ivshmem.errors import UnplugPending
from ivshmem.lasting.journal import Journal, Section
from ivshmem.migration.model import Step
from ivshmem.migration.servers import messages_held
from ivshmem.server.records import member_record
from ivshmem.server.region_server import RegionServer

pytestmark = pytest.mark.usefixtures("commands")

VECTORS = 2
LONG = 1e5  # seconds: it does not end by itself


@pytest.fixture
def served(socket_path: str) -> Iterator[Served]:
    with Served(socket_path, VECTORS, size=4096) as served:
        yield served


@pytest.fixture
def asker(served: Served) -> Iterator[control.ControlClient]:
    with control.ControlClient(control.default_path(served.server().path), PATIENCE) as client:
        yield client


def joined(served: Served) -> RawPeer:
    return RawPeer(served.server().path).set_up(VECTORS)


def held(served: Served) -> dict[int, float | None]:
    """Who is held, and until when."""
    return {r.peer.id: r.held_until for r in served.server().report() if r.held}


def silent(peer: RawPeer, served: Served) -> bool:
    """Whether nothing comes, though all others have been told what there is."""
    with joined(served):
        return not peer.readable(0)


def test_nothing_is_sent_until_it_is_released(served: Served, asker: control.ControlClient) -> None:
    with joined(served) as peer, joined(served) as other:
        peer.take_until(lambda: peer.counts.get(other.id) == VECTORS)
        asker.hold(peer.id)
        with joined(served) as third:
            assert silent(peer, served)
            other.close()
            until(lambda: len(served.server().peers) == 2)
            assert silent(peer, served)
            assert asker.release(peer.id) is True
            peer.take_until(lambda: peer.counts.get(third.id) == VECTORS)
            assert peer.left == {other.id}, "and of those that came and went it never hears"
    assert not held(served)


def test_it_answers_when_all_was_read(served: Served) -> None:
    path = control.default_path(served.server().path)
    with joined(served) as peer, joined(served):
        with control.ControlClient(path, timeout=0.2) as hasty:
            with pytest.raises(TimeoutError, match="has not read all that it was sent"):
                hasty.hold(peer.id)
            assert set(held(served)) == {peer.id}, "it is held all the same"
            with pytest.raises(TimeoutError):
                hasty.hold(peer.id)
            assert peer.drain() == VECTORS
            hasty.hold(peer.id)
            # The remedy that the error names.
            hasty.release(peer.id)
        assert not held(served)


def test_a_set_up_is_completed(served: Served, asker: control.ControlClient) -> None:
    """It may not fit into the buffer of the socket: QEMU, which is starting, waits for the rest."""
    with Served(f"{served.server().path}2", 200, size=4096) as wide:
        path = control.default_path(wide.server().path)
        with RawPeer(wide.server().path) as first, RawPeer(wide.server().path) as peer:
            until(lambda: len(wide.server().peers) == 2)
            with control.ControlClient(path, timeout=0.1) as hasty, pytest.raises(TimeoutError):
                hasty.hold(1)
            with RawPeer(wide.server().path) as later:
                peer.set_up(200)
                with control.ControlClient(path, PATIENCE) as client:
                    client.hold(1)
                    assert set(peer.counts) == {0, 1}
                    client.release(1)
                    peer.take_until(lambda: peer.counts.get(2) == 200)
                later.set_up(200)
            first.set_up(200)


def test_it_lasts_as_long_as_its_asker_and_the_time_after(served: Served) -> None:
    path = control.default_path(served.server().path)
    with joined(served) as peer:
        with (
            control.ControlClient(path, PATIENCE) as first,
            control.ControlClient(path, PATIENCE) as second,
        ):
            first.hold(peer.id, linger=0.05)
            second.hold(peer.id, linger=0.05)
            first.close()
            with joined(served) as other:
                assert silent(peer, served)
                assert held(served) == {peer.id: None}
                second.close()
                begun = time.monotonic()
                peer.take_until(lambda: peer.counts.get(other.id) == VECTORS)
                assert time.monotonic() - begun > 0.02
        until(lambda: not held(served))


def test_one_without_a_limit_outlives_its_asker(served: Served) -> None:
    path = control.default_path(served.server().path)
    with joined(served) as peer:
        with control.ControlClient(path, PATIENCE) as client:
            client.hold(peer.id, linger=None)
        with control.ControlClient(path, PATIENCE) as client:
            client.hold(peer.id, linger=0.001)
        with joined(served):
            assert silent(peer, served)
        assert held(served) == {peer.id: None}
        assert served.server().release(peer.id)


def test_an_asker_that_is_killed_is_gone(served: Served) -> None:
    path = control.default_path(served.server().path)
    program = (
        "import sys; from ivshmem.control import ControlClient\n"
        "client = ControlClient(sys.argv[1]); client.hold(0, linger=0.1)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with joined(served) as peer:
        with subprocess.Popen(
            [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            assert held(served) == {peer.id: None}
            child.kill()
        until(lambda: not held(served))
        with joined(served) as other:
            peer.take_until(lambda: peer.counts.get(other.id) == VECTORS)


def test_it_ends_when_the_peer_disconnects(served: Served, asker: control.ControlClient) -> None:
    with joined(served) as peer:
        asker.hold(peer.id)
    until(lambda: not served.server().peers)
    with joined(served) as again:
        assert again.id == peer.id
        assert not held(served), "its id is another peer's now"
        with joined(served) as other:
            again.take_until(lambda: again.counts.get(other.id) == VECTORS)


def test_one_that_is_evicted_is_not_held(served: Served, asker: control.ControlClient) -> None:
    with joined(served) as peer:
        asker.hold(peer.id)
        served.server().evict(peer.id)
        with pytest.raises(ControlError, match="peer 0 is not connected"):
            asker.release(peer.id)


def test_releasing_what_is_not_held(served: Served, asker: control.ControlClient) -> None:
    with joined(served) as peer:
        assert asker.release(peer.id) is False


@pytest.mark.parametrize("linger", [0, -1, True, "60", 1e7, [1]])
def test_a_time_that_is_not_allowed(
    served: Served, asker: control.ControlClient, linger: object
) -> None:
    with joined(served) as peer:
        with pytest.raises(ControlError, match=r'"linger" is .*: allowed are more than 0 and'):
            asker.ask({"do": "hold", "id": peer.id, "linger": linger})
        assert not held(served)


@pytest.mark.parametrize("peer", [7, 65536, -1])
@pytest.mark.parametrize("do", ["hold", "release"])
def test_a_peer_that_is_not_there(asker: control.ControlClient, do: str, peer: int) -> None:
    with pytest.raises(ControlError, match=f"peer {peer} is not connected .*`ivshmem status --con"):
        asker.ask({"do": do, "id": peer})


@pytest.mark.parametrize("peer", [None, "0", True, [0], 0.0])
@pytest.mark.parametrize("do", ["hold", "release"])
def test_what_is_no_peer(asker: control.ControlClient, do: str, peer: object) -> None:
    with pytest.raises(ControlError, match=r'"id" is .*expected the number of a peer'):
        asker.ask({"do": do, "id": peer})


# -- the library ----------------------------------------------------------------------------------


def test_a_server_of_ones_own() -> None:
    with testing.server("4K", vectors=1) as server:
        with RawPeer(server.path).set_up(1) as peer:
            until(lambda: server.hold(0, linger=None))
            assert [(r.held, r.held_until) for r in server.report()] == [(True, None)]
            with RawPeer(server.path).set_up(1):
                assert not peer.readable(0)
                assert server.release(0) is True
                assert server.release(0) is False
                peer.take_until(lambda: peer.counts.get(1) == 1)
            server.hold(0, linger=LONG)
            assert server.report()[0].held_until == pytest.approx(time.time() + LONG, abs=60)
        with pytest.raises(ivshmem.NoSuchPeer):
            server.hold(7)


@pytest.mark.parametrize("call", ["hold", "release"])
def test_in_a_signal_handler(tmp_path: Path, call: str) -> None:
    """It may interrupt the step, and neither waits for the other."""
    with ivshmem.Server(tmp_path / "s", "4K", vectors=1) as server:
        act: Callable[[int], bool] = getattr(server, call)
        before = signal.signal(signal.SIGUSR1, lambda *_: act(0))
        try:
            with RawPeer(server.path) as peer:
                server.step(PATIENCE)
                peer.set_up(1)
                for _ in range(50):
                    os.kill(os.getpid(), signal.SIGUSR1)
                    server.step(0)
                assert server.report()[0].held == (call == "hold")
        finally:
            signal.signal(signal.SIGUSR1, before)


# -- a successor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("linger", [LONG, None])
@pytest.mark.parametrize("rewritten", [False, True])
def test_a_successor_goes_on_with_it(tmp_path: Path, rewritten: bool, linger: float | None) -> None:
    """By the journal; whoever asked for it is gone then, so the time begins to run."""
    journal = Journal()
    region = ivshmem.Region.create("4K")
    listener = ivshmem.system.listener.Listener(tmp_path / "s")
    listener.unlinks = False
    with RegionServer(listener, region, 1, journal=Section(journal, 1)) as former:
        peer, other = RawPeer(former.path), RawPeer(former.path)
        while len(former.peers) < 2:
            former.step(0)
        former.step(0)
        peer.set_up(1).take_until(lambda: peer.counts.get(1) == 1)
        other.set_up(1)
        assert former.hold(0, linger=linger, asker="x")
        assert former.hold(1, linger=LONG, asker="x")
        assert former.release(1)
        if rewritten:
            journal.rewrite(former.snapshot())
        copies = {fd: os.dup(fd) for fd in former.descriptors}
        listening = listener.socket.dup()
        former.abandon()
    state, records = journal.read()
    again = ivshmem.system.listener.Listener(tmp_path / "s2")
    with listening, RegionServer(again, region, 1, journal=Section(journal, 1)) as server:
        told = [member_record(*record) for _, *record in records]
        server.resume(state, told, None, copies.get)
        (one, two) = server.report()
        assert (one.held, two.held) == (True, False)
        if linger is None:
            assert one.held_until is None, "for ever"
        else:
            assert one.held_until == pytest.approx(time.time() + linger, abs=60)
        third = RawPeer(server.path)
        while len(server.peers) < 3:
            server.step(0)
        server.step(0)
        other.take_until(lambda: other.counts.get(2) == 1)
        assert not peer.readable(0)
        server.release(0)
        server.step(0)
        peer.take_until(lambda: peer.counts.get(2) == 1)
        for each in (peer, other, third):
            each.close()
    region.close()
    del former, server  # which have the journal's memory in use
    gc.collect()
    journal.close()


# -- the command line -----------------------------------------------------------------------------


def ivshmem_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.run(*arguments)


def test_by_hand(served: Served) -> None:
    path = served.server().path
    with joined(served) as peer:
        done = ivshmem_cli("hold", "0", "-S", path, "--seconds", "1000")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "messages to peer 0 are held back for 1000 seconds\n"
        with joined(served) as other:
            assert not peer.readable(0)
            shown = ivshmem_cli("status", "-S", path).stdout
            assert re.search(r"held for 16 min \d\d s", shown)
            assert f"{VECTORS} unsent" in shown
            done = ivshmem_cli("release", "0", "-S", path)
            assert (done.returncode, done.stdout) == (0, "messages to peer 0 are sent again\n")
            peer.take_until(lambda: peer.counts.get(other.id) == VECTORS)
        done = ivshmem_cli("release", "0", "-S", path)
        assert (done.returncode, done.stdout) == (0, "peer 0 was not held\n")


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "inf", "1e7"])
def test_seconds_that_are_none(seconds: str) -> None:
    done = ivshmem_cli("hold", "0", f"--seconds={seconds}")
    assert done.returncode == 2
    assert "allowed are more than 0 and at most 1e+06 seconds" in done.stderr


def test_a_guest_that_has_longer_is_held_longer(served: Served) -> None:
    """`migrate --timeout 300`: its hold continues for as long, should the guest let go late."""
    path = control.default_path(served.server().path)
    with joined(served) as peer:
        step = Step("unplug", control=path, region="default", pid=os.getpid())

        async def unplug() -> None:
            async with messages_held(step, 300.0):
                raise UnplugPending("the guest has not let go of it")

        migrating = Background(lambda: asyncio.run(unplug()))
        until(lambda: held(served))
        with pytest.raises(UnplugPending):
            migrating.result()
        until(lambda: held(served)[peer.id] is not None)
        assert 200 < (held(served)[peer.id] or 0) - time.time() <= 300
