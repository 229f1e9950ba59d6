"""Where a server listens, and where commands look for it, if nobody names a path.

Real processes of several users, in a mount namespace of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from support.isolated import NOBODY, OTHER, environment, isolated, needs_root, run, squatting, start
from support.waiting import until

from ivshmem.system import sockets

pytestmark = needs_root

EXAMPLE = Path("/tmp/ivshmem_socket")
OWN = Path(f"/tmp/ivshmem-{NOBODY}")
OF_ROOT = Path("/run/ivshmem.sock")


@contextlib.contextmanager
def serving(*options: str, user: int = 0, at: Path, **more: str) -> Iterator[None]:
    """`ivshmem serve` while the block runs; it is to listen at `at`."""
    process = start("serve", "-q", "-l", "64K", *options, user=user, **more)
    try:
        assert process.stdout is not None
        while line := process.stdout.readline():
            if str(at) in line:
                break
        else:
            raise AssertionError(process.communicate()[1])
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        _out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err


def directory(path: Path, user: int, mode: int = 0o700) -> Path:
    path.mkdir()
    path.chmod(mode)
    os.chown(path, user, user)
    return path


def link(target: Path, path: str) -> str:
    Path(path).symlink_to(target)
    return path


def nightly(*values: object) -> ParameterSet:
    """A variation that the night is enough for: each starts processes of its own."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def all_commands_find_it() -> None:
    """Each command that needs a server, without -S."""
    for words in (
        ["status"],
        ["connect", "-c", "dump"],
        ["qemu"],
        ["save", "--quiet", "/tmp/image"],
        ["evict", "7"],
        ["reload"],
        ["doctor", "--host", "--qemu", "true"],
        ["bench", "--peer", "7", "--timeout", "0.1"],
    ):
        status, out, err = run(*words)
        said = out + err
        assert "no server was found" not in said, (words, said)
        if words[0] == "evict":
            assert "peer 7" in said, (words, said)
        elif words[0] == "reload":
            assert "there is no configuration" in said, (words, said)
        elif words[0] == "doctor":
            assert "a process listens there" in said, (words, said)
        elif words[0] == "bench":
            assert "7" in said, (words, said)
        else:
            assert status == 0, (words, said)


class TestWhereAServerListens:
    @pytest.mark.nightly
    def test_root(self) -> None:
        def body() -> None:
            with serving(at=OF_ROOT):
                all_commands_find_it()
            assert list(OF_ROOT.parent.glob("ivshmem*")) == []

        isolated(body)

    def test_a_user_with_a_runtime_directory(self) -> None:
        def body() -> None:
            place = directory(Path("/run/user"), NOBODY)
            with serving(user=NOBODY, at=place / "ivshmem.sock", XDG_RUNTIME_DIR=str(place)):
                assert run("status", user=NOBODY, XDG_RUNTIME_DIR=str(place))[0] == 0

        isolated(body)

    @pytest.mark.parametrize("mask", [nightly(0o022), 0, nightly(0o777)])
    def test_a_user_without(self, mask: int) -> None:
        def body() -> None:
            os.umask(mask)
            with serving("--mode", "0600", user=NOBODY, at=OWN / "ivshmem.sock"):
                status = OWN.lstat()
                assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (NOBODY, 0o700)
                assert run("status", user=NOBODY)[0] == 0

        isolated(body)

    @pytest.mark.parametrize(
        "make",
        [
            nightly(lambda: "relative"),
            nightly(lambda: "/run/missing"),
            nightly(lambda: "/run/" + "x" * 90),
            lambda: str(directory(Path("/run/other"), OTHER, 0o755)),
            nightly(lambda: str(directory(Path("/run/open"), NOBODY, 0o777))),
            nightly(lambda: str(directory(Path("/run/group"), NOBODY, 0o770))),
            lambda: link(directory(Path("/run/mine"), NOBODY), "/run/link"),
            nightly(lambda: f"{__file__}"),
            lambda: str(directory(Path("/run/ours"), 0, 0o755)),  # safe, but not writable
        ],
    )
    def test_a_runtime_directory_that_will_not_do(self, make: Callable[[], str]) -> None:
        def body() -> None:
            place = make()
            with serving(user=NOBODY, at=OWN / "ivshmem.sock", XDG_RUNTIME_DIR=place):
                status, _out, err = run("status", user=NOBODY, XDG_RUNTIME_DIR=place)
                assert (status, err) == (0, ""), err

        isolated(body)

    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: directory(OWN, OTHER, 0o777), f"belongs to uid {OTHER}"),
            nightly(lambda: directory(OWN, 0, 0o777), "belongs to root (uid 0)"),
            nightly(lambda: OWN.write_text(""), "is not a directory"),
            (
                lambda: OWN.symlink_to(directory(Path("/tmp/mine"), NOBODY)),
                "is a symbolic link",
            ),
        ],
    )
    def test_somebody_was_there_first(self, make: Callable[[], object], told: str) -> None:
        def body() -> None:
            make()
            before = OWN.lstat()
            status, out, err = run("serve", user=NOBODY)
            assert status == 1
            assert out == ""
            assert told in err
            assert err.count("\n") == 1
            assert "give -S PATH, or set XDG_RUNTIME_DIR to a directory of yours" in err
            assert OWN.lstat() == before
            # Both remedies, as they are printed.
            mine = directory(Path("/run/mine"), NOBODY)
            with serving("-S", "/run/mine/s", user=NOBODY, at=mine / "s"):
                pass
            with serving(user=NOBODY, at=mine / "ivshmem.sock", XDG_RUNTIME_DIR=str(mine)):
                pass

        isolated(body)

    def test_others_may_write_to_our_directory(self) -> None:
        def body() -> None:
            directory(OWN, NOBODY, 0o777)
            status, _, err = run("serve", user=NOBODY)
            assert status == 1
            assert "others may write to it: a server's socket is not safe" in err
            remedy = err.rstrip().rsplit(": ", 1)[1]
            assert remedy == f"chmod 700 {OWN}"
            subprocess.run(remedy.split(), user=NOBODY, check=True)
            with serving(user=NOBODY, at=OWN / "ivshmem.sock"):
                pass

        isolated(body)

    def test_tmp_is_not_sticky(self) -> None:
        def body() -> None:
            os.chmod("/tmp", 0o777)  # noqa: S103
            status, _, err = run("serve", user=NOBODY)
            assert status == 1
            assert "others may rename it" in err

        isolated(body)


