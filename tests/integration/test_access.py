"""Who is let in, and what a read-only peer can and cannot do, with real processes of real users."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import stat
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.children import NOBODY, needs_root, python
from support.mounts import huge_pages
from support.peer import RawPeer
from support.waiting import PATIENCE, in_child, until

import ivshmem
from ivshmem.peer.inquiry import ask
from ivshmem.server.access import Rules
from ivshmem.system.credentials import credentials
from ivshmem.system.listener import Listener

MIB = 1 << 20
MakeServer = Callable[..., ivshmem.Server]


@pytest.fixture
def serve(socket_path: str) -> Iterator[Callable[..., ivshmem.Server]]:
    """Makes a server that lets in, by its socket, everybody whom the rules do."""
    with ExitStack() as servers:

        def make(memory: ivshmem.Region | int = 4096, **rules: object) -> ivshmem.Server:
            listener = Listener(socket_path, mode=0o666)
            gate = Rules(**rules).judge  # type: ignore[arg-type]
            return servers.enter_context(ivshmem.Server(listener, memory, 2, gate=gate)).start()

        yield make


CLIENT = """
    import sys, ivshmem
    try:
        with ivshmem.connect(sys.argv[1], timeout=60) as client:
            print("in", client.id, client.region.readonly)
            sys.stdin.readline()
    except ivshmem.ServerGone as error:
        print("refused", error)
"""


# -- let in or not --------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@needs_root
@pytest.mark.parametrize(
    ("rules", "answer"),
    [
        ({}, "in 0 False"),
        ({"allow": [f"uid:{NOBODY}"]}, "in 0 False"),
        ({"allow": [f"gid:{NOBODY}"]}, "in 0 False"),
        ({"allow": ["root"]}, "refused"),
        ({"deny": ["uid:nobody"]}, "refused"),
        ({"allow": ["all"], "deny": [f"gid:{NOBODY}"]}, "refused"),
        ({"readonly": ["uid:nobody"]}, "in 0 True"),
    ],
)
def test_rules(
    serve: MakeServer, socket_path: str, rules: dict[str, list[str]], answer: str
) -> None:
    server = serve(**rules)
    with python(CLIENT, socket_path, user=NOBODY) as child:
        assert child.line().startswith(answer)
        assert len(server.peers) == (answer != "refused")
        child.tell()
        child.finish()


@needs_root
def test_supplementary_groups_count(serve: MakeServer, socket_path: str) -> None:
    """Those at the time of connecting, as the kernel noted them."""
    server = serve(allow=["gid:4321"])
    with python(
        f"""
        import os, socket, sys
        os.setgroups([99, 4321])
        os.setresuid(*3 * [{NOBODY}])
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(sys.argv[1])
            print(len(sock.recv(8)))
            sys.stdin.readline()
        """,
        socket_path,
    ) as child:
        child.expect("8")
        (peer,) = server.peers
        assert (peer.uid, peer.gid) == (NOBODY, os.getgid())
        child.tell()
        child.finish()


@needs_root
@pytest.mark.parametrize("count", [0, 3, 256, 257, 300])
def test_groups_of_a_process_in_many(socket_path: str, count: int) -> None:
    """More than the kernel is asked for at first."""
    groups = list(range(2000, 2000 + count))
    with Listener(socket_path, mode=0o666) as listener:
        listener.listen()
        with python(
            f"""
            import os, socket, sys
            os.setgroups({groups})
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(sys.argv[1])
                sys.stdin.readline()
            """,
            socket_path,
        ) as child:
            listener.socket.setblocking(True)
            sock, _ = listener.socket.accept()
            with sock:
                assert credentials(sock).groups == tuple(groups)
            child.tell()
            child.finish()


def test_processes(serve: MakeServer, socket_path: str) -> None:
    """The program's file, not the script's name."""
    server = serve(allow=["process:" + os.path.basename(os.readlink("/proc/self/exe"))])
    with python(CLIENT, socket_path) as child:
        child.expect("in 0 False")
        assert [peer.pid for peer in server.peers] == [child.pid]
        child.tell()
        child.finish()


def test_refused_before_anything_is_sent(
    serve: MakeServer, socket_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No byte, no id, nobody is told; who only asks is refused, too. It is logged once a minute."""
    server = serve(deny=["all"])
    with caplog.at_level(logging.WARNING, "ivshmem.server"):
        for _ in range(100):
            with RawPeer(socket_path) as peer:
                assert peer.receive() is None
        with pytest.raises((ivshmem.ServerGone, ConnectionError)):
            ask(socket_path, PATIENCE)
    assert server.peers == []
    assert len(caplog.records) == 1
    assert "deny all" in caplog.text


