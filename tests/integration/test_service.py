"""Several regions in one loop, and changes of them that those who stay do not notice."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.leaks import names_in
from support.peer import RawPeer
from support.serving import Running, running
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem.config import ConfigError, RegionConfig, ServiceConfig
from ivshmem.lasting.journal import Journal
from ivshmem.service import open_region
from ivshmem.service.service import Service
from ivshmem.system.listener import Listener

SHM = Path("/dev/shm")


@pytest.fixture
def make(directory: Path, shm_name: str) -> Iterator[Callable[..., RegionConfig]]:
    """Makes configurations with a socket of that name, which must be gone at the end."""
    names: set[str] = set()

    def config(base: str, **settings: Any) -> RegionConfig:
        names.add(base)
        settings = {"size": 1 << 20, **settings}
        if settings.get("name") is True:
            settings["name"] = f"{shm_name}-{base}"
        return RegionConfig(str(directory / base), **settings)

    yield config
    assert not [name for name in names if os.path.lexists(directory / name)], "sockets are left"


Make = Callable[..., RegionConfig]


def connect(config: RegionConfig) -> ivshmem.Client:
    return ivshmem.connect(config.socket, timeout=PATIENCE)


def is_told_nothing(client: ivshmem.Client) -> bool:
    return client.next_event(0) is None and client.connected


class Bystanders:
    """Peers of a region that may notice nothing: a client, a bare socket, and all they were given.

    What is looked at besides: that new peers still find the same memory behind the same socket.
    """

    def __init__(self, config: RegionConfig) -> None:
        self.path = config.socket
        self.raw = RawPeer(self.path).set_up(config.vectors)
        self.client = connect(config)
        self.raw.take_until(lambda: self.raw.counts.get(self.client.id) == config.vectors)
        self.inode = os.stat(self.path).st_ino
        self.known = set(self.client.peers)

    def check(self) -> None:
        assert is_told_nothing(self.client)
        assert not self.raw.readable(0)
        assert self.client.wait(0, 0) is None
        assert set(self.client.peers) == self.known
        assert os.stat(self.path).st_ino == self.inode
        with RawPeer(self.path) as newcomer:
            newcomer.set_up(self.client.vectors)
            assert newcomer.memory == self.raw.memory
            assert isinstance(self.client.next_event(PATIENCE), ivshmem.PeerJoined)
        assert isinstance(self.client.next_event(PATIENCE), ivshmem.PeerLeft)
        self.raw.take_until(lambda: newcomer.id in self.raw.left)
        self.client.ring(self.client.id)
        assert self.client.wait(0, PATIENCE) == 1

    def catch_up(self) -> None:
        """Read of all who came and went, up to one more; that the service ended is not among it."""
        with RawPeer(self.path) as last:
            last.set_up(self.client.vectors)
            self._read_until(ivshmem.PeerJoined(last.id))  # what nobody reads collapses
        self._read_until(ivshmem.PeerLeft(last.id))
        self.raw.take_until(lambda: last.id in self.raw.left)
        while (event := self.client.next_event(0)) is not None:
            assert isinstance(event, ivshmem.Interrupt), event
        assert set(self.raw.counts) - {self.raw.id} == {self.client.id}

    def _read_until(self, wanted: ivshmem.Event) -> None:
        while (event := self.client.next_event(PATIENCE)) != wanted:
            assert isinstance(event, ivshmem.PeerJoined | ivshmem.PeerLeft | ivshmem.Interrupt), (
                event
            )

    def close(self) -> None:
        self.raw.close()
        self.client.close()


@contextlib.contextmanager
def undisturbed(config: RegionConfig) -> Iterator[Bystanders]:
    bystanders = Bystanders(config)
    try:
        yield bystanders
        bystanders.check()
    finally:
        bystanders.close()


# -- several regions ------------------------------------------------------------------------------


def test_each_region_is_its_own(make: Make) -> None:
    config = ServiceConfig(
        {"a": make("a", vectors=3), "b": make("b", size=4096), "c": make("c", names=0)}
    )
    with running(config) as runs, contextlib.ExitStack() as stack:
        first = {name: stack.enter_context(connect(r)) for name, r in config.regions.items()}
        second = {name: stack.enter_context(connect(r)) for name, r in config.regions.items()}
        assert [client.id for client in (*first.values(), *second.values())] == [0, 0, 0, 1, 1, 1]
        assert [client.vectors for client in first.values()] == [3, 1, 1]
        assert [client.region.size for client in first.values()] == [1 << 20, 4096, 1 << 20]
        for number, client in enumerate(first.values()):
            client.region.write(0, bytes([number + 1]))
        assert [client.region.read(0, 1)[0] for client in second.values()] == [1, 2, 3]
        second["a"].ring(0, 2)
        assert first["a"].wait(2, PATIENCE) == 1
        assert first["b"].wait(0, 0) is None
        assert ivshmem.Directory.open(first["c"]).slots == 63
        assert list(runs.service.regions) == ["a", "b", "c"]
        served = runs.service.regions["a"]
        assert served.config == config.regions["a"]
        assert served.listener.path == config.regions["a"].socket
        assert served.region.size == 1 << 20
        assert len(served.server.peers) == 2
        assert runs.service.regions["c"].directory is not None


def test_callbacks_say_which_region(make: Make) -> None:
    told: list[tuple[str, str, int]] = []
    config = ServiceConfig({"a": make("a"), "b": make("b")})
    with running(
        config,
        on_join=lambda name, peer: told.append(("join", name, peer.id)),
        on_leave=lambda name, peer: told.append(("leave", name, peer.id)),
    ):
        with connect(config.regions["b"]):
            until(lambda: told == [("join", "b", 0)])
        until(lambda: told[1:] == [("leave", "b", 0)])


def test_a_flood_in_one_region_delays_no_other(make: Make) -> None:
    config = ServiceConfig({"busy": make("busy"), "quiet": make("quiet")})
    with Service(config) as served, contextlib.ExitStack() as stack:
        served.open()
        flood = [stack.enter_context(RawPeer(config.regions["busy"].socket)) for _ in range(300)]
        quiet = stack.enter_context(RawPeer(config.regions["quiet"].socket))
        served.step(PATIENCE)
        assert len(served.regions["busy"].server.peers) < len(flood)
        quiet.set_up(1)
        while len(served.regions["busy"].server.peers) < len(flood):
            served.step(PATIENCE)


def test_others_use_the_loop(make: Make) -> None:
    config = ServiceConfig({"a": make("a")})
    near, far = socket.socketpair()
    with running(config) as runs, near, far:
        said: list[bytes] = []
        runs.call(lambda: runs.service.watch(near.fileno(), lambda: said.append(near.recv(9))))
        far.send(b"1")
        until(lambda: said == [b"1"])
        runs.call(lambda: runs.service.unwatch(near.fileno()))
        far.send(b"2")
        with connect(config.regions["a"]):
            assert said == [b"1"]


def test_a_signal_handler_stops_it(make: Make) -> None:
    """Also when the signal comes while nothing else happens."""
    config = ServiceConfig({"a": make("a")})
    me = threading.get_ident()
    with Service(config) as served:
        served.open()
        before = signal.signal(signal.SIGUSR1, lambda *_: served.stop())
        try:
            for delay in (0.0, 0.001, 0.01):
                timer = threading.Timer(delay, signal.pthread_kill, (me, signal.SIGUSR1))
                timer.start()
                served.run()
                timer.join()
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_closing_twice(make: Make) -> None:
    served = Service(ServiceConfig({"a": make("a", name=True)}))
    served.open()
    served.close()
    served.close()


# -- opening, or not ------------------------------------------------------------------------------


def broken(make: Make, how: str, stack: contextlib.ExitStack) -> tuple[RegionConfig, str]:
    """A region that cannot be opened, and what is said of it."""
    if how == "no directory":
        return make("none/c"), "/none: No such file or directory"
    if how == "a live server":
        config = make("c")
        stack.enter_context(Listener(config.socket))
        return config, "another process listens here"
    if how == "no memory":
        return make("c", size=1 << 50), "1P of memory do not fit"
    if how == "another size":
        config = make("c", name=True, size=8192)
        assert config.name is not None
        region = stack.enter_context(ivshmem.Region.create(4096, name=config.name))
        stack.callback(region.unlink)
        return config, "has 4K, not the 8K asked for"
    assert how == "no room for names"
    return make("c", names=4000, size=4096), "and the region has 4K"


BROKEN = ["no directory", "a live server", "no memory", "another size", "no room for names"]


@pytest.mark.parametrize("how", BROKEN)
def test_all_or_nothing_at_start(make: Make, shm_name: str, how: str) -> None:
    with contextlib.ExitStack() as stack:
        bad, message = broken(make, how, stack)
        before = names_in(), set(os.listdir(os.path.dirname(make("a").socket)))
        config = ServiceConfig(
            {"a": make("a", name=True), "b": make("b"), "bad": bad}, source="FILE"
        )
        with Service(config) as served:
            with pytest.raises(ConfigError, match=r"FILE: region\.bad: ") as caught:
                served.open()
            assert message in str(caught.value)
            assert "Errno" not in str(caught.value)
            assert isinstance(caught.value.__cause__, OSError | ValueError)
            assert not served.regions
        after = names_in(), set(os.listdir(os.path.dirname(make("a").socket)))
        assert before == after


def test_two_regions_with_one_socket(make: Make) -> None:
    """Of a configuration that was never a file."""
    with Service(ServiceConfig({"a": make("a"), "b": make("a")})) as served:
        with pytest.raises(ConfigError, match=r"region\.b\.socket = .*: region\.a\.socket is the"):
            served.open()


def test_nobody_can_connect_before_all_is_open(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU would spin for ever on a connection that a failure then ends."""
    config = ServiceConfig({"a": make("a"), "b": make("b"), "c": make("c")})
    tried = []

    def look(*arguments: Any) -> Any:
        for region in config.regions.values():
            if os.path.exists(region.socket):
                with pytest.raises(ConnectionRefusedError):
                    RawPeer(region.socket)
                tried.append(region.socket)
        return real(*arguments)

    real = open_region.open_region
    monkeypatch.setattr("ivshmem.service.service.open_region", look)
    with running(config):
        a, b = config.regions["a"].socket, config.regions["b"].socket
        assert tried == [a, a, b]
        for region in config.regions.values():
            with connect(region):
                pass


