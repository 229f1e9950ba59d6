"""The server's place in the file system: stale sockets are replaced, live ones never.

Two servers that start at once do not harm each other; what is no socket is kept; closing removes
only what is one's own; errors say what, why and what to do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.children import NOBODY, needs_root, python
from support.leaks import open_fds
from support.limits import free_fds
from support.peer import RawPeer, memory_fd
from support.waiting import PATIENCE, in_child, until

import ivshmem
from ivshmem import Server
from ivshmem.system.credentials import credentials
from ivshmem.system.listener import Listener
from ivshmem.system.sockets import check_path, is_live

SERVE = """
    import sys, ivshmem
    with ivshmem.Server(sys.argv[1], 4096) as server:
        server.start()
        print("READY")
        sys.stdin.readline()
"""


def make_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


def refused(path: str, blamed: str | None = None) -> OSError:
    """The error of a server that cannot listen there; it blames the path, or what stands before."""
    before = open_fds()
    with pytest.raises(OSError) as caught:
        Server(path, 4096)
    assert open_fds() == before
    assert caught.value.filename == (blamed or path)
    return caught.value


# -- stale and live -------------------------------------------------------------------------------


def test_stale_socket_is_replaced(socket_path: str) -> None:
    make_stale(socket_path)
    assert not is_live(socket_path)
    with Server(socket_path, 4096) as server:
        assert is_live(socket_path)
        server.start()
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            assert client.id == 0


def test_socket_of_a_killed_server_is_replaced(socket_path: str) -> None:
    with python(SERVE, socket_path) as child:
        child.expect("READY")
        child.kill()
    assert os.path.lexists(socket_path)
    Server(socket_path, 4096).close()


def test_live_server_is_left_alone(socket_path: str) -> None:
    with Server(socket_path, 4096) as server:
        inode = os.lstat(socket_path).st_ino
        error = refused(socket_path)
        assert error.errno == errno.EADDRINUSE
        assert "another process listens here: stop it, or choose another path" in str(error)
        assert os.lstat(socket_path).st_ino == inode
        server.start()
        with RawPeer(socket_path) as peer:
            peer.set_up(1)
            assert peer.id == 0, "asking whether it lives is no join"
            assert len(server.peers) == 1


def test_live_server_in_another_process(socket_path: str) -> None:
    with python(SERVE, socket_path) as child:
        child.expect("READY")
        assert refused(socket_path).errno == errno.EADDRINUSE
        os.kill(child.pid, signal.SIGSTOP)  # also when it hangs
        assert refused(socket_path).errno == errno.EADDRINUSE
        os.kill(child.pid, signal.SIGCONT)
        with RawPeer(socket_path) as peer:
            assert peer.set_up(1).id == 0
        child.tell()
        assert child.finish() == ""
    assert not os.path.lexists(socket_path)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_live_socket_of_any_kind_is_left_alone(socket_path: str, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(socket_path)
        if kind != socket.SOCK_DGRAM:
            # Bound and not listening yet: it is somebody's, not stale.
            assert is_live(socket_path)
            sock.listen()
        assert refused(socket_path).errno == errno.EADDRINUSE
        os.unlink(socket_path)


def test_bound_and_not_yet_listening(socket_path: str) -> None:
    """Others are refused until the owner is ready, and its path is safe already."""
    with Listener(socket_path) as listener:
        with pytest.raises(ConnectionRefusedError):
            ivshmem.connect(socket_path)
        assert refused(socket_path).errno == errno.EADDRINUSE
        with Server(listener, 4096) as server:
            assert server.path == socket_path
            server.start()
            ivshmem.connect(socket_path, timeout=PATIENCE).close()


def test_a_full_backlog_does_not_look_stale(socket_path: str) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(Server(socket_path, 4096))
        for _ in range(300):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.setblocking(False)
            peer.connect_ex(socket_path)
        assert refused(socket_path).errno == errno.EADDRINUSE
        assert server.peers == []


RACE = """
    import errno, os, sys, ivshmem
    print("READY")
    for line in sys.stdin:
        try:
            server = ivshmem.Server(sys.argv[1], 4096)
        except OSError as error:
            print(errno.errorcode[error.errno])
        else:
            print("won")
            sys.stdin.readline()
            server.close()
            print("closed")