def test_a_refused_crowd_takes_no_ids(serve: MakeServer, socket_path: str) -> None:
    serve(deny=[f"uid:{os.getuid()}"], allow=["all"])
    for _ in range(50):
        RawPeer(socket_path).close()
    if os.getuid() == 0:
        with python(CLIENT, socket_path, user=NOBODY) as child:
            child.expect("in 0 False")
            child.tell()
            child.finish()


def test_limit_for_each_user(serve: MakeServer, socket_path: str) -> None:
    """A leave makes room; other users have their own."""
    server = serve(peers_per_uid=2)
    with RawPeer(socket_path).set_up(2), RawPeer(socket_path) as second:
        second.set_up(2)
        with RawPeer(socket_path) as third:
            assert third.receive() is None
        assert ask(socket_path, PATIENCE)["peers"] == 2
        if os.getuid() == 0:
            with python(CLIENT, socket_path, user=NOBODY) as child:
                child.expect("in 2 False")
                child.tell()
                child.finish()
        second.close()
        until(lambda: len(server.peers) == 1)
        RawPeer(socket_path).set_up(2).close()


# -- reading only ---------------------------------------------------------------------------------

# What somebody with a read-only descriptor may try, one line each; prints what succeeded.
TRIES = textwrap.dedent(
    """
    import ctypes, fcntl, mmap, os

    def tries(fd):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        size = os.fstat(fd).st_size

        def check(result):
            if result:
                raise OSError(ctypes.get_errno(), "")

        def mapped(call, *arguments):
            address = libc.mmap(None, ctypes.c_long(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            address, length = ctypes.c_void_p(address), ctypes.c_long(size)
            try:
                check(call(address, length, *arguments))
            finally:
                libc.munmap(address, length)

        def fallocate(mode):
            check(libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(2 * size)))

        attempts = {
            "read": lambda: os.pread(fd, 1, 0),
            "map for reading": lambda: mmap.mmap(fd, size, prot=mmap.PROT_READ).close(),
            "map for writing": lambda: mmap.mmap(fd, size).close(),
            "mprotect": lambda: mapped(libc.mprotect, mmap.PROT_READ | mmap.PROT_WRITE),
            "write": lambda: os.pwrite(fd, b"x", 0),
            "truncate": lambda: os.ftruncate(fd, 0),
            "grow": lambda: os.ftruncate(fd, 2 * size),
            "allocate": lambda: fallocate(0),
            "punch a hole": lambda: fallocate(3),
            "remove pages": lambda: mapped(libc.madvise, 9),  # MADV_REMOVE
            "seal": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            "chmod": lambda: os.fchmod(fd, 0o600),
            "open again for writing": lambda: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR)),
        }
        done = []
        for name, attempt in attempts.items():
            try:
                attempt()
                done.append(name)
            except OSError:
                pass
        return done
    """
)

READ = ["read", "map for reading"]
OWNER = ["chmod", "open again for writing"]


_NAMES: dict[str, Any] = {}
exec(TRIES, _NAMES)  # noqa: S102 - the same text runs in other processes
tries: Callable[[int], list[str]] = _NAMES["tries"]


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    if "huge" not in request.param:
        yield request.param
        return
    if os.geteuid() != 0:
        pytest.skip("needs root to reserve huge pages")
    with huge_pages(2 * MIB, 2) as got:
        if not got:
            pytest.skip("no huge pages")
        yield request.param


def make_region(kind: str, directory: Path, shm_name: str) -> ivshmem.Region:
    if kind == "memfd":
        return ivshmem.Region.create(8192)
    if kind == "posix":
        return ivshmem.Region.create(8192, name=shm_name)
    if kind == "file":
        return ivshmem.Region.create(8192, path=directory / "memory")
    return ivshmem.Region.create("2M", hugepages="2M")


each_kind = pytest.mark.parametrize("kind", ["memfd", "posix", "file", "huge memfd"], indirect=True)