# -- reloading ------------------------------------------------------------------------------------


def test_regions_come_and_go(make: Make) -> None:
    stays = make("stays", vectors=2, name=True)
    config = ServiceConfig({"stays": stays})
    with running(config) as runs, undisturbed(stays):
        for turn in range(3):
            new = make(f"new{turn}", name=True)
            config = ServiceConfig({"stays": stays, "new": new})
            assert runs.change(config) == ["region new: added"]
            with connect(new) as client:
                assert client.region.size == 1 << 20
                assert (SHM / str(new.name)).exists()
                assert runs.change(config) == []
                assert is_told_nothing(client)
                assert runs.change(ServiceConfig({"stays": stays})) == ["region new: removed"]
                assert isinstance(client.next_event(PATIENCE), ivshmem.Disconnected)
            assert not os.path.exists(new.socket)
            assert not (SHM / str(new.name)).exists()


def test_what_a_removed_region_leaves(make: Make, directory: Path, shm_name: str) -> None:
    """A name that was there before, one that is to be kept, and a file."""
    was = make("was", name=True)
    keep = make("keep", name=True, keep=True)
    file = make("file", file=str(directory / "memory"))
    stays = make("stays")
    with contextlib.ExitStack() as stack:
        region = stack.enter_context(ivshmem.Region.create(1 << 20, name=str(was.name)))
        stack.callback(region.unlink)
        with running(
            ServiceConfig({"was": was, "keep": keep, "file": file, "stays": stays})
        ) as runs:
            assert len(runs.change(ServiceConfig({"stays": stays}))) == 3
            assert (SHM / str(was.name)).exists()
            assert (SHM / str(keep.name)).exists()
            assert (directory / "memory").exists()
        (SHM / str(keep.name)).unlink()


