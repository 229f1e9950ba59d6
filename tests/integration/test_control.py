"""The control socket of a real server: what it says and does, and callers who mean no good."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import json
import os
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from support import commands
from support.children import NOBODY, needs_root, python
from support.leaks import open_fds
from support.pages import HOME
from support.peer import FakeServer, RawPeer, send_raw, until_closed
from support.running import Running
from support.served import Served
from support.waiting import PATIENCE, Background, until

import ivshmem
from ivshmem import control
from ivshmem.config import ConfigError, RegionConfig, ServiceConfig
from ivshmem.control import ControlError
from ivshmem.memory import left_places
from ivshmem.migration import Step
from ivshmem.migration.servers import free_places
from ivshmem.service import control as service_control
from ivshmem.system import requests

VECTORS = 2
MANY = 32  # so that some peers fill the buffer of one that does not read


class Controlled(Running):
    """A service with a control socket, in a thread."""

    def __init__(self, path: str, sockets: dict[str, str], vectors: int = VECTORS) -> None:
        super().__init__(sockets, vectors, self._load)
        self.path = path
        self.config: ServiceConfig | Exception = self.service.config
        self.control: service_control.Control

    def _load(self) -> ServiceConfig:
        if isinstance(self.config, Exception):
            raise self.config
        return self.config

    def begin(self, **kwargs: Any) -> Controlled:
        listener = service_control.listen(self.path)
        self.control = self.add(service_control.Control(listener, self.service, **kwargs))
        self.start()
        return self

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        return control.request(self.path, {"do": do, **fields}, PATIENCE)

    def refused(self, do: str, **fields: object) -> str:
        """The error that a request brings."""
        with pytest.raises(control.ControlError) as error:
            self.ask(do, **fields)
        assert "\n" not in str(error.value)
        return str(error.value)

    def peers(self, region: str = "default") -> dict[int, dict[str, Any]]:
        regions = {r["name"]: r for r in self.ask("status")["regions"]}
        return {peer["id"]: peer for peer in regions[region]["peers"]}


@pytest.fixture
def unstarted(socket_path: str) -> Iterator[Controlled]:
    with Controlled(control.default_path(socket_path), {"default": socket_path}) as made:
        yield made


@pytest.fixture
def controlled(unstarted: Controlled) -> Controlled:
    return unstarted.begin()


@pytest.fixture
def client(controlled: Controlled) -> Iterator[ivshmem.Client]:
    with ivshmem.connect(controlled.server().path, timeout=PATIENCE) as client:
        yield client


@contextlib.contextmanager
def raw(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        yield sock


def line(sock: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        there = sock.recv(1 << 16, socket.MSG_PEEK)
        assert there, data
        data += sock.recv(there.find(b"\n") + 1 or len(there))
    reply = json.loads(data)
    assert isinstance(reply, dict)
    return reply


class TestWhatItSays:
    def test_version(self, controlled: Controlled) -> None:
        reply = controlled.ask("version")
        assert reply == {"version": ivshmem.__version__, "protocol": 1, "pid": os.getpid()}

    def test_the_process(self, controlled: Controlled) -> None:
        server = controlled.ask("status")["server"]
        assert server["pid"] == os.getpid()
        assert server["uid"] == os.geteuid()
        assert server["since"] <= server["time"]
        assert server["cpu"] > 0
        assert server["resident"] > 1 << 20
        assert server["pid_namespace"] == os.stat("/proc/self/ns/pid").st_ino
        # The connection of who asks, on both sides, is counted; a listing of them is not.
        assert abs(server["fds"]["open"] - len(open_fds())) <= 4
        assert server["fds"]["limit"] > server["fds"]["open"]

    def test_a_region_and_its_peers(self, controlled: Controlled, client: ivshmem.Client) -> None:
        (region,) = controlled.ask("status")["regions"]
        server = controlled.server()
        (peer,) = region.pop("peers")
        counts = region.pop("counts")
        assert counts["joins"] == 1
        assert counts["messages"] == 3 + VECTORS
        assert region == {
            "name": "default",
            "socket": server.path,
            "unreachable": "",
            "vectors": VECTORS,
            "size": 4096,
            "page_size": 4096,
            "file_system": "tmpfs",
            "source": "anonymous",
            "memory": "",
            "memory_leads_to": "",
            "paused": "",
            "holds_leaves": False,
            "channels": 0,
        }
        assert peer.pop("since") == server.peers[0].since
        assert peer == {
            "id": client.id,
            "pid": os.getpid(),
            "uid": os.getuid(),
            "gid": os.getgid(),
            "process": Path("/proc/self/comm").read_text().rstrip("\n"),
            "names": [],
            "vectors": VECTORS,
            "readonly": False,
            "set_up": True,
            "pending": 0,
            "stalled_since": None,
            "leaves_told": 0,
            "leaves_held": 0,
            "held": False,
            "held_until": None,
            "interrupts": [0] * VECTORS,
        }

    def test_leaves_that_are_held_back(self, controlled: Controlled) -> None:
        assert controlled.ask("hold-leaves", on=True) == {"region": "default"}
        assert controlled.ask("status")["regions"][0]["holds_leaves"]
        assert "expected true or false" in controlled.refused("hold-leaves", on=1)
        controlled.ask("hold-leaves", on=False, region="default")
        assert not controlled.ask("status")["regions"][0]["holds_leaves"]

    def test_places_in_channels(self, socket_path: str) -> None:
        with Served(socket_path) as served:
            region = served.server().region

            def answer(do: str) -> dict[str, Any]:
                return control.request(control.default_path(socket_path), {"do": do}, PATIENCE)

            assert answer("free-places") == {"region": "default", "freed": 0}
            area = ivshmem.Directory.create(region, channels="64K").channels
            assert area is not None
            region.atomic_u64(area.start + 4096).store(7 << 24 | 1 << 20 | 3)  # one that is live
            assert answer("status")["regions"][0]["channels"] == 65536
            assert answer("free-places") == {"region": "default", "freed": 1}
            place = region.atomic_u64(area.start + 4096)
            assert place.load() == 3
            place.store(7 << 24 | 1 << 20 | 4)
            step = Step("free", control=control.default_path(socket_path), region="default")
            asyncio.run(free_places(step))
            assert place.load() == 4

    def test_without_peers(self, controlled: Controlled, client: ivshmem.Client) -> None:
        (region,) = controlled.ask("status", peers=False)["regions"]
        assert "peers" not in region
        assert region["counts"]["joins"] == 1

    def test_pending_interrupts_are_seen_and_not_taken(
        self, controlled: Controlled, client: ivshmem.Client
    ) -> None:
        for _ in range(3):
            client.ring(client.id, 1)
        for _ in range(2):
            assert controlled.peers()[client.id]["interrupts"] == [0, 3]
        assert client.wait(1, timeout=0) == 3
        assert controlled.peers()[client.id]["interrupts"] == [0, 0]

    def test_a_stalled_peer(self, socket_path: str) -> None:
        with ExitStack() as undo:
            sockets = {"default": socket_path}
            made = Controlled(control.default_path(socket_path), sockets, MANY)
            controlled = undo.enter_context(made).begin()
            client = undo.enter_context(ivshmem.connect(socket_path, timeout=PATIENCE))
            sleeper = undo.enter_context(RawPeer(socket_path))
            server = controlled.server()
            until(lambda: len(server.peers) == 2)
            asleep = server.peers[1].id
            assert controlled.peers()[asleep]["stalled_since"] is None
            with ExitStack() as others:

                def is_stalled() -> bool:
                    others.enter_context(RawPeer(server.path)).set_up(MANY)
                    return controlled.peers()[asleep]["stalled_since"] is not None

                until(is_stalled)
                more = others.enter_context(RawPeer(server.path)).set_up(MANY)
                first = controlled.peers()[asleep]
                assert first["pending"] > 0
                assert first["set_up"]
                assert first["since"] <= first["stalled_since"]
                # It is the same stall as long as nothing was taken.
                others.enter_context(RawPeer(server.path)).set_up(MANY)
                then = controlled.peers()[asleep]
                assert then["stalled_since"] == first["stalled_since"]
                assert then["pending"] > first["pending"]
                assert client.peers
                until(lambda: controlled.peers()[client.id]["stalled_since"] is None)
                sleeper.set_up(MANY).take_until(lambda: more.id in sleeper.counts)
                until(lambda: controlled.peers()[asleep]["stalled_since"] is None)

    def test_names_of_the_directory(self, controlled: Controlled, client: ivshmem.Client) -> None:
        assert controlled.peers()[client.id]["names"] == []
        with ivshmem.Directory.create(client) as directory:
            directory.publish("db")
            directory.publish("cache")
            assert controlled.peers()[client.id]["names"] == ["cache", "db"]
        assert controlled.peers()[client.id]["names"] == []

    def test_why_newcomers_wait(self, controlled: Controlled) -> None:
        controlled.server()._engine.paused = "for a reason"
        assert controlled.ask("status")["regions"][0]["paused"] == "for a reason"


class TestWhatItDoes:
    def test_evict(self, controlled: Controlled, client: ivshmem.Client) -> None:
        with ivshmem.connect(controlled.server().path, timeout=PATIENCE) as other:
            assert client.peers == [other.id]
            assert controlled.ask("evict", id=other.id) == {"region": "default"}
            assert isinstance(other.next_event(PATIENCE), ivshmem.Disconnected)
            assert client.next_event(PATIENCE) == ivshmem.PeerJoined(other.id)
            assert client.next_event(PATIENCE) == ivshmem.PeerLeft(other.id)
            assert "peer 1 is not connected" in controlled.refused("evict", id=other.id)

    @pytest.mark.parametrize("wrong", ["1", True, None, 1.0, [1], {"a": 1}])
    def test_evict_whom(self, controlled: Controlled, wrong: object) -> None:
        assert "expected the number of a peer" in controlled.refused("evict", id=wrong)

    def test_numbers_out_of_range(self, controlled: Controlled) -> None:
        for number in (-1, 65536, 2**63):
            assert "is not connected" in controlled.refused("evict", id=number)
        assert "a number of 301 digits" in controlled.refused("evict", id=10**300)

    def test_several_regions(self, directory: Path) -> None:
        paths = {name: str(directory / name) for name in ("a", "b")}
        with Controlled(str(directory / "control"), paths) as made:
            controlled = made.begin()
            with ivshmem.connect(directory / "b", timeout=PATIENCE) as client:
                assert [r["name"] for r in controlled.ask("status")["regions"]] == ["a", "b"]
                only = controlled.ask("status", region="b")["regions"]
                assert [r["name"] for r in only] == ["b"]
                assert "has to be one of a, b" in controlled.refused("evict", id=client.id)
                assert "there are a, b" in controlled.refused("evict", id=client.id, region="c")
                assert "there are a, b" in controlled.refused("status", region=["a"])
                assert "region a: peer 0" in controlled.refused("evict", id=client.id, region="a")
                controlled.ask("evict", id=client.id, region="b")
                assert isinstance(client.next_event(PATIENCE), ivshmem.Disconnected)

    def test_reload(self, controlled: Controlled, directory: Path) -> None:
        assert controlled.ask("reload") == {"changes": []}
        before = controlled.service.config.regions
        more = {"db": RegionConfig(str(directory / "db"), size=4096)}
        controlled.config = ServiceConfig({**before, **more})
        assert controlled.ask("reload") == {"changes": ["region db: added"]}
        assert [r["name"] for r in controlled.ask("status")["regions"]] == ["default", "db"]
        controlled.config = ValueError("ivshmem.toml: region.db.size is 3M:\nno power of two")
        error = "ivshmem.toml: region.db.size is 3M: no power of two"
        assert controlled.refused("reload") == error
        controlled.config = FileNotFoundError(errno.ENOENT, "No such file", "/etc/a\nb")
        assert controlled.refused("reload") == r"/etc/a\nb: No such file"
        controlled.config = ServiceConfig(before)
        assert controlled.ask("reload") == {"changes": ["region db: removed"]}

    def test_requests_in_order_on_one_connection(self, controlled: Controlled) -> None:
        with raw(controlled.path) as sock:
            sock.sendall(b'{"do":"version"}\n{"do":"nothing"}\n{"do":"status"}\n')
            assert "version" in line(sock)
            assert line(sock)["ok"] is False
            assert "regions" in line(sock)

    def test_who_asks_and_goes_is_heard(
        self, controlled: Controlled, client: ivshmem.Client
    ) -> None:
        with raw(controlled.path) as sock:
            sock.sendall(b'{"do":"evict","id":0}\n')
        assert isinstance(client.next_event(PATIENCE), ivshmem.Disconnected)

    def test_who_says_no_more_still_gets_the_replies(self, controlled: Controlled) -> None:
        with raw(controlled.path) as sock:
            sock.sendall(b'{"do":"version"}\n{"do":"version"}\n{"do":')
            sock.shutdown(socket.SHUT_WR)
            assert line(sock)["ok"]
            assert line(sock)["ok"]
            assert sock.recv(1) == b""

    def test_a_handler_can_take_the_connection(self, unstarted: Controlled) -> None:
        taken: list[tuple[socket.socket, bytes]] = []

        def take(caller: requests.Requester, message: Mapping[str, Any]) -> None:
            taken.append(caller.detach())

        controlled = unstarted.begin(handlers={"take": take})
        with raw(controlled.path) as sock:
            sock.sendall(b'{"do":"take"}\nmore')
            until(lambda: len(taken) == 1)
            mine, rest = taken[0]
            with mine:
                assert rest == b"more"
                mine.send(b"hello")
                assert sock.recv(5) == b"hello"
                assert controlled.ask("version")
                sock.sendall(b"only mine\n")
                assert mine.recv(100) == b"only mine\n"

    def test_a_handler_that_fails(
        self, unstarted: Controlled, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(caller: requests.Requester, message: Mapping[str, Any]) -> None:
            raise ZeroDivisionError("oh\nno")

        controlled = unstarted.begin(handlers={"fail": fail})
        assert controlled.refused("fail") == "the server has an error, and logged it: oh no"
        assert "ZeroDivisionError" in caplog.text
        assert controlled.ask("version")


class TestWhoIsHeard:
    def test_the_file(self, controlled: Controlled) -> None:
        assert stat.S_IMODE(os.stat(controlled.path).st_mode) == 0o600

    def test_it_goes(self, unstarted: Controlled) -> None:
        with service_control.Control(
            service_control.listen(unstarted.path), unstarted.service
        ) as made:
            made.close()
        assert not os.path.exists(unstarted.path)

    @needs_root
    def test_another_user(self, controlled: Controlled) -> None:
        code = """
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(sys.argv[1])
            except PermissionError:
                print("not let in")
                input()
                sock.connect(sys.argv[1])
            try:
                sock.sendall(b'{"do":"reload"}\\n')
            except BrokenPipeError:
                pass
            print(sock.recv(1000).decode().strip())
            sock.close()
        """
        controlled.config = ValueError("reloaded")
        with python(code, controlled.path, user=NOBODY) as child:
            child.expect("not let in")
            os.chmod(controlled.path, 0o666)  # noqa: S103
            child.tell()
            reply = json.loads(child.line())
            child.finish()
        assert reply["ok"] is False
        assert reply["error"].startswith(f"uid {NOBODY} is not answered here, only uid 0")

    def test_the_client_hears_that_it_is_not_heard(self, unstarted: Controlled) -> None:
        controlled = unstarted.begin(uids=frozenset({NOBODY}))
        assert f"only uid {NOBODY}" in controlled.refused("version")


GARBAGE = {
    "empty": b"",
    "no JSON": b"status",
    "no object": b"[1]",
    "nothing to do": b"{}",
    "no word": b'{"do": ["status"]}',
    "unknown": b'{"do": "st\\u001b[2Jatus"}',
    "zeros": bytes(1000),
    "bytes": bytes(range(256)).replace(b"\n", b""),
    "UTF-16": '{"do": "x"}'.encode("utf-16"),
    "surrogate": b'{"do": "\\ud800"}',
    "deep": b"[" * 60_000,
    "deep and closed": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "digits": b'{"do": "evict", "id": ' + b"9" * 60_000 + b"}",
    "float": b'{"do": "evict", "id": 1e999}',
    "long word": b'{"do": "' + b"x" * 60_000 + b'"}',
    "region": b'{"do": "evict", "id": 1, "region": {"a": 1}}',
    "peers": b'{"do": "status", "peers": "yes"}',
}


CODES: dict[str, list[dict[str, Any]]] = {
    "bad-request": [{"do": "\0" * 70_000}],
    "unknown-request": [{"do": "statsu"}, {"do": 1}],
    "bad-field": [
        {"do": "status", "peers": 1},
        {"do": "evict", "id": "0"},
        {"do": "hold", "id": 0, "linger": 0},
        {"do": "hold-leaves", "on": "yes"},
    ],
    "no-such-region": [{"do": "evict", "id": 0, "region": "x"}, {"do": "status", "region": 7}],
    "no-such-peer": [{"do": "evict", "id": 9}, {"do": "hold", "id": 9}, {"do": "release", "id": 9}],
}


class TestCodes:
    """Each refusal has a word for programs, which stays when the text changes."""

    @pytest.mark.parametrize("code", CODES)
    def test_refused(self, controlled: Controlled, code: str) -> None:
        for message in CODES[code]:
            with pytest.raises(control.ControlError) as error:
                control.request(controlled.path, message, PATIENCE)
            assert error.value.code == code, message

    @pytest.mark.parametrize("line_", [b"[1]", b"{", b"\xff"])
    def test_not_a_request(self, controlled: Controlled, line_: bytes) -> None:
        with raw(controlled.path) as sock:
            sock.sendall(line_ + b"\n")
            assert line(sock)["code"] == "bad-request"

    def test_of_a_reload(self, controlled: Controlled) -> None:
        said = {
            ControlError("x", "busy"): "busy",
            ConfigError("x"): "bad-config",
            ivshmem.RegionError("x"): "bad-config",
            FileNotFoundError(errno.ENOENT, "No such file", "x"): "system",
            RuntimeError("x"): "internal",
        }
        for error, code in said.items():
            controlled.config = error
            with pytest.raises(control.ControlError) as refused:
                controlled.ask("reload")
            assert refused.value.code == code

    def test_a_fault_is_logged(
        self,
        controlled: Controlled,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Whatever it raises: only a reload is refused for a configuration."""
        for error in (ivshmem.RegionError("x"), ivshmem.ClosedError("x"), ZeroDivisionError("x")):
            monkeypatch.setattr(left_places, "free_places", Mock(side_effect=error))
            caplog.clear()
            with pytest.raises(control.ControlError, match="has an error, and logged it") as said:
                controlled.ask("free-places")
            assert said.value.code == "internal"
            assert type(error).__name__ in caplog.text

    def test_another_user(self, unstarted: Controlled) -> None:
        controlled = unstarted.begin(uids=frozenset({NOBODY}))
        with pytest.raises(control.ControlError) as error:
            controlled.ask("version")
        assert error.value.code == "not-allowed"

    def test_which_region(self, directory: Path) -> None:
        paths = {name: str(directory / name) for name in "ab"}
        with Controlled(str(directory / "c"), paths) as made:
            with pytest.raises(control.ControlError) as error:
                made.begin().ask("evict", id=0)
            assert error.value.code == "region-needed"

    @pytest.mark.usefixtures("commands")
    def test_a_socket_names_its_region(self, directory: Path) -> None:
        paths = {name: str(directory / name) for name in "ab"}
        with Controlled(f"{paths['a']}.control", paths) as made:
            made.begin()
            with ivshmem.connect(paths["a"], timeout=PATIENCE) as client:
                done = commands.run("release", str(client.id), "-S", paths["a"])
                assert (done.returncode, done.stderr) == (0, "")
            done = commands.run("hold", "7", "-S", paths["a"])
            assert "region a: peer 7 is not connected" in done.stderr
            done = commands.run("evict", "0", "--control", f"{paths['a']}.control")
            assert "--region NAME) has to be one of a, b" in done.stderr

    def test_a_control_socket_is_not_the_servers(self, unstarted: Controlled) -> None:
        made = unstarted.begin()
        with pytest.raises(TimeoutError, match="this looks like a control socket"):
            ivshmem.connect(made.path, timeout=0.05)

    def test_all_are_documented(self) -> None:
        source = Path(service_control.__file__).read_text()
        page = (HOME / "docs/reference/control-protocol.md").read_text()
        table = page.partition("| code | meaning |")[2].partition("\n\n")[0]
        documented = set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE))
        words = "(?:bad|no|not|unknown|region)-[a-z-]+|busy|system|internal"
        used = set(re.findall(f'"({words})"', source))
        assert used == documented
        assert documented >= CODES.keys()

    @pytest.mark.parametrize(
        ("reply", "code"),
        [
            (b'{"ok": false, "error": "x"}\n', ""),
            (b'{"ok": false, "error": "x", "code": "of-the-future"}\n', "of-the-future"),
            (b'{"ok": false, "error": "x", "code": "a\\u001b[2J"}\n', r"a\x1b[2J"),
        ],
        ids=["an older server", "a newer server", "an escape sequence"],
    )
    def test_of_other_servers(self, socket_path: str, reply: bytes, code: str) -> None:
        def answer(sock: socket.socket) -> None:
            sock.recv(100)
            sock.sendall(reply)

        with FakeServer(socket_path, answer), pytest.raises(control.ControlError) as error:
            control.request(socket_path, {"do": "status"}, PATIENCE)
        assert error.value.code == code


