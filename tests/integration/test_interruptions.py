"""What may be called when: a server's calls from threads, callbacks, signal handlers and forks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from support.interruption import interrupted, no_deadlock
from support.peer import RawPeer
from support.waiting import PATIENCE, Background, in_child, until

import ivshmem
from ivshmem import ClosedError, NoSuchPeer, Server, ServerFailed
from ivshmem.server.access import Verdict
from ivshmem.server.region_server import RegionServer
from ivshmem.system.credentials import Credentials

VECTORS = 2


def admit(_who: Credentials, _peers: int | None) -> Verdict:
    return Verdict(True)


class Scene:
    """A server with three peers, of which one is to be evicted."""

    def __init__(self, path: str, **hooks: Any) -> None:
        self.path = path
        self.undo = ExitStack()
        self.server = self.undo.enter_context(RegionServer(path, 4096, VECTORS, **hooks))
        self.peers = [self.undo.enter_context(RawPeer(path)) for _ in range(3)]
        while len(self.server.peers) < 3:
            self.server.step(PATIENCE)
        self.server.step(0)
        for peer in self.peers:
            peer.set_up(VECTORS)

    def news(self) -> None:
        """Let the next step have much to do: a join, a leave."""
        self.peers.pop(0).close()
        self.peers.append(self.undo.enter_context(RawPeer(self.path)))

    def catch_up(self) -> None:
        """Make steps until nothing is left to do, and have peers take what they are sent."""
        while not self.server.closed:
            self.server.step(0)
            if not sum(peer.drain() for peer in self.peers if not peer.eof):
                break

    def check(self) -> None:
        """Each peer that is connected knows exactly the others, each with all its vectors."""
        there = {peer.id for peer in self.server.peers}
        for peer in self.peers:
            if peer.id in there:
                assert not peer.eof
                assert peer.counts == dict.fromkeys(there, VECTORS)
            else:
                assert peer.eof

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()


# What a handler or a callback does to the scene's server, and what has to be so in the end.


def report(scene: Scene) -> None:
    found = scene.server.report()
    ids = [each.peer.id for each in found]
    assert ids == sorted(set(ids))
    assert len(ids) in (2, 3, 4)
    assert all(len(each.interrupts) == VECTORS for each in found)
    assert all(0 <= each.pending <= 3 + 5 * VECTORS for each in found)


def evict(scene: Scene) -> None:
    with contextlib.suppress(NoSuchPeer):  # it has been done already
        scene.server.evict(1)


def evict_nobody(scene: Scene) -> None:
    with pytest.raises(NoSuchPeer):
        scene.server.evict(7)


def hold(scene: Scene) -> None:
    scene.server.hold_leaves(True)


def mute(scene: Scene) -> None:
    """Of one that stays: it is told the rest when this ends."""
    scene.server.hold(2, linger=None)


def unmute(scene: Scene) -> None:
    """One that was held, if `mute` was called before, is told what it missed."""
    scene.server.release(2)


def mute_nobody(scene: Scene) -> None:
    with pytest.raises(NoSuchPeer):
        scene.server.hold(7)
    with pytest.raises(NoSuchPeer):
        scene.server.release(7)


def forget(scene: Scene) -> None:
    """Held and let go by the end of who asked; 60 seconds are not waited for."""
    scene.server.hold(2, asker=scene)
    scene.server.asker_is_gone(scene)
    scene.server.release(2)


def close(scene: Scene) -> None:
    scene.server.close()


def stop(scene: Scene) -> None:
    scene.server.stop()


def gate(scene: Scene) -> None:
    scene.server.set_gate(admit)


def look(scene: Scene) -> None:
    server = scene.server
    assert len(server.peers) in (0, 2, 3, 4)
    assert server.counts.joins in (3, 4)
    assert server.paused == ""
    assert server.error is None
    assert repr(server)
    assert server.holds_leaves in (True, False)
    assert server.serving in (True, False)
    with contextlib.suppress(ClosedError):
        assert server.fileno() >= 0


ACTS: dict[str, Callable[[Scene], None]] = {
    each.__name__: each
    for each in (
        *(report, evict, evict_nobody, hold, close, stop, gate, look),
        *(mute, unmute, mute_nobody, forget),
    )
}
HARMLESS = [each for each in ACTS if each not in ("evict", "close")]
LASTING = ["evict", "close"]


def has_come_true(scene: Scene, act: str) -> None:
    if act == "close":
        assert scene.server.closed
        assert not os.path.exists(scene.path)
        return
    if act == "evict":
        assert 1 not in {peer.id for peer in scene.server.peers}
    if act == "hold":
        assert scene.server.holds_leaves
    held = {each.peer.id for each in scene.server.report() if each.held}
    assert held == ({2} if act == "mute" else set())
    if held:
        assert scene.server.release(2)
        scene.catch_up()
    scene.check()


def guarded(act: str, scene: Scene) -> None:
    """As a handler does it that may come when the server is closed already."""
    with contextlib.suppress(ClosedError):
        ACTS[act](scene)


# -- the frame that makes the steps ---------------------------------------------------------------


def by_step(scene: Scene) -> None:
    with contextlib.suppress(ClosedError):
        scene.server.step(0)


def by_serve_forever(scene: Scene) -> None:
    """It ends by itself when the newcomer has joined."""
    scene.server._engine._on_join = lambda _peer: scene.server.stop()
    with contextlib.suppress(ClosedError):
        scene.server.serve_forever()


# By day at some moments; a prime number, so that no loop of the call has the same one each time.
EVERY = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.nightly)])
RUNS = {"step": by_step, "serve_forever": by_serve_forever}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("act", HARMLESS)
def test_a_handler_at_each_bytecode_of_a_step(socket_path: str, run: str, act: str) -> None:
    with Scene(socket_path) as scene:
        scene.news()
        moments = interrupted(lambda: RUNS[run](scene), lambda: ACTS[act](scene), opcodes=True)
        assert len(moments) > 200
        scene.catch_up()
        assert scene.server.counts.joins == 4
        assert scene.server.counts.leaves == 1
        has_come_true(scene, act)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("act", LASTING)
@EVERY
def test_a_handler_at_each_line_of_a_step(socket_path: str, every: int, run: str, act: str) -> None:
    with Scene(socket_path) as scene:
        scene.news()
        moments = interrupted(lambda: RUNS[run](scene))
    assert len(moments) > 100
    chosen = list(moments.items())[::every]
    handled = missed = 0

    def handler() -> None:
        nonlocal handled
        handled += 1
        guarded(act, scene)

    for at, module in chosen:
        if run == "serve_forever" and module not in ("server", "loop"):
            continue  # the same as in a step
        with Scene(socket_path) as scene:
            scene.news()
            before = handled
            interrupted(lambda: RUNS[run](scene), handler, at=at)
            scene.catch_up()
            if handled == before:
                missed += 1  # the kernel told of less news at once than at first: fewer lines
            else:
                has_come_true(scene, act)
    assert missed <= len(chosen) // 10


# -- a frame that calls a server which runs in a thread, or which nobody runs ----------------------

CALLS: dict[str, Callable[[Server], object]] = {
    "report": lambda server: server.report(),
    "evict": lambda server: server.evict(1),
    "hold": lambda server: server.hold_leaves(True),
    "mute": lambda server: server.hold(2, linger=None),
    "unmute": lambda server: server.release(2),
    "close": lambda server: server.close(),
    "stop": lambda server: server.stop(),
}


# All with all, except that what holds news meets only what could disturb it.
_MUTES = {"mute", "unmute", "mute_nobody", "forget"}
PAIRS = [
    (call, act)
    for call in CALLS
    for act in ACTS
    if not {call, act} & _MUTES
    or (call in _MUTES and act in ("report", "close", "mute", "forget"))
    or (call in ("report", "evict") and act in ("mute", "forget"))
]


@pytest.mark.sampled(28)
@pytest.mark.parametrize("started", [True, False], ids=["started", "idle"])
@pytest.mark.parametrize(("call", "act"), PAIRS)
def test_a_handler_at_each_line_of_a_call(
    socket_path: str, call: str, act: str, started: bool
) -> None:

    def make() -> None:
        with contextlib.suppress(ClosedError, NoSuchPeer):
            CALLS[call](scene.server)

    def begin() -> None:
        if started:
            scene.server.start()

    with Scene(socket_path) as scene:
        begin()
        moments = interrupted(make)
    assert len(moments) >= 3
    handled = 0

    def handler() -> None:
        nonlocal handled
        handled += 1
        guarded(act, scene)

    for at in moments:
        with Scene(socket_path) as scene:
            begin()
            before = handled
            interrupted(make, handler, at=at)
            if handled == before:
                continue  # the thread left the lock sooner than at first: the call had fewer lines
            if "close" in (call, act):
                assert scene.server.closed
                assert not os.path.exists(socket_path)
            elif "evict" in (call, act):
                assert 1 not in {peer.id for peer in scene.server.peers}
            if "hold" in (call, act) and not scene.server.closed:
                assert scene.server.holds_leaves
            if "mute" in (call, act) and not {"unmute", "forget", "close"} & {call, act}:
                assert [each.peer.id for each in scene.server.report() if each.held] == [2]
    assert handled


@pytest.mark.parametrize("act", ["report", "evict", "hold", "look", "mute", "forget"])
def test_real_signals_all_the_time(socket_path: str, act: str) -> None:
    """A handler that calls the server while the main thread does the same, by hundreds."""
    handled = depth = 0

    with Scene(socket_path) as scene:

        def handle(*_: object) -> None:
            nonlocal handled, depth
            handled += 1
            depth += 1  # a handler can be interrupted, too
            ACTS[act](scene)
            depth -= 1

        scene.server.start()
        before = signal.signal(signal.SIGUSR1, handle)
        me = threading.get_ident()
        done = threading.Event()

        def send() -> None:
            while not done.wait(0.0003):
                if depth < 5:
                    signal.pthread_kill(me, signal.SIGUSR1)

        sender = Background(send)
        try:
            with no_deadlock():
                while handled < 200:
                    scene.server.report()
                    evict(scene)
                    scene.server.hold_leaves(False)
        finally:
            done.set()
            sender.result()
            signal.signal(signal.SIGUSR1, before)


def test_a_handler_may_wait_for_the_server_that_its_thread_asks(socket_path: str) -> None:
    """The server's thread does what is asked, so an interrupted call holds nothing up."""
    with Scene(socket_path) as scene:
        scene.server.start()
        moments = interrupted(scene.server.report)

        def join() -> None:
            with RawPeer(socket_path) as peer:
                peer.set_up(VECTORS)

        for at in moments:
            interrupted(scene.server.report, join, at=at)