@each_kind
def test_readonly_descriptor(kind: str, directory: Path, shm_name: str) -> None:
    """It is the same memory; the region's own descriptor stays as it is."""
    with make_region(kind, directory, shm_name) as region:
        fd = region.readonly_fd()
        assert not os.get_inheritable(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with ivshmem.Region.from_fd(fd) as seen, memoryview(region) as memory:
            assert seen.readonly
            assert not region.readonly
            assert seen.page_size == region.page_size
            memory[5] = 7
            with memoryview(seen) as view:
                assert view[5] == 7
                assert view.readonly


@needs_root
@each_kind
def test_what_another_user_can_do_with_it(kind: str, directory: Path, shm_name: str) -> None:
    with make_region(kind, directory, shm_name) as region:
        fd = region.readonly_fd()

        def child() -> None:
            become(NOBODY)
            done = tries(fd)
            assert done == READ, done

        try:
            in_child(child)
        finally:
            os.close(fd)


@needs_root
@each_kind
def test_what_the_same_user_can_do_with_it(kind: str, directory: Path, shm_name: str) -> None:
    """The file is its own: it opens it again. What cannot be fixed is at least known."""
    with make_region(kind, directory, shm_name) as region:
        os.fchown(region.fileno(), NOBODY, -1)
        fd = region.readonly_fd()

        def child() -> None:
            become(NOBODY)
            done = tries(fd)
            assert done == READ + OWNER, done

        try:
            in_child(child)
        finally:
            os.close(fd)


@needs_root
def test_what_root_can_do_with_it() -> None:
    with ivshmem.Region.create(8192) as region:
        fd = region.readonly_fd()
        try:
            assert tries(fd) == READ + OWNER
        finally:
            os.close(fd)


def test_permissions_of_anonymous_memory() -> None:
    """Only its owner opens it again, though a memfd begins with permissions for everybody."""
    with ivshmem.Region.create(4096) as region:
        assert stat.S_IMODE(os.fstat(region.fileno()).st_mode) == 0o600


@needs_root
def test_the_user_has_changed_since() -> None:
    def child() -> None:
        with ivshmem.Region.create(4096) as region:
            become(NOBODY)
            with pytest.raises(PermissionError, match="cannot be opened again for reading only"):
                region.readonly_fd()

    in_child(child)


def test_readonly_descriptor_of_a_closed_region() -> None:
    region = ivshmem.Region.create(4096)
    region.close()
    with pytest.raises(ivshmem.ClosedError):
        region.readonly_fd()


@needs_root
def test_readonly_peer(serve: MakeServer, socket_path: str) -> None:
    """It sees what others write, rings and is rung, and cannot write, by whatever way."""
    serve(readonly=[f"uid:{NOBODY}"])
    code = TRIES + textwrap.dedent("""
        client = ivshmem.connect(sys.argv[1], timeout=60)
        print(tries(client.region.fileno()))
        client.ring(0, 1)
        print("rung", client.wait(0, 60))
        print(bytes(client.region.read(100, 5)))
        client.close()
        """)
    with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
        assert not client.region.readonly
        with python(code, socket_path, user=NOBODY) as child:
            child.expect(str(READ))
            assert client.wait(1, PATIENCE) == 1
            client.region.write(100, b"hello")
            client.ring(1, 0)
            child.expect("rung 1")
            child.expect("b'hello'")
            child.finish()


# -- what a peer that can write does to the others ------------------------------------------------


@pytest.mark.parametrize("kind", ["posix", "file"], indirect=True)
def test_who_can_write_to_named_memory_can_kill_all_its_users(
    kind: str, directory: Path, shm_name: str
) -> None:
    """No seal can be had there. SECURITY.md says so."""
    with make_region(kind, directory, shm_name) as region, ExitStack() as stack:
        code = """
            import sys, ivshmem
            region = ivshmem.Region.attach(path=sys.argv[1])
            print("READY")
            sys.stdin.readline()
            region.read(0, 1)
        """
        assert region._path is not None
        child = stack.enter_context(python(code, region._path))
        child.expect("READY")
        os.ftruncate(region.fileno(), 0)
        child.tell()
        assert child.process.wait(PATIENCE) == -signal.SIGBUS


@pytest.mark.parametrize("kind", ["memfd", "huge memfd"], indirect=True)
def test_nobody_can_change_the_size_of_anonymous_memory(
    kind: str, directory: Path, shm_name: str
) -> None:
    """Nor add a seal. A hole can be punched: in small pages it reads as zeros."""
    with make_region(kind, directory, shm_name) as region:
        done = tries(region.fileno())
        assert {"map for writing", "open again for writing"} <= {*done}
        assert not {"truncate", "grow", "allocate", "seal"} & {*done}
        assert region.info().size == region.size
        if kind == "memfd":
            assert "punch a hole" in done
            region.write(0, b"x")
            fallocate = ctypes.CDLL(None).fallocate
            assert fallocate(region.fileno(), 3, ctypes.c_long(0), ctypes.c_long(4096)) == 0
            assert region.read(0, 4096) == bytes(4096)


def test_who_has_left_keeps_what_it_has(serve: MakeServer, socket_path: str) -> None:
    """Memory and doorbells: hanging up on a peer takes nothing away from it."""
    fds: dict[tuple[int, int], int] = {}
    serve()
    with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
        with RawPeer(socket_path, lambda *key: fds.update({key[:2]: key[2]})) as peer:
            peer.set_up(2)
        until(lambda: client.peers == [])
        try:
            os.eventfd_write(fds[0, 1], 1)
            assert client.wait(1, PATIENCE) == 1
        finally:
            for fd in fds.values():
                os.close(fd)


def become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