"""


def test_two_servers_race_for_a_stale_socket(socket_path: str) -> None:
    """Fifty times; exactly one wins, and it is reachable."""
    with python(RACE, socket_path) as one, python(RACE, socket_path) as other:
        racers = (one, other)
        for racer in racers:
            racer.expect("READY")
        for turn in range(50):
            make_stale(socket_path)
            for racer in racers[:: 1 if turn % 2 else -1]:
                racer.tell()
            lines = [racer.line() for racer in racers]
            assert sorted(lines) == ["EADDRINUSE", "won"]
            assert is_live(socket_path)
            winner = racers[lines.index("won")]
            winner.tell()
            winner.expect("closed")
            assert not os.path.lexists(socket_path)


# -- what is in the way ---------------------------------------------------------------------------


def test_regular_file_is_kept(directory: Path) -> None:
    file = directory / "file"
    file.write_text("precious")
    error = refused(str(file))
    assert isinstance(error, FileExistsError)
    assert "exists and is not a socket: choose another path" in str(error)
    assert file.read_text() == "precious"


def test_directory_and_link_are_kept(directory: Path) -> None:
    (directory / "inner").mkdir()
    (directory / "link").symlink_to("nowhere")
    for name in ("inner", "link"):
        assert isinstance(refused(str(directory / name)), FileExistsError)
    assert (directory / "link").is_symlink()


def test_directory_is_missing(directory: Path) -> None:
    error = refused(str(directory / "no" / "socket"), str(directory / "no"))
    assert isinstance(error, FileNotFoundError)


def test_directory_is_a_file(directory: Path) -> None:
    (directory / "file").write_text("")
    error = refused(str(directory / "file" / "socket"), str(directory / "file"))
    assert isinstance(error, NotADirectoryError)


def test_path_too_long(directory: Path) -> None:
    room = 107 - len(str(directory)) - 1
    longest = str(directory / ("x" * room))
    assert check_path(longest) == longest
    with Server(longest, 4096) as server:
        server.start()
        ivshmem.connect(longest, timeout=PATIENCE).close()
    error = refused(longest + "x")
    assert error.errno == errno.ENAMETOOLONG
    assert "a socket path has at most 107 bytes, this one 108: use a shorter one" in str(error)
    assert refused(str(directory / ("\xe4" * room))).errno == errno.ENAMETOOLONG, "bytes count"


def test_relative_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found again from another directory when it is removed."""
    monkeypatch.chdir(directory)
    with Server("socket", 4096) as server:
        assert server.path == str(directory / "socket")
        monkeypatch.chdir("/")
        assert (directory / "socket").is_socket()
    assert not (directory / "socket").exists()


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_no_path(path: str) -> None:
    error = refused(path)
    assert error.errno == errno.EINVAL
    assert "a socket needs a path" in str(error)


def test_path_objects(directory: Path) -> None:
    with Server(directory / "socket", 4096) as server:
        server.start()
        ivshmem.connect(directory / "socket", timeout=PATIENCE).close()


@needs_root
def test_no_permission(directory: Path) -> None:
    directory.chmod(0o755)
    code = """
        import sys, ivshmem
        try:
            ivshmem.Server(sys.argv[1], 4096)
        except PermissionError as error:
            print(error.filename)
    """
    with python(code, str(directory / "socket"), user=NOBODY) as child:
        child.expect(str(directory / "socket"))
        child.finish()


@needs_root
def test_directory_that_may_be_written_and_not_read(directory: Path, socket_path: str) -> None:
    """It cannot be locked, and serves all the same."""
    directory.chmod(0o333)
    with python(SERVE, socket_path, user=NOBODY) as child:
        child.expect("READY")
        ivshmem.connect(socket_path, timeout=PATIENCE).close()
        child.tell()
        child.finish()


def test_nothing_is_left_in_the_directory(directory: Path, socket_path: str) -> None:
    with Server(socket_path, 4096):
        assert os.listdir(directory) == ["socket"]
    assert os.listdir(directory) == []


def test_an_error_after_binding_leaves_no_socket(socket_path: str) -> None:
    with pytest.raises(ivshmem.RegionError):
        Server(socket_path, "3M")
    assert not os.path.lexists(socket_path)
    with Listener(socket_path) as listener:
        with pytest.raises(ivshmem.RegionError):
            Server(listener, "3M")