@pytest.mark.parametrize("how", BROKEN)
def test_nothing_is_applied_half(make: Make, how: str) -> None:
    a, b = make("a", mode=0o600), make("b", name=True)
    config = ServiceConfig({"a": a, "b": b})
    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(running(config))
        stack.enter_context(undisturbed(a))
        stack.enter_context(undisturbed(b))
        bad, message = broken(make, how, stack)
        before = names_in(), set(os.listdir(os.path.dirname(a.socket)))
        wanted = {  # `a` is altered, `b` is removed, `new` is added, and `bad` fails
            "a": a._replace(mode=0o666, deny=("all",)),
            "new": make("new", name=True),
            "bad": bad,
        }
        with pytest.raises(ConfigError) as caught:
            runs.change(ServiceConfig(wanted, source="FILE"))
        assert str(caught.value).startswith("FILE: region.bad: ")
        assert message in str(caught.value)
        after = names_in(), set(os.listdir(os.path.dirname(a.socket)))
        assert before == after
        assert os.stat(a.socket).st_mode & 0o777 == 0o600
        assert runs.service.config == config
        assert [served.config for served in runs.service.regions.values()] == [a, b]
        assert runs.change(config) == []


def test_permissions_that_cannot_be_given(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second region's; the first region's are as they were, and the new one is gone."""
    a, b = make("a", mode=0o600), make("b", mode=0o600)
    with running(ServiceConfig({"a": a, "b": b})) as runs, undisturbed(a), undisturbed(b):
        listener = runs.service.regions["b"].listener
        real = listener.permit

        def refuse(**access: Any) -> None:
            if access["mode"] == 0o666:
                raise PermissionError(1, "only root can do that", b.socket)
            real(**access)

        monkeypatch.setattr(listener, "permit", refuse)
        wanted = {
            "a": a._replace(mode=0o644),
            "b": b._replace(mode=0o666),
            "c": make("c"),
        }
        with pytest.raises(ConfigError, match=r"region\.b: .*/b: only root can do that"):
            runs.change(ServiceConfig(wanted, source="FILE"))
        assert [os.stat(r.socket).st_mode & 0o777 for r in (a, b)] == [0o600, 0o600]
        assert not os.path.exists(wanted["c"].socket)
        assert list(runs.service.regions) == ["a", "b"]


def test_a_connection_that_was_accepted_and_not_noted(make: Make) -> None:
    """It joins the region whose socket it came by, also one with an abstract address."""
    config = make("a")
    address = f"@ivshmem-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as client:
        sock.bind(address.replace("@", "\0", 1))
        sock.listen()
        inherited = Listener.adopt(os.dup(sock.fileno()))
        configs = ServiceConfig({"a": config, "b": config._replace(socket=address)})
        with Service(configs, listeners={address: inherited}) as service:
            service.open()
            client.connect(address.replace("@", "\0", 1))
            service.take_stray(inherited.socket.accept()[0].detach())
            assert len(service.regions["b"].server.peers) == 1
            assert service.regions["a"].server.peers == []


@pytest.mark.parametrize(
    ("replace", "reason"),
    [(Path.touch, "the socket is not there any more"), (lambda _: None, "No such file")],
    ids=["another", "gone"],
)
def test_permissions_of_a_path_that_leads_elsewhere(
    make: Make, replace: Callable[[Path], None], reason: str
) -> None:
    """What stands there now is somebody else's; and the error is the configuration's."""
    a = make("a", mode=0o600)
    path = Path(a.socket)
    with running(ServiceConfig({"a": a})) as runs, undisturbed(a):
        path.rename(f"{path}.moved")
        replace(path)
        before = path.lstat() if path.exists() else None
        with pytest.raises(ConfigError, match=rf"region\.a: {path}: {reason}"):
            runs.change(ServiceConfig({"a": a._replace(mode=0o666)}, source="FILE"))
        assert (path.lstat() if path.exists() else None) == before
        assert runs.service.regions["a"].config == a
        os.rename(f"{path}.moved", path)
        assert path.stat().st_mode & 0o777 == 0o600


def test_who_may_connect_is_changed_in_place(make: Make) -> None:
    a = make("a", mode=0o600)
    closed = a._replace(deny=("all",), mode=0o660, keep=True)
    with running(ServiceConfig({"a": a})) as runs, undisturbed(a) as bystanders:
        changes = runs.change(ServiceConfig({"a": closed}))
        assert changes == ["region a: deny, keep, mode changed"]
        assert runs.service.regions["a"].config == closed
        assert os.stat(a.socket).st_mode & 0o777 == 0o660
        with RawPeer(a.socket) as refused:
            assert refused.take() is None
        assert is_told_nothing(bystanders.client)
        assert runs.change(ServiceConfig({"a": a})) == ["region a: deny, keep, mode changed"]
        assert os.stat(a.socket).st_mode & 0o777 == 0o600


def test_without_a_mode_it_is_what_it_would_have_been(make: Make) -> None:
    plain, closed = make("a"), make("a", mode=0o600)
    with running(ServiceConfig({"a": plain})) as runs:
        before = os.stat(plain.socket)
        runs.change(ServiceConfig({"a": closed}))
        runs.change(ServiceConfig({"a": plain}))
        after = os.stat(plain.socket)
        assert (after.st_mode, after.st_uid, after.st_gid) == (
            before.st_mode,
            before.st_uid,
            before.st_gid,
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_new_group_never_has_the_old_mode(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a = make("a", mode=0o660, group=0)
    seen: list[tuple[int, int]] = []

    def look(path: str, uid: int, gid: int) -> None:
        real(path, uid, gid)
        seen.append((gid, os.stat(a.socket).st_mode & 0o777))

    real = os.chown
    with running(ServiceConfig({"a": a})) as runs:
        monkeypatch.setattr(os, "chown", look)
        runs.change(ServiceConfig({"a": a._replace(mode=0o600, group=65534)}))
        assert seen == [(65534, 0o600)]
        status = os.stat(a.socket)
        assert (status.st_mode & 0o777, status.st_gid) == (0o600, 65534)


def test_joins_are_counted_on(make: Make) -> None:
    """A change of something else does not begin a new minute."""
    a = make("a", joins_per_minute=2)
    with running(ServiceConfig({"a": a})) as runs:
        for _ in range(2):
            with RawPeer(a.socket) as peer:
                peer.set_up(1)
        runs.change(ServiceConfig({"a": a._replace(mode=0o600)}))
        with RawPeer(a.socket) as peer:
            assert peer.take() is None
        runs.change(ServiceConfig({"a": a._replace(joins_per_minute=3)}))
        with RawPeer(a.socket) as peer:
            peer.set_up(1)


REFUSED = {
    "size": (
        {"size": 2 << 20},
        'region.a.size = "2M": it cannot change from "1M" while the region is served: give'
        " the new one another name and socket, or remove this one, reload, and add it again",
    ),
    "vectors": ({"vectors": 5}, "region.a.vectors = 5: it cannot change from 1 while"),
    "name": ({"name": "x"}, 'region.a.name = "x": it cannot change from nothing while'),
    "socket": ({"socket": "/x"}, 'region.a.socket = "/x": it cannot change from "'),
    "hugepages": ({"hugepages": "2M"}, 'region.a.hugepages = "2M": it cannot change from false'),
    "names": ({"names": 5}, "region.a.names = 5: it cannot change from nothing"),
    "channels": (
        {"channels": 65536},
        'region.a.channels = "64K": it cannot change from nothing',
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_change(make: Make, settings: dict[str, Any], message: str) -> None:
    a = make("a")
    with running(ServiceConfig({"a": a})) as runs, undisturbed(a):
        wanted = {"a": a._replace(**settings), "b": make("b")}
        with pytest.raises(ConfigError) as caught:
            runs.change(ServiceConfig(wanted, source="FILE"))
        assert str(caught.value).startswith(f"FILE: {message}")
        assert not os.path.exists(wanted["b"].socket)


def test_the_size_that_it_has_is_no_change(make: Make) -> None:
    a = make("a", size=None)
    with running(ServiceConfig({"a": a})) as runs, undisturbed(a):
        for size in ("4M", 4 << 20, None):
            assert runs.change(ServiceConfig({"a": a._replace(size=size)})) == []
        with pytest.raises(ConfigError, match="cannot change from"):
            runs.change(ServiceConfig({"a": a._replace(size="8M")}))


@pytest.mark.parametrize("key", ["control", "metrics", "log_format"])
def test_what_is_the_service_s_cannot_change(make: Make, key: str) -> None:
    config = ServiceConfig({"a": make("a")})
    with running(config) as runs:
        with pytest.raises(ConfigError, match=rf"service\.{key} = \"x\": it cannot change from"):
            runs.change(config._replace(**{key: "x"}))  # type: ignore[arg-type]


def test_another_name_for_a_served_socket(make: Make) -> None:
    """It would have to be opened before the old one goes."""
    a = make("a", name=True)
    with running(ServiceConfig({"a": a})) as runs, undisturbed(a):
        for region, key in (
            (a, "socket"),
            (make("b", name=a.name), "name"),
            (make("b", file=str(SHM / str(a.name))), "file"),
        ):
            message = rf"region\.b\.{key} = .*: region a is served with it: remove that one, reload"
            with pytest.raises(ConfigError, match=message):
                runs.change(ServiceConfig({"b": region}))
    assert not (SHM / str(a.name)).exists()


def test_reload_reads_again(make: Make) -> None:
    configs = [ServiceConfig({"a": make("a"), "b": make("b")})]
    with running(ServiceConfig({"a": make("a")}), load=configs.pop) as runs:
        assert runs.call(runs.service.reload) == ["region b: added"]
    with running(ServiceConfig({"a": make("a")})) as runs:
        with pytest.raises(ConfigError, match="there is no configuration to read again"):
            runs.call(runs.service.reload)


def test_many_reloads_under_load(make: Make) -> None:
    """Peers come, ring and go in one region while others come and go."""
    stays = make("stays")
    done = threading.Event()
    with running(ServiceConfig({"stays": stays})) as runs, undisturbed(stays) as bystanders:
        heard: list[object] = []

        def churn() -> None:
            while not done.is_set():
                with connect(stays) as client:
                    client.ring(bystanders.client.id)
                    heard.append(client.id)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for turn in range(20):
                more = {f"r{i}": make(f"r{i}") for i in range(turn % 4)}
                runs.change(ServiceConfig({"stays": stays, **more}))
            until(lambda: len(heard) > 20)
        finally:
            done.set()
            thread.join(PATIENCE)
        until(lambda: len(runs.service.regions["stays"].server.peers) == 2)
        bystanders.catch_up()


def test_a_failure_at_the_last_moment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the new regions are in the journal, and the first of them listens."""
    a = make("a")
    real = Listener.listen

    def listen(self: Listener) -> None:
        if self.path.endswith("/c"):
            raise OSError(12, "Cannot allocate memory")
        real(self)

    with running(ServiceConfig({"a": a})) as runs, undisturbed(a):
        monkeypatch.setattr(Listener, "listen", listen)
        new = {"b": make("b", name=True), "c": make("c", name=True)}
        wanted = {"a": a._replace(mode=0o600), **new}
        mode = os.stat(a.socket).st_mode
        with pytest.raises(OSError, match="Cannot allocate memory"):
            runs.change(ServiceConfig(wanted))
        assert list(runs.service.regions) == ["a"]
        assert os.stat(a.socket).st_mode == mode
        assert not any((SHM / str(region.name)).exists() for region in new.values())


# -- a region that fails --------------------------------------------------------------------------


def fail(runs: Running, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next step of a region fail, and make one."""
    served = runs.service.regions[name]

    def step(timeout: float | None = None) -> None:
        raise RuntimeError("for a test")

    monkeypatch.setattr(served.server, "step", step)
    with contextlib.suppress(ConnectionError), RawPeer(served.config.socket) as peer:
        while peer.take() is not None:
            pass


def test_a_region_that_fails_takes_no_other_with_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = make("a", name=True), make("b")
    config = ServiceConfig({"a": a, "b": b})
    with running(config) as runs, undisturbed(b):
        with connect(a) as client:
            fail(runs, "a", monkeypatch)
            assert isinstance(client.next_event(PATIENCE), ivshmem.Disconnected)
        until(lambda: list(runs.service.regions) == ["b"])
        until(lambda: not (SHM / str(a.name)).exists(), "its memory's name goes")
        assert not os.path.exists(a.socket)
        (record,) = caplog.records
        assert record.getMessage() == "region a failed, and is served no more"
        assert record.exc_info
        # and a reload, of the same configuration, brings it back
        assert runs.change(config) == ["region a: added"]
        with undisturbed(a):
            pass


def test_when_nothing_is_left_the_loop_ends(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(ServiceConfig({"a": make("a"), "b": make("b")})) as runs:
        fail(runs, "a", monkeypatch)
        fail(runs, "b", monkeypatch)
        runs.ended()
        assert not runs.service.regions
    assert caplog.records[-1].getMessage() == "there is nothing left to serve"


def test_a_server_that_somebody_closed(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    a, b = make("a"), make("b")
    with running(ServiceConfig({"a": a, "b": b})) as runs, undisturbed(b):
        runs.call(runs.service.regions["a"].server.close)
        assert runs.change(ServiceConfig({"b": b})) == ["region a: removed"]


def test_a_region_that_cannot_be_closed_does_not_keep_the_others(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = make("a", name=True), make("b")
    with Service(ServiceConfig({"a": a, "b": b})) as served:
        served.open()
        region = served.regions["a"].region
        view = memoryview(region)
        served.close()
        assert not served.regions
    assert caplog.records[0].getMessage() == "not all of region a could be closed"
    assert not (SHM / str(a.name)).exists()
    view.release()
    region.close()


# -- sockets that are there already ---------------------------------------------------------------


def inherited(path: str) -> Listener:
    """As systemd hands it over."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        return Listener.adopt(os.dup(sock.fileno()))


def test_an_inherited_socket(make: Make) -> None:
    a = make("a", mode=0o600)
    listener = inherited(a.socket)
    with RawPeer(a.socket) as early:  # before anybody serves it
        with running(ServiceConfig({"a": a}), listeners={a.socket: listener}):
            early.set_up(1)
            assert os.stat(a.socket).st_mode & 0o777 == 0o600
    assert os.path.exists(a.socket)
    os.unlink(a.socket)


def test_an_inherited_socket_survives_a_failure(make: Make) -> None:
    a, b = make("a"), make("b", size=1 << 50)
    with inherited(a.socket) as listener:
        with Service(ServiceConfig({"b": b, "a": a}), listeners={a.socket: listener}) as served:
            with pytest.raises(OSError, match="do not fit"):
                served.open()
        with RawPeer(a.socket):
            pass
    os.unlink(a.socket)


def test_memory_that_fails_leaves_an_inherited_socket_open(make: Make) -> None:
    a = make("a", size=1 << 50)
    with inherited(a.socket) as listener:
        with pytest.raises(OSError, match="do not fit"):
            open_region.open_region(a, listener)
        with RawPeer(a.socket):
            pass
    os.unlink(a.socket)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ivshmem")


# -- a successor ----------------------------------------------------------------------------------


@contextlib.contextmanager
def succeeded(config: ServiceConfig, between: Callable[[], object]) -> Iterator[Running]:
    """A service that goes on where another was, after something has happened."""
    with Service(ServiceConfig()) as second:
        with Service(config) as first, contextlib.closing(Journal()) as journal:
            first.open()
            journal.rewrite(first.snapshot())
            between()
            second.resume(journal, os.dup)
            first.abandon()
        runs = Running(second)
        try:
            yield runs
        finally:
            runs.end()


def test_a_region_that_is_lost_takes_no_other_with_it(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer can truncate a file, and a successor finds nothing to share then."""
    file = tmp_path / "memory"
    regions = {"a": make("a"), "b": make("b", file=str(file)), "c": make("c")}
    with succeeded(ServiceConfig(regions), lambda: os.truncate(file, 0)) as runs:
        assert set(runs.service.regions) == {"a", "c"}
        for name in ("a", "c"):
            with RawPeer(regions[name].socket) as peer:
                peer.set_up(regions[name].vectors)
    assert "region b is lost: the descriptor is not shared memory" in caplog.text


def test_a_user_who_is_gone_ends_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rule that cannot be read any more lets nobody in, until it can be."""
    nobody = pwd.getpwuid(os.geteuid())

    def gone(name: str) -> object:
        raise KeyError(name)

    def there(name: str) -> object:
        return nobody

    monkeypatch.setattr(pwd, "getpwnam", there)
    config = make("a", allow=("uid:somebody",))
    with succeeded(
        ServiceConfig({"a": config}), lambda: monkeypatch.setattr(pwd, "getpwnam", gone)
    ) as runs:
        with RawPeer(config.socket) as refused:
            assert refused.take() is None
        assert "region a: all newcomers are refused: the rule 'uid:somebody'" in caplog.text
        monkeypatch.setattr(pwd, "getpwnam", there)
        with RawPeer(config.socket) as peer:
            peer.set_up(config.vectors)
            assert len(runs.service.regions["a"].server.peers) == 1


def test_another_server_s_socket_is_left_alone(make: Make, directory: Path) -> None:
    """Somebody has removed the path, and started another server there, before the successor."""
    config = make("a")
    path = Path(config.socket)
    moved = directory / "moved"
    with contextlib.ExitStack() as other:

        def replace() -> None:
            path.rename(moved)
            other.enter_context(Listener(path))

        with succeeded(ServiceConfig({"a": config}), replace):
            pass
        assert path.exists()
    moved.unlink()
