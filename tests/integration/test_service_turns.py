"""A service's calls from callbacks and threads; and what one region does stops no other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.interruption import no_deadlock
from support.peer import RawPeer
from support.running import Running
from support.serving import running
from support.waiting import PATIENCE, Background, until

import ivshmem
from ivshmem import control
from ivshmem.config import ConfigError, RegionConfig, ServiceConfig
from ivshmem.service import control as service_control
from ivshmem.service import open_region, service
from ivshmem.service.open_region import Opened
from ivshmem.service.service import Service
from ivshmem.system.listener import Listener

BOUND = 5.0  # seconds for a join on a busy machine; alone it takes some milliseconds


class Regions:
    """Configurations of regions a, b, c .. whose sockets are in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, names: str) -> ServiceConfig:
        found = {name: RegionConfig(str(self.directory / name), size=4096) for name in names}
        return ServiceConfig(found)

    def listens(self, name: str) -> bool:
        """Whether clients can connect."""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self.directory / name)) == 0

    def join(self, name: str) -> float:
        """Seconds until a newcomer is set up."""
        began = time.monotonic()
        with RawPeer(str(self.directory / name)) as peer:
            peer.set_up(1)
        return time.monotonic() - began


@pytest.fixture
def regions(directory: Path) -> Regions:
    return Regions(directory)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow()
    monkeypatch.setattr(service, "open_region", made.open)
    yield made
    made.release.set()