class TestHostileCallers:
    @pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
    def test_garbage(self, controlled: Controlled, data: bytes) -> None:
        with raw(controlled.path) as sock:
            sock.sendall(data + b"\n")
            reply = line(sock)
            assert reply.pop("ok") is False
            assert "\n" not in reply["error"]
            assert "\033" not in reply["error"]
            assert len(reply["error"]) <= 500
            sock.sendall(b'{"do":"version"}\n')
            assert line(sock)["ok"]

    def test_a_line_without_an_end(self, controlled: Controlled) -> None:
        with raw(controlled.path) as sock:
            sent = 0
            with pytest.raises(BrokenPipeError):  # noqa: PT012
                while sent < 1 << 30:
                    sent += sock.send(b"x" * (1 << 20))
            assert sent < 4 << 20
            reply = line(sock)
            assert reply["ok"] is False
            assert "at most 65536 bytes" in reply["error"]
        assert controlled.ask("version")

    def test_a_byte_at_a_time(self, controlled: Controlled) -> None:
        with raw(controlled.path) as sock:
            for byte in b'{"do":"version"}\n':
                sock.send(bytes([byte]))
            assert line(sock)["ok"]

    def test_hundreds_of_connections(self, controlled: Controlled) -> None:
        before = len(open_fds())
        with ExitStack() as idle:
            for _ in range(300):
                idle.enter_context(raw(controlled.path))
            assert controlled.ask("version")
            assert len(open_fds()) - before - 300 <= requests.CALLERS
        until(lambda: controlled.ask("version") is not None and len(open_fds()) <= before + 1)

    def test_the_busy_keep_their_place(self, controlled: Controlled) -> None:
        with control.ControlClient(controlled.path, PATIENCE) as busy, ExitStack() as idle:
            for _ in range(200):
                idle.enter_context(raw(controlled.path))
                assert busy.ask({"do": "version"})

    def test_who_does_not_read(self, unstarted: Controlled) -> None:
        """Every caller asks for a lot and reads nothing; what waits for them stays bounded."""
        size = 1 << 20

        def much(caller: requests.Requester, message: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"much": "x" * size}

        controlled = unstarted.begin(handlers={"much": much})
        inside = controlled.control._answering
        with ExitStack() as callers:
            socks = [callers.enter_context(raw(controlled.path)) for _ in range(60)]
            for sock in socks:
                sock.sendall(b'{"do":"much"}\n' * 100)
                assert controlled.ask("version")
                assert inside._unread <= requests.UNREAD
            assert inside._unread > requests.UNREAD // 2
            # The last one's reply is still there, and whole.
            assert len(line(socks[-1])["much"]) == size

    def test_a_flood_of_requests_delays_nobody_for_long(self, controlled: Controlled) -> None:
        with raw(controlled.path) as sock:
            answered = 0

            def drink() -> None:
                nonlocal answered
                with contextlib.suppress(ConnectionError):
                    while data := sock.recv(1 << 16):
                        answered += data.count(b"\n")

            def flood() -> None:
                with contextlib.suppress(OSError):
                    for _ in range(500):
                        sock.sendall(b'{"do":"version"}\n' * 100)

            threads = [Background(drink), Background(flood)]
            until(lambda: answered > 0)
            for _ in range(10):
                assert controlled.ask("version")
            assert answered < 50_000  # it was not waited for
            with ivshmem.connect(controlled.server().path, timeout=PATIENCE):
                pass
            sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.result()

    def test_vanishing_at_any_byte(self, controlled: Controlled) -> None:
        message = b'{"do":"version"}\n'
        for count in range(len(message) + 1):
            for _ in range(3):
                with raw(controlled.path) as sock:
                    sock.sendall(message[:count])
        assert controlled.ask("version")

    def test_descriptors_that_nobody_asked_for(self, controlled: Controlled) -> None:
        before = len(open_fds())
        with raw(controlled.path) as sock, open(os.devnull) as file:
            rights = array.array("i", [file.fileno()] * 8)
            sock.sendmsg([b'{"do":"version"}\n'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            assert line(sock)["ok"]
            assert len(open_fds()) <= before + 3
            assert controlled.ask("version")


SHORT = """
    import resource, signal, sys
    sys.path.insert(0, sys.argv[2])
    from support.running import Running
    from ivshmem.service import control
    path = sys.argv[1]
    with Running({"default": path}) as running:
        running.add(control.Control(control.listen(path + ".control"), running.service))
        signal.signal(signal.SIGTERM, lambda *_: running.service.stop())
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        print("READY")
        running.service.run()
"""


class TestShortages:
    def test_it_says_what_is_short_when_it_is(self, socket_path: str) -> None:
        """No descriptor is left for anything: newcomers wait, and the control socket says why."""
        tests = str(Path(__file__).parents[1])
        path = control.default_path(socket_path)
        with python(SHORT, socket_path, tests) as child, ExitStack() as peers:
            child.expect("READY")

            def paused() -> str:
                (region,) = control.request(path, {"do": "status"}, PATIENCE)["regions"]
                return str(region["paused"])

            def is_short() -> bool:
                """One more newcomer, since the last may have got what a question had taken."""
                peers.enter_context(RawPeer(socket_path))
                return paused() == "Too many open files"

            until(is_short)
            for _ in range(3):
                (region,) = control.request(path, {"do": "status"}, PATIENCE)["regions"]
                assert len(region["peers"]) > 5
                assert all(peer["interrupts"] == [0, 0] for peer in region["peers"])
            first = control.request(path, {"do": "status"}, PATIENCE)["server"]
            assert 55 <= first["fds"]["open"] <= first["fds"]["limit"] == 60
            with ExitStack() as idle:  # who goes makes room again
                for _ in range(10):
                    idle.enter_context(raw(path))
            until(is_short)
            peers.close()
            until(lambda: paused() == "")
            child.process.terminate()
            child.finish()


class TestTheClient:
    def test_a_server_s_other_socket(self, controlled: Controlled) -> None:
        """Whoever mistakes one for the other does not become a peer."""
        with pytest.raises(
            control.ControlError, match=r"is not a control socket .*socket\.control\)"
        ):
            control.request(controlled.server().path, {"do": "status"}, PATIENCE)
        assert controlled.ask("status")["regions"][0]["counts"].get("joins", 0) == 0

    def test_a_server_of_another_kind(self, socket_path: str) -> None:
        def greet(sock: socket.socket) -> None:
            send_raw(sock, 0)
            send_raw(sock, 10)  # a line break, by chance
            until_closed(sock)

        with (
            FakeServer(socket_path, greet),
            pytest.raises(control.ControlError, match="is not a control socket"),
        ):
            control.request(socket_path, {"do": "status"}, PATIENCE)

    @pytest.mark.parametrize("reply", [b"[]\n", b'{"ok": 1}\n', b"{}\n", b"\xff\n", b'{"ok"'])
    def test_nonsense(self, socket_path: str, reply: bytes) -> None:
        def answer(sock: socket.socket) -> None:
            sock.recv(100)
            sock.sendall(reply)

        with (
            FakeServer(socket_path, answer),
            pytest.raises(control.ControlError, match="is not a control socket"),
        ):
            control.request(socket_path, {"do": "status"}, PATIENCE)

    def test_an_error_cannot_carry_an_escape_sequence(self, socket_path: str) -> None:
        def answer(sock: socket.socket) -> None:
            sock.recv(100)
            sock.sendall(b'{"ok": false, "error": "a\\u001b[2J"}\n')

        told = pytest.raises(control.ControlError, match=r"a\\x1b\[2J")
        with FakeServer(socket_path, answer), told:
            control.request(socket_path, {"do": "status"}, PATIENCE)

    def test_one_that_does_not_answer(self, unstarted: Controlled) -> None:
        with service_control.Control(service_control.listen(unstarted.path), unstarted.service):
            with pytest.raises(TimeoutError, match=r"no reply within 0\.05 seconds"):
                control.request(unstarted.path, {"do": "status"}, 0.05)

    def test_one_that_hangs_up(self, socket_path: str) -> None:
        with (
            FakeServer(socket_path, lambda sock: sock.recv(100)),
            pytest.raises(ConnectionResetError, match="closed the connection"),
        ):
            control.request(socket_path, {"do": "status"}, PATIENCE)

    def test_nobody(self, socket_path: str) -> None:
        with pytest.raises(FileNotFoundError):
            control.request(socket_path, {"do": "status"}, PATIENCE)
