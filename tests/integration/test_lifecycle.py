"""Servers and clients that are stopped, closed, forgotten and looked at in unusual ways."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivshmem
from ivshmem import PeerJoined, PeerLeft, Region, RegionError, Server

PATIENCE = 30.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


def readable(thing: ivshmem.Client | Server) -> bool:
    return bool(select.select([thing], [], [], 0)[0])


class TestFileno:
    def test_readable_as_long_as_events_has_any(self, path: str) -> None:
        """Also when the news were taken in by something else than events()."""
        with Server(path).start(), ivshmem.connect(path) as a:
            with ivshmem.connect(path) as b:
                b.ring(a.id)  # b is told of a, so a was told of b
                assert a.peers == [b.id]
                assert a.wait(0, PATIENCE) == 1
                assert readable(a)
                assert list(a.events(timeout=0)) == [PeerJoined(b.id)]
                assert not readable(a)
            assert a.next_event(PATIENCE) == PeerLeft(1)
            assert not readable(a)

    def test_who_came_and_went_leaves_nothing_to_read(self, path: str) -> None:
        with Server(path).start(), ivshmem.connect(path) as a:
            with ivshmem.connect(path) as b:
                assert a.peers == [b.id]
            assert select.select([a], [], [], PATIENCE)[0]
            while a.peers:
                pass
            assert not readable(a)
            assert list(a.events(timeout=0)) == []


class TestServer:
    def test_stopped_and_started_again(self, path: str) -> None:
        with Server(path) as server:
            server.stop()
            server.serve_forever()  # returns at once, and has then forgotten
            server.step(0)
            assert not readable(server)
            runner = threading.Thread(target=server.serve_forever)
            runner.start()
            with ivshmem.connect(path, timeout=PATIENCE):
                pass
            server.stop()
            runner.join(PATIENCE)
            assert not runner.is_alive()

    @pytest.mark.parametrize("closers", [1, 4])
    def test_closed_by_others_while_it_serves(self, path: str, closers: int) -> None:
        server = Server(path)
        runner = threading.Thread(target=server.serve_forever)
        runner.start()
        with ivshmem.connect(path, timeout=PATIENCE) as client:
            threads = [threading.Thread(target=server.close) for _ in range(closers)]
            for thread in threads:
                thread.start()
            for thread in (*threads, runner):
                thread.join(PATIENCE)
                assert not thread.is_alive()
            assert isinstance(client.next_event(PATIENCE), ivshmem.Disconnected)
        assert not os.path.exists(path)

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    def test_a_thread_that_dies_closes_the_server(
        self, path: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_peer: ivshmem.Peer) -> None:
            raise error

        server = Server(path, on_join=fail).start()
        # Its set-up came first, but the end may come before it has looked.
        with contextlib.suppress(ivshmem.ServerGone):
            with ivshmem.connect(path, timeout=PATIENCE) as client:
                assert isinstance(client.next_event(PATIENCE), ivshmem.Disconnected)
        server.close()
        assert isinstance(server.error, error)
        assert not os.path.exists(path)
        assert "failed, and closes" in caplog.text

    def test_forgotten_at_the_end_of_the_program(self, path: str) -> None:
        code = "import sys, ivshmem; ivshmem.Server(sys.argv[1]).start(); print('READY')"
        result = subprocess.run(
            [sys.executable, "-W", "default", "-c", code, path],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        assert result.stdout == "READY\n"
        assert "ResourceWarning: unclosed <ivshmem.Server" in result.stderr
        assert not os.path.exists(path)

    def test_memory_of_a_wrong_size_is_refused(self, path: str) -> None:
        fd = os.memfd_create("odd")
        os.ftruncate(fd, 3 << 20)
        with Region.from_fd(fd) as region, pytest.raises(RegionError, match="power of two"):
            Server(path, region)
        assert not os.path.exists(path)

    @pytest.mark.parametrize("vectors", [1.0, "1", None])
    def test_vectors_are_a_whole_number(self, path: str, vectors: object) -> None:
        with pytest.raises(TypeError):
            Server(path, vectors=vectors)  # type: ignore[arg-type]


class TestSignalHandlers:
    """A handler may use what it interrupts, and does not wait for it."""

    @pytest.fixture
    def often(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGALRM)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    @pytest.mark.usefixtures("often")
    def test_events_in_a_handler_that_interrupted_events(self, path: str) -> None:
        calls = 0

        with Server(path).start(), ivshmem.connect(path) as client:

            def look(*_: object) -> None:
                nonlocal calls
                calls += 1
                list(client.events(timeout=0))

            signal.signal(signal.SIGALRM, look)
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            for _ in range(100):
                with ivshmem.connect(path, timeout=PATIENCE) as other:
                    assert other.peers == [client.id]
                client.next_event(0)
            while calls < 50:
                client.next_event(0.01)
            signal.setitimer(signal.ITIMER_REAL, 0)

    @pytest.mark.usefixtures("often")
    def test_a_handler_that_closes_the_server(self, path: str) -> None:
        server = Server(path)
        signal.signal(signal.SIGALRM, lambda *_: server.close())
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        server.serve_forever()
        assert not os.path.exists(path)


class TestPublishing:
    """A name or path appears when the memory behind it is whole."""

    def test_a_failed_replacement_leaves_the_old_one(self, tmp_path: Path) -> None:
        if os.getuid() != 0:
            pytest.skip("only root can mount a small tmpfs")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", str(tmp_path)], check=True)
        try:
            with Region.create("1M", path=tmp_path / "memory") as region:
                memoryview(region)[:3] = b"old"
                with pytest.raises(OSError, match="8M are needed"):
                    Region.create("8M", path=tmp_path / "memory", replace=True)
                with Region.attach(path=tmp_path / "memory", size="1M") as same:
                    assert bytes(memoryview(same)[:3]) == b"old"
            assert os.listdir(tmp_path) == ["memory"]
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    @pytest.mark.parametrize("kind", ["fifo", "directory", "link"])
    def test_what_is_no_file_is_not_replaced(self, tmp_path: Path, kind: str) -> None:
        target = tmp_path / "thing"
        if kind == "fifo":
            os.mkfifo(target)
        elif kind == "directory":
            target.mkdir()
        else:
            target.symlink_to("nowhere")
        with pytest.raises(FileExistsError, match=r"not a regular file|leads to nothing"):
            Region.create("4K", path=target, replace=True)
        assert os.listdir(tmp_path) == ["thing"]

    def test_many_openers_at_once_share_one(self, tmp_path: Path) -> None:
        """None of them sees a file that has no size or no space yet."""
        start = threading.Barrier(8)
        inodes: list[int] = []
        errors: list[BaseException] = []

        def open_it(number: int) -> None:
            try:
                start.wait(PATIENCE)
                region = Region.open("64K", path=tmp_path / f"memory{number}")
                with region:
                    inodes.append(os.fstat(region.fileno()).st_ino)
            except BaseException as error:
                errors.append(error)

        for number in range(50):
            inodes.clear()
            threads = [threading.Thread(target=open_it, args=(number,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            assert errors == []
            assert len(set(inodes)) == 1
            assert len(inodes) == 8
