"""The server's place in the file system: stale sockets are replaced, live ones never.

Two servers that start at once do not harm each other; what is no socket is kept; closing removes
only what is one's own; errors say what, why and what to do.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.children import NOBODY, python
from support.leaks import open_fds
from support.peer import RawPeer
from support.waiting import PATIENCE, in_child, until

import ivshmem
from ivshmem import Server
from ivshmem.sockets import Listener, check_path, credentials, is_live

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")

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
    assert "exists and is no socket: remove it, or choose another path" in str(error)
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
                assert credentials(sock) == (child.pid, os.getuid(), os.getgid(), name)
                child.kill()
                assert credentials(sock) == (child.pid, os.getuid(), os.getgid(), "?")


def _accept(listener: Listener) -> socket.socket | None:
    try:
        return listener.socket.accept()[0]
    except BlockingIOError:
        return None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"qemu-system-x86", "qemu-system-x86"),
        (b"a\x1b[31mb", "a?[31mb"),
        (b"\xff\xfe", "\ufffd\ufffd"),
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