# -- closing --------------------------------------------------------------------------------------


def test_close_removes_only_its_own(socket_path: str) -> None:
    """Somebody removed the socket and put another there."""
    with Server(socket_path, 4096) as server:
        os.unlink(socket_path)
        with Server(socket_path, 4096) as other:
            server.close()
            assert os.path.lexists(socket_path)
            other.start()
            ivshmem.connect(socket_path, timeout=PATIENCE).close()
    assert not os.path.lexists(socket_path)


def test_close_when_it_is_gone_already(socket_path: str) -> None:
    with Server(socket_path, 4096):
        os.unlink(socket_path)


def test_close_does_not_mind_what_stands_there_now(directory: Path) -> None:
    path = directory / "socket"
    with Server(path, 4096):
        path.unlink()
        path.write_text("precious")
    assert path.read_text() == "precious"


def test_listener_closed_twice(socket_path: str) -> None:
    listener = Listener(socket_path)
    listener.close()
    listener.close()
    assert not os.path.lexists(socket_path)


def test_forked_child_leaves_the_path_to_its_parent(socket_path: str) -> None:
    with Listener(socket_path) as listener:
        in_child(listener.close)
        assert is_live(socket_path)


# -- permissions ----------------------------------------------------------------------------------


@pytest.fixture(params=[0, 0o022, 0o077, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    assert os.umask(before) == request.param, "the umask is the whole process's"


def permissions(path: str) -> tuple[int, int, int]:
    status = os.lstat(path)
    return status.st_mode & 0o7777, status.st_uid, status.st_gid


def test_no_mode_is_what_the_umask_leaves(socket_path: str, umask: int) -> None:
    with Listener(socket_path):
        assert permissions(socket_path) == (0o777 & ~umask, os.geteuid(), os.getegid())


@pytest.mark.parametrize("mode", [0, 0o600, 0o660, 0o666, 0o777])
def test_mode(socket_path: str, umask: int, mode: int) -> None:
    with Listener(socket_path, mode=mode) as listener:
        assert permissions(socket_path) == (mode, os.geteuid(), os.getegid())
        listener.listen()
        assert permissions(socket_path) == (mode, os.geteuid(), os.getegid())


@needs_root
@pytest.mark.parametrize(
    ("owner", "group", "expected"),
    [
        (None, None, (0, 0)),
        (NOBODY, None, (NOBODY, 0)),
        ("nobody", None, (NOBODY, 0)),
        (None, str(NOBODY), (0, NOBODY)),
        ("1234", 4321, (1234, 4321)),
    ],
)
@pytest.mark.parametrize("mode", [None, 0o640])
def test_owner(
    socket_path: str,
    umask: int,
    mode: int | None,
    owner: int | str | None,
    group: int | str | None,
    expected: tuple[int, int],
) -> None:
    with Listener(socket_path, mode=mode, owner=owner, group=group):
        assert permissions(socket_path) == (0o777 & ~umask if mode is None else mode, *expected)


@needs_root
def test_nobody_comes_in_before_the_mode_is_right(socket_path: str) -> None:
    """From bind to chmod the file admits nobody, whoever owns it."""
    seen = []

    real = os.chown

    def chown(path: str, uid: int, gid: int) -> None:
        seen.append(permissions(socket_path))
        real(path, uid, gid)
        seen.append(permissions(socket_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "chown", chown)
        with Listener(socket_path, mode=0o660, owner=NOBODY, group=NOBODY):
            assert seen == [(0, 0, 0), (0, NOBODY, NOBODY)]
            assert permissions(socket_path) == (0o660, NOBODY, NOBODY)


CONNECT = """
    import socket, sys
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(sys.argv[1])
            print("in")
        except PermissionError:
            print("refused")
"""


@needs_root
@pytest.mark.parametrize(
    ("mode", "group", "answer"),
    [(0o600, None, "refused"), (0o660, NOBODY, "in"), (0o666, None, "in"), (0o606, None, "in")],
)
def test_who_may_write_may_connect(
    socket_path: str, mode: int, group: int | None, answer: str
) -> None:
    with Listener(socket_path, mode=mode, group=group) as listener:
        listener.listen()
        with python(CONNECT, socket_path, user=NOBODY) as child:
            child.expect(answer)
            child.finish()


@needs_root
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("owner=0", "the socket cannot be given to uid 0: only root can do that"),
        ("group=0", "the socket cannot be given to gid 0: this process is not in that group"),
        ("owner=65534, group=0", "the socket cannot be given to gid 0"),
    ],
)
def test_what_cannot_be_given_away(socket_path: str, arguments: str, reason: str) -> None:
    """And nothing is left behind."""
    code = f"""
        import sys
        from ivshmem.system.listener import Listener
        try:
            Listener(sys.argv[1], mode=0o660, {arguments})
        except PermissionError as error:
            print(error)
    """
    with python(code, socket_path, user=NOBODY) as child:
        assert reason in child.line()
        child.finish()
    assert not os.path.lexists(socket_path)


@needs_root
def test_not_root(socket_path: str) -> None:
    """A mode of its own, and a group that it is in."""
    code = """
        import os, sys
        from ivshmem.system.listener import Listener
        os.umask(0o777)
        with Listener(sys.argv[1], mode=0o660, owner=65534, group="65534"):
            status = os.lstat(sys.argv[1])
            print(f"{status.st_mode & 0o7777:o}", status.st_uid, status.st_gid)
    """
    with python(code, socket_path, user=NOBODY) as child:
        child.expect("660 65534 65534")
        child.finish()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": 0o1000}, "mode 0o1000: 0 to 0o777 are allowed, for example 0o660"),
        ({"mode": -1}, "mode -0o1: 0 to"),
        ({"owner": "ivshmem-nobody"}, "no user 'ivshmem-nobody' on this system"),
        ({"group": "ivshmem-nobody"}, "no group 'ivshmem-nobody' on this system"),
        ({"owner": 2**32}, "uid 4294967296: allowed are 0 to 4294967294"),
    ],
)
def test_no_permissions(socket_path: str, arguments: dict[str, int | str], message: str) -> None:
    before = open_fds()
    with pytest.raises(ValueError, match=message):
        Listener(socket_path, **arguments)  # type: ignore[arg-type]
    assert open_fds() == before
    assert not os.path.lexists(socket_path)