class TestWhereCommandsLook:
    def test_no_server(self) -> None:
        """The places that were looked at are listed, by every command."""

        def body() -> None:
            four = ["status"], ["connect", "-c", "dump"], ["qemu"], ["reload"]
            for user, places, commands in (
                (0, [OF_ROOT, Path("/tmp/ivshmem-0/ivshmem.sock"), EXAMPLE], four),
                (NOBODY, [OWN / "ivshmem.sock", OF_ROOT, EXAMPLE], four[:1]),
            ):
                for words in commands:
                    status, out, err = run(*words, user=user)
                    assert status == 1
                    assert out == ""
                    assert err.count("\n") == 1
                    listed = ", ".join(f"{place} (not there)" for place in places)
                    assert err == (
                        f"ivshmem: no server was found; looked at {listed}: start one"
                        " (ivshmem serve), or give -S PATH\n"
                    )
            assert os.listdir("/tmp") == []

        isolated(body)

    def test_a_user_finds_the_server_of_root(self) -> None:
        def body() -> None:
            with serving("--mode", "0666", at=OF_ROOT):
                assert run("connect", "-c", "dump", user=NOBODY)[0] == 0
                # The nearer one comes first.
                with serving(user=NOBODY, at=OWN / "ivshmem.sock"):
                    assert str(OWN) in run("qemu", user=NOBODY)[1]

        isolated(body)

    def test_a_live_server_comes_before_a_stale_socket(self) -> None:
        def body() -> None:
            directory(OWN, NOBODY)
            with socket.socket(socket.AF_UNIX) as left_behind:
                left_behind.bind(str(OWN / "ivshmem.sock"))
            os.chown(OWN / "ivshmem.sock", NOBODY, NOBODY)
            assert "ivshmem.sock (stale: nobody listens)" in run("status", user=NOBODY)[2]
            with serving("--mode", "0666", at=OF_ROOT):
                assert str(OF_ROOT) in run("qemu", user=NOBODY)[1]

        isolated(body)

    @pytest.mark.parametrize("user", [0, OTHER])
    def test_a_stranger_at_the_place_of_the_example(self, user: int) -> None:
        def body() -> None:
            with squatting(EXAMPLE, NOBODY):
                for words in (["status"], ["connect", "-c", "dump"]):
                    status, _, err = run(*words, user=user)
                    assert status == 1
                    assert f"{EXAMPLE} (belongs to nobody (uid {NOBODY}): -S" in err
                # What the message says one can do does what it says.
                assert f"-S {EXAMPLE} uses it nevertheless" in err
                _, _, err = run("qemu", "-S", str(EXAMPLE), "--vectors", "1", user=user)
                assert err == ""

        isolated(body)

    def test_the_place_of_the_example(self) -> None:
        """`ivshmem-server` of this user, or of root, is found there."""

        def body() -> None:
            command = "from ivshmem.cli.compat import main; main(['-F', '-l', '64K'])"
            for server, asker in ((NOBODY, NOBODY), (0, NOBODY)):
                os.umask(0)
                with subprocess.Popen(
                    [sys.executable, "-c", command], user=server, env=environment()
                ) as process:
                    until(lambda: sockets.is_live(str(EXAMPLE)))
                    assert str(EXAMPLE) in run("qemu", user=asker)[1]
                    process.terminate()

        isolated(body)