class Slow:
    """Opens a region as if its memory took minutes to populate, once it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()
        self.wanted = False
        self.error: Exception | None = None
        self._open = open_region.open_region

    def open(self, config: RegionConfig, inherited: Listener | None = None) -> Opened:
        if self.wanted:
            self.begun.set()
            assert self.release.wait(PATIENCE)
            if self.error is not None:
                raise self.error
        return self._open(config, inherited)


def is_gone(served: Service, name: str) -> bool:
    return name not in served.regions


# -- what takes long ------------------------------------------------------------------------------


def test_others_are_served_while_memory_is_populated(regions: Regions, slow: Slow) -> None:
    with no_deadlock(60), running(regions("ab")) as runs:
        slow.wanted = True
        changing = Background(lambda: runs.change(regions("abc")))
        assert slow.begun.wait(PATIENCE)
        for name in "abab":
            assert regions.join(name) < BOUND
        assert changing.running
        assert "c" not in runs.service.regions
        slow.release.set()
        assert changing.result() == ["region c: added"]
        assert regions.join("c") < BOUND


def test_real_memory_is_populated_beside_the_loop(regions: Regions) -> None:
    """Without a thread, no join is answered between the first page and the last."""
    wanted = regions("a").regions
    big = RegionConfig(str(regions.directory / "big"), size=256 << 20, prealloc=True)
    joins = []
    with no_deadlock(60), running(regions("a")) as runs:
        changing = Background(lambda: runs.change(ServiceConfig({**wanted, "big": big})))
        while changing.running:
            joins.append(regions.join("a"))
        assert changing.result() == ["region big: added"]
        assert regions.join("big") < BOUND
    assert joins
    assert max(joins) < BOUND


def test_what_fails_beside_the_loop_changes_nothing(regions: Regions, slow: Slow) -> None:
    with no_deadlock(60), running(regions("a")) as runs:
        slow.wanted = True
        slow.error = OSError(28, "no memory")
        changing = Background(lambda: runs.change(regions("abc")))
        assert slow.begun.wait(PATIENCE)
        assert regions.join("a") < BOUND
        slow.release.set()
        with pytest.raises(OSError, match="no memory"):
            changing.result()
        assert list(runs.service.regions) == ["a"]
        slow.wanted = False
        assert runs.change(regions("ab")) == ["region b: added"]


def test_one_change_at_a_time(regions: Regions, slow: Slow) -> None:
    with no_deadlock(60), running(regions("ab")) as runs:
        # An act of its own, as SIGHUP's is: the one that waits is not begun again.
        second: list[object] = []
        slow.wanted = True

        def joined(_name: str, _peer: ivshmem.Peer) -> None:
            assert runs.service.changing
            with pytest.raises(ConfigError, match="another change is under way"):
                runs.service.change(regions("a"))
            second.append("refused")

        changing = Background(lambda: runs.change(regions("abc")))
        assert slow.begun.wait(PATIENCE)
        runs.service.regions["a"].server._engine._on_join = lambda peer: joined("a", peer)
        regions.join("a")
        until(lambda: second)
        slow.release.set()
        changing.result()


def test_regions_that_end_while_another_is_opened(regions: Regions, slow: Slow) -> None:
    """One that is to be removed anyway, and one that is to stay."""
    with no_deadlock(60), running(regions("abx")) as runs:
        slow.wanted = True
        changing = Background(lambda: runs.change(regions("axc")))
        assert slow.begun.wait(PATIENCE)
        for name in "bx":
            server = runs.service.regions[name].server

            def fail(_ready: object) -> bool:
                raise ZeroDivisionError

            server._engine.poller.dispatch = fail  # type: ignore[method-assign, assignment]
            server._engine.wake()
            until(partial(is_gone, runs.service, name))
        slow.release.set()
        changing.result()
        assert sorted(runs.service.regions) == ["a", "c"]
        regions.join("c")


def test_a_reload_by_the_control_socket(regions: Regions, slow: Slow) -> None:
    sockets = {name: str(regions.directory / name) for name in "ab"}
    path = str(regions.directory / "control")
    wanted = regions("abc")
    with no_deadlock(60), Running(sockets, vectors=1, load=lambda: wanted) as served:
        served.add(service_control.Control(service_control.listen(path), served.service))
        served.start()
        slow.wanted = True
        reloading = Background(lambda: control.request(path, {"do": "reload"}, PATIENCE))
        assert slow.begun.wait(PATIENCE)
        assert regions.join("a") < BOUND
        assert regions.join("b") < BOUND
        # All others are answered at once, also by one more connection than there is room for.
        with ExitStack() as stack:
            for _ in range(70):
                client = stack.enter_context(control.ControlClient(path))
                status = client.ask({"do": "status"})
            assert [each["name"] for each in status["regions"]] == ["a", "b"]
            with pytest.raises(control.ControlError, match="another change is under way"):
                client.ask({"do": "reload"})
            with pytest.raises(control.ControlError, match="peer 7 is not connected"):
                client.ask({"do": "evict", "region": "a", "id": 7})
        assert reloading.running
        slow.release.set()
        assert reloading.result() == {"changes": ["region c: added"]}


def test_one_who_hangs_up_while_a_reload_waits(regions: Regions, slow: Slow) -> None:
    """The reload is done all the same, and the loop does not turn idly until then."""
    sockets = {"a": str(regions.directory / "a")}
    path = str(regions.directory / "control")
    with no_deadlock(60), Running(sockets, vectors=1, load=lambda: regions("ab")) as served:
        served.add(service_control.Control(service_control.listen(path), served.service))
        served.start()
        slow.wanted = True
        with socket.socket(socket.AF_UNIX) as asker:
            asker.connect(path)
            asker.sendall(b'{"do": "reload"}\n{"do": "evict", "region": "a", "id": 0}\n')
            assert slow.begun.wait(PATIENCE)
        with RawPeer(str(regions.directory / "a")).set_up(1) as peer:
            began = time.process_time()
            time.sleep(0.3)  # what is measured is that nothing happens
            assert time.process_time() - began < 0.2
            slow.release.set()
            until(lambda: regions.listens("b"))
            assert not peer.readable(0)
        regions.join("b")


# -- callbacks ------------------------------------------------------------------------------------


def keeps_on(_service: Service) -> None:
    pass


def removes_its_own(served: Service) -> None:
    config = served.config
    rest = {name: each for name, each in config.regions.items() if name != "a"}
    assert served.change(ServiceConfig(rest)) == ["region a: removed"]
    assert "a" not in served.regions


def removes_another(served: Service) -> None:
    config = served.config
    rest = {name: each for name, each in config.regions.items() if name != "b"}
    assert served.change(ServiceConfig(rest)) == ["region b: removed"]


def adds(served: Service) -> None:
    new = RegionConfig(served.config.regions["a"].socket + "-new", size=4096)
    wanted = ServiceConfig({**served.config.regions, "new": new})
    assert served.change(wanted) == ["region new: added"]


def closes(served: Service) -> None:
    served.close()
    assert served.regions == {}


def stops(served: Service) -> None:
    served.stop()


def steps(served: Service) -> None:
    with pytest.raises(RuntimeError, match="another step"):
        served.step(0)


def says_soon(served: Service) -> None:
    served.soon(lambda: removes_its_own(served))


def evicts(served: Service) -> None:
    with suppress(ivshmem.NoSuchPeer):  # nobody has joined yet
        served.regions["a"].server.evict(0)


ACTS: list[Callable[[Service], None]] = [
    keeps_on,
    removes_its_own,
    removes_another,
    adds,
    closes,
    stops,
    steps,
    says_soon,
    evicts,
]


@pytest.mark.parametrize("hook", ["on_join", "on_leave", "gate"])
@pytest.mark.parametrize("act", ACTS)
def test_in_a_callback(regions: Regions, act: Callable[[Service], None], hook: str) -> None:
    errors: list[BaseException] = []
    done = threading.Event()

    def act_once(*arguments: Any) -> ivshmem.Verdict:
        if not done.is_set() and (hook == "gate" or arguments[0] == "a"):
            try:
                act(made)
            except BaseException as error:
                errors.append(error)
            done.set()
        return ivshmem.Verdict(True)

    hooks: dict[str, Any] = {} if hook == "gate" else {hook: act_once}
    with no_deadlock(60), ExitStack() as stack:
        made = stack.enter_context(Service(regions("ab"), **hooks))
        made.open()
        if hook == "gate":
            made.regions["a"].server.set_gate(act_once)
        thread = Background(made.run)
        try:
            stack.enter_context(RawPeer(str(regions.directory / "a")))
            if hook == "on_leave":
                with RawPeer(str(regions.directory / "a")) as leaver:
                    leaver.set_up(1)
            assert done.wait(PATIENCE)
            if act in (closes, stops):
                thread.result()
            else:
                if act is says_soon:
                    until(lambda: "a" not in made.regions)
                left = set(made.regions)
                for name in left:
                    path = made.regions[name].config.socket
                    with RawPeer(path) as peer:
                        peer.set_up(1)
        finally:
            made.stop()
            thread.result()
    assert errors == []


def test_from_another_thread(regions: Regions) -> None:
    with no_deadlock(60), running(regions("a")) as runs:
        until(lambda: runs.service._runner)
        for call in (
            lambda: runs.service.change(regions("ab")),
            runs.service.close,
        ):
            with pytest.raises(RuntimeError, match="another thread runs this service"):
                call()
        done = threading.Event()

        def act() -> None:
            runs.service.change(regions("ab"))
            done.set()

        runs.service.soon(act)
        assert done.wait(PATIENCE)
        assert regions.join("b") < BOUND