@pytest.mark.parametrize("kind", ["link", "file", "socket"])
def test_a_swapped_path_harms_nobody(
    directory: Path, socket_path: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Who may write to the directory puts another file there just after bind."""
    precious = directory / "precious"
    precious.write_text("")
    precious.chmod(0o604)
    real = socket.socket.bind
    other = socket.socket(socket.AF_UNIX)

    class Swapped(socket.socket):
        def bind(self, address: object) -> None:
            real(self, address)  # type: ignore[arg-type]
            os.unlink(socket_path)
            if kind == "link":
                os.symlink(precious, socket_path)
            elif kind == "file":
                os.link(precious, socket_path)
            else:
                other.bind(socket_path)

    with other:
        monkeypatch.setattr(socket, "socket", Swapped)
        with pytest.raises(OSError, match="another process replaced the socket") as caught:
            Listener(socket_path, mode=0o666, owner=os.geteuid())
        monkeypatch.undo()
    assert caught.value.filename == socket_path
    assert permissions(str(precious))[0] == 0o604
    os.unlink(socket_path)  # what is not one's own stays


def test_out_of_descriptors_just_after_binding(socket_path: str) -> None:
    # One is for the socket and one for the lock of its directory: none is left to set the mode.
    with free_fds(2), pytest.raises(OSError, match="Too many open files"):
        Listener(socket_path, mode=0o600)


# -- handing over ---------------------------------------------------------------------------------


def inherited(path: str) -> int:
    """A listening socket as another process hands it over: blocking, and kept by exec."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        sock.set_inheritable(True)
        return sock.detach()


def test_adopt(socket_path: str) -> None:
    fd = inherited(socket_path)
    with Listener.adopt(fd) as listener:
        assert listener.socket.fileno() == fd
        assert listener.path == socket_path
        assert not os.get_inheritable(fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
        with Server(listener, 4096) as server:
            assert server.path == socket_path
            server.start()
            ivshmem.connect(socket_path, timeout=PATIENCE).close()
    assert os.path.lexists(socket_path), "it is whoever's who made it"
    os.unlink(socket_path)


def test_adopt_and_remove(socket_path: str) -> None:
    Listener.adopt(inherited(socket_path), unlink=True).close()
    assert not os.path.lexists(socket_path)


def test_adopt_and_find_another_there_in_the_end(socket_path: str) -> None:
    with Listener.adopt(inherited(socket_path), unlink=True):
        os.unlink(socket_path)
        Path(socket_path).write_text("precious")
    assert Path(socket_path).read_text() == "precious"
    os.unlink(socket_path)


def test_adopt_an_abstract_address() -> None:
    name = f"ivshmem-test-{os.getpid()}"
    with Listener.adopt(inherited(f"\0{name}"), unlink=True) as listener:
        assert listener.path == f"@{name}"


def test_adopt_a_relative_path(
    directory: Path, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one from another process's directory; what has that name here is somebody else's."""
    with monkeypatch.context() as patch:
        patch.chdir(directory)
        fd = inherited("socket")
        with Listener.adopt(fd, unlink=True) as listener:
            assert listener.path == "socket"
    os.unlink(socket_path)


def test_handed_over(socket_path: str) -> None:
    """The old server lets go; a client that connects then waits for the new one."""
    old = Listener(socket_path, mode=0o600)
    old.listen()
    fd = os.dup(old.socket.fileno())
    old.close(unlink=False)
    with RawPeer(socket_path) as peer, Listener.adopt(fd, unlink=True) as listener:
        with Server(listener, 4096).start():
            peer.set_up(1)


def test_unlinks_can_be_changed(socket_path: str) -> None:
    listener = Listener(socket_path)
    listener.unlinks = False
    listener.close()
    assert os.path.lexists(socket_path)
    Listener(socket_path).close(unlink=True)


@pytest.mark.parametrize(
    ("make", "number", "reason"),
    [
        (memory_fd, errno.ENOTSOCK, "is not a socket"),
        (lambda: socket.socket(socket.AF_INET).detach(), errno.EAFNOSUPPORT, "another family"),
        (
            lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
            errno.EPROTOTYPE,
            "another type",
        ),
        (
            lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach(),
            errno.EPROTOTYPE,
            "another type",
        ),
        (lambda: socket.socket(socket.AF_UNIX).detach(), errno.EINVAL, "does not listen"),
        (lambda: 1000, errno.EBADF, "is not open"),
    ],
)
def test_what_cannot_be_adopted(make: Callable[[], int], number: int, reason: str) -> None:
    before = open_fds()
    fd = make()
    with pytest.raises(OSError, match=reason) as caught:
        Listener.adopt(fd)
    assert caught.value.errno == number
    assert f"descriptor {fd} " in str(caught.value)
    assert str(caught.value).endswith("expected a listening Unix stream socket")
    assert open_fds() == before, "it was not closed"


# -- who is there ---------------------------------------------------------------------------------


def test_credentials(socket_path: str) -> None:
    code = """
        import socket, sys
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(sys.argv[1])
            print("READY")
            sys.stdin.readline()
    """
    with Listener(socket_path) as listener:
        listener.listen()
        with python(code, socket_path) as child:
            child.expect("READY")
            with until(lambda: _accept(listener)) as sock:
                name = Path(f"/proc/{child.pid}/comm").read_text().rstrip()
                groups = tuple(os.getgroups())
                assert credentials(sock) == (child.pid, os.getuid(), os.getgid(), name, groups)
                child.kill()
                assert credentials(sock) == (child.pid, os.getuid(), os.getgid(), "?", groups)


def _accept(listener: Listener) -> socket.socket | None:
    try:
        return listener.socket.accept()[0]
    except BlockingIOError:
        return None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"qemu-system-x86", "qemu-system-x86"),
        (b"a\x1b[31mb", "a\\x1b[31mb"),
        (b"\xff\xfe", "\\xff\\xfe"),
    ],
)
def test_names_of_processes_cannot_paint_the_terminal(
    socket_path: str, name: bytes, shown: str
) -> None:
    before = Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    with Listener(socket_path) as listener:
        listener.listen()
        Path("/proc/self/comm").write_bytes(name)
        try:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(socket_path)
                with until(lambda: _accept(listener)) as sock:
                    assert credentials(sock).process == shown
        finally:
            Path("/proc/self/comm").write_bytes(before)