# -- the descriptor that signals are written to ----------------------------------------------------


@pytest.mark.parametrize("call", ["step", "serve_forever"])
def test_a_foreign_wakeup_descriptor_stays_and_is_silent(
    socket_path: str, call: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its owner did not want to be warned when it is full, which Python cannot be asked for."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        assert signal.set_wakeup_fd(near.fileno(), warn_on_full_buffer=False) == -1
        handled: list[int] = []
        before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
        try:
            with Scene(socket_path) as scene:
                scene.news()
                RUNS[call](scene)
            with contextlib.suppress(BlockingIOError):
                while True:
                    near.send(bytes(4096))
            signal.raise_signal(signal.SIGUSR1)
            assert handled == [signal.SIGUSR1]
        finally:
            signal.signal(signal.SIGUSR1, before)
            assert signal.set_wakeup_fd(-1) == near.fileno()
    assert capfd.readouterr().err == ""


def test_the_wakeup_descriptor_is_taken_away_again(socket_path: str) -> None:
    """Also one that the program has set while the server ran is left to it."""
    near, far = socket.socketpair()
    with near, far, Scene(socket_path) as scene:
        near.setblocking(False)
        scene.news()
        by_serve_forever(scene)
        assert signal.set_wakeup_fd(-1) == -1

        def change(_peer: ivshmem.Peer) -> None:
            signal.set_wakeup_fd(near.fileno())
            scene.server.stop()

        scene.news()
        scene.server._engine._on_join = change
        scene.server.serve_forever()
        assert signal.set_wakeup_fd(-1) == near.fileno()


# -- callbacks ------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("run", ["step", "start"])
@pytest.mark.parametrize("hook", ["on_join", "on_leave", "gate"])
@pytest.mark.parametrize("act", ACTS)
def test_in_a_callback(socket_path: str, hook: str, act: str, run: str) -> None:
    ready = False
    done = threading.Event()
    errors: list[BaseException] = []

    def act_once(*_: object) -> Verdict:
        if ready and not done.is_set():
            try:
                ACTS[act](scene)
            except BaseException as error:
                errors.append(error)
            done.set()
        return Verdict(True)

    with Scene(socket_path, **{hook: act_once}) as scene, no_deadlock():
        if run == "start":
            scene.server.start()
        ready = True
        scene.news()
        if run == "start":
            assert done.wait(PATIENCE)
            if act == "close":
                until(lambda: scene.server.closed)
            elif act != "stop":
                scene.server.report()  # it goes on
        else:
            scene.catch_up()
            assert done.is_set()
            has_come_true(scene, act)
    assert errors == []


def test_a_close_at_the_end_of_a_step_is_finished(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a Ctrl-C comes just when it has begun."""

    def ends(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with Server(socket_path, 4096, on_join=lambda _: server.close()) as server:
        monkeypatch.setattr(type(server._engine), "close", ends)
        with RawPeer(socket_path) as peer:
            with pytest.raises(KeyboardInterrupt):
                server.step(PATIENCE)
            assert not os.path.exists(socket_path)
            peer.drain()
            assert peer.eof


@pytest.mark.parametrize("call", [Server.step, Server.serve_forever])
@pytest.mark.parametrize("hook", ["on_join", "on_leave", "gate"])
def test_no_step_in_a_step(socket_path: str, hook: str, call: Callable[[Server], None]) -> None:
    refused = 0

    def again(*_: object) -> Verdict:
        nonlocal refused
        with pytest.raises(RuntimeError, match="cannot begin a step"):
            call(scene.server)
        refused += 1
        return Verdict(True)

    with Scene(socket_path) as scene, no_deadlock():
        if hook == "gate":
            scene.server.set_gate(again)
        else:
            setattr(scene.server._engine, f"_{hook}", again)
        scene.news()
        scene.catch_up()
        assert refused
        scene.check()


def test_a_callback_that_hangs_keeps_nobody_from_asking(socket_path: str) -> None:
    release = threading.Event()
    called = threading.Event()

    def hang(_peer: ivshmem.Peer) -> None:
        called.set()
        assert release.wait(PATIENCE)

    with Scene(socket_path) as scene, no_deadlock():
        scene.server._engine._on_leave = hang
        scene.server.start()
        scene.peers.pop().close()
        assert called.wait(PATIENCE)
        assert [each.peer.id for each in scene.server.report()] == [0, 1]
        scene.server.evict(0)
        scene.server.hold_leaves(True)
        scene.server.hold(1)
        assert scene.server.release(1)
        assert [peer.id for peer in scene.server.peers] == [1]
        release.set()


def test_a_lock_of_the_log_that_the_caller_has(socket_path: str) -> None:
    """As when a signal handler interrupts `logging.info` and asks the server."""
    handler = logging.StreamHandler(open(os.devnull, "w"))  # noqa: SIM115
    logger = logging.getLogger("ivshmem.server")
    emitting = threading.Event()
    handler.addFilter(lambda _record: emitting.set() or True)  # type: ignore[func-returns-value]
    logger.addHandler(handler)
    assert handler.lock is not None
    try:
        with Scene(socket_path) as scene, no_deadlock():
            scene.server.set_gate(lambda *_: Verdict(False, reason="for the log"))
            scene.server.start()
            with handler.lock:
                with RawPeer(socket_path) as refused:
                    assert refused.receive() is None
                    assert emitting.wait(PATIENCE)
                    assert len(scene.server.report()) == 3
                    scene.server.evict(1)
                    assert len(scene.server.report()) == 2
    finally:
        logger.removeHandler(handler)
        handler.stream.close()


# -- a gate that fails ----------------------------------------------------------------------------


def wrong(_who: Credentials, _peers: int | None) -> Verdict:
    raise LookupError("a mistake in the gate")


def nothing(_who: Credentials, _peers: int | None) -> Verdict:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize("failing", [wrong, nothing])
@pytest.mark.parametrize("asks", [True, False], ids=["asks", "joins"])
def test_a_gate_that_fails_refuses_that_newcomer(
    socket_path: str,
    failing: Callable[[Credentials, int | None], Verdict],
    asks: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Scene(socket_path) as scene:
        scene.server.set_gate(failing)
        scene.server.start()
        with socket.socket(socket.AF_UNIX) as sock:
            if asks:
                sock.bind(b"\0ivshmem-ask-" + os.urandom(8).hex().encode())
            sock.settimeout(PATIENCE)
            sock.connect(socket_path)
            assert sock.recv(100) == b""
        assert len(scene.server.report()) == 3
        assert scene.server.counts.refused == 1
        assert "the gate failed" in caplog.text
        if failing is wrong:
            assert "a mistake in the gate" in caplog.text
        scene.server.set_gate(admit)
        with RawPeer(socket_path) as peer:
            peer.set_up(VECTORS)
            assert peer.id == 3


def test_a_gate_that_raises_what_is_no_exception_ends_the_server(socket_path: str) -> None:
    def leave(*_: object) -> Verdict:
        raise SystemExit(3)

    def serve() -> None:
        with Scene(socket_path) as scene:
            scene.server.set_gate(leave)
            scene.server.start()
            with RawPeer(socket_path) as peer:
                assert peer.receive() is None
            until(lambda: scene.server.closed)

    with pytest.raises(ServerFailed, match="SystemExit: 3"):
        serve()


# -- a thread that fails --------------------------------------------------------------------------


def fail_in_the_next_step(server: Server) -> None:
    def fail(_ready: object) -> bool:
        raise ZeroDivisionError("what nobody thought of")

    server._engine.poller.dispatch = fail  # type: ignore[method-assign, assignment]
    server._engine.wake()


def test_a_server_whose_thread_fails_says_so(
    socket_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    def serve() -> None:
        with Server(socket_path).start() as server:
            assert server.serving
            assert not server.closed
            assert server.error is None
            fail_in_the_next_step(server)
            until(lambda: server.closed)
            until(lambda: not server.serving)
            assert isinstance(server.error, ZeroDivisionError)
            for call in (server.report, server.step, server.fileno, server.start):
                with pytest.raises(ServerFailed) as error:
                    call()
                assert isinstance(error.value.__cause__, ZeroDivisionError)
            server.close()  # says nothing: it is for cleaning up

    with pytest.raises(ServerFailed, match="what nobody thought of") as failed:
        serve()
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert "failed, and closes" in caplog.text


def test_an_error_in_the_block_is_not_hidden(socket_path: str) -> None:
    def serve() -> None:
        with Server(socket_path).start() as server:
            fail_in_the_next_step(server)
            until(lambda: server.closed)
            raise KeyError

    with pytest.raises(KeyError):
        serve()


def test_who_waits_is_told_that_the_thread_failed(socket_path: str) -> None:
    with Server(socket_path) as server:
        entered = threading.Event()
        leave = threading.Event()

        def wait(_ready: object) -> bool:
            entered.set()
            assert leave.wait(PATIENCE)
            raise ZeroDivisionError

        server._engine.poller.dispatch = wait  # type: ignore[method-assign, assignment]
        server.start()
        server._engine.wake()
        assert entered.wait(PATIENCE)
        asking = Background(server.report)
        until(lambda: len(server._turns._commands))
        leave.set()
        with contextlib.suppress(ServerFailed):  # or answered just before
            asking.result()
        server.error = None


def test_serving(socket_path: str) -> None:
    with Server(socket_path) as server:
        assert not server.serving
        running = Background(server.serve_forever)
        until(lambda: server.serving)
        server.stop()
        running.result()
        assert not server.serving
        server.start()
        assert server.serving
        with pytest.raises(RuntimeError, match="in a thread already"):
            server.start()
        server.stop()
        until(lambda: not server.serving)
    assert server.closed
    assert not server.serving


# -- forks ----------------------------------------------------------------------------------------


def test_in_a_forked_child(socket_path: str) -> None:
    """Also one that is forked while the server's thread has the locks."""

    def child() -> None:
        for call in (server.report, server.step, server.start, server.serve_forever):
            with pytest.raises(RuntimeError, match="forked child"):
                call()
        with pytest.raises(RuntimeError, match="forked child"):
            server.evict(0)
        with pytest.raises(RuntimeError, match="forked child"):
            server.hold_leaves(True)
        for ask in (server.hold, server.release, server.asker_is_gone):
            with pytest.raises(RuntimeError, match="forked child"):
                ask(0)
        server.stop()
        assert server.peers == []
        server.close()

    with Server(socket_path).start() as server:
        with server._turns.work:
            in_child(child)
        with RawPeer(socket_path) as peer:
            peer.set_up(1)


# -- asyncio --------------------------------------------------------------------------------------


def test_driven_by_asyncio(socket_path: str) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        joined: asyncio.Queue[int] = asyncio.Queue()
        left: asyncio.Queue[int] = asyncio.Queue()
        signalled = asyncio.Event()

        def on_signal() -> None:
            server.report()
            signalled.set()

        with Server(
            socket_path,
            on_join=lambda peer: joined.put_nowait(peer.id),
            on_leave=lambda peer: left.put_nowait(peer.id),
        ) as server:
            fd = server.fileno()
            loop.add_reader(fd, server.step, 0)
            loop.add_signal_handler(signal.SIGUSR1, on_signal)
            try:
                with RawPeer(socket_path), RawPeer(socket_path):
                    ids = [await joined.get(), await joined.get()]
                    assert [each.peer.id for each in server.report()] == ids
                    server.evict(0)
                    assert await left.get() == 0
                    reports = await asyncio.gather(
                        *(asyncio.to_thread(server.report) for _ in range(8))
                    )
                    assert [len(each) for each in reports] == [1] * 8
                    os.kill(os.getpid(), signal.SIGUSR1)
                    await signalled.wait()
                assert await left.get() == 1
            finally:
                loop.remove_reader(fd)
                loop.remove_signal_handler(signal.SIGUSR1)
        return ids

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == [0, 1]
