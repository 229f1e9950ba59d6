"""Who may offer a service, and who may ask for one: real processes of several users."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from support import impostor as module_of_the_impostor
from support.isolated import (
    NOBODY,
    OTHER,
    environment,
    isolated,
    needs_root,
    run,
    squatting,
    start,
)
from support.waiting import PATIENCE

pytestmark = needs_root

SOCKET = "/tmp/s"
IMPOSTOR = Path(module_of_the_impostor.__file__).read_text()


def test_an_impostor_has_no_file_of_roots_removed() -> None:
    """Another user bound the control path first, as anybody can in /tmp."""

    def body() -> None:
        secret = Path("/run/secret")
        secret.mkdir()
        victim = secret / "victim"
        victim.write_text("precious")
        victim.chmod(0o600)
        before = victim.lstat()
        with subprocess.Popen(
            [sys.executable, "-c", IMPOSTOR, SOCKET, "/tmp/d", str(victim)],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        ) as impostor:
            assert impostor.stdout is not None
            assert impostor.stdout.readline() == "ready\n"
            root = start("serve", "--takeover", "--mode", "0644", "-S", SOCKET)
            assert root.stdout is not None
            if root.stdout.readline():  # it was fooled: it serves
                root.send_signal(signal.SIGTERM)
            _, err = root.communicate(timeout=PATIENCE)
            impostor.kill()
        assert victim.exists(), "root removed its own file"
        assert victim.lstat() == before
        assert [path.name for path in secret.iterdir()] == ["victim"]
        assert root.returncode == 1
        assert err.count("\n") == 1
        assert "nobody (uid 65534)" in err

    isolated(body)


def test_root_does_not_take_over_from_a_user() -> None:
    """What the message says instead works: its user does it."""

    def body() -> None:
        first = start("serve", "-q", "-l", "64K", "-S", SOCKET, user=NOBODY)
        assert first.stdout is not None
        assert first.stdout.readline().startswith("serving")
        status, out, err = run("serve", "--takeover", "-S", SOCKET)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(
            f"ivshmem: nothing was taken over: nobody (uid {NOBODY}) offers it (pid {first.pid}),"
            " and this process trusts only root (uid 0): if that is your server, take over"
            " as its user"
        )
        assert run("status", "-S", SOCKET)[0] == 0, "it serves on"
        second = start("serve", "-q", "--takeover", "-S", SOCKET, user=NOBODY)
        assert second.stdout is not None
        assert second.stdout.readline().startswith("serving")
        assert first.wait(PATIENCE) == 0
        second.terminate()
        _, err = second.communicate(timeout=PATIENCE)
        assert second.returncode == 0, err
        for process in (first, second):
            process.communicate()

    isolated(body)


def test_a_control_path_that_is_taken() -> None:
    """Somebody else bound it first: a server does not start without one; the example's does."""

    def body() -> None:
        with squatting(Path(f"{SOCKET}.control"), NOBODY):
            status, out, err = run("serve", "-S", SOCKET)
            assert (status, out) == (1, "")
            assert err == (
                f"ivshmem: {SOCKET}.control: no control socket: another process listens here: stop"
                " it, or choose another path; give --control PATH, or --no-control\n"
            )
            assert not Path(SOCKET).exists()
            compat = "from ivshmem.cli.compat import main"
            server = start("-F", "-S", SOCKET, "-l", "64K", program=compat)
            assert server.stdout is not None
            assert server.stdout.readline().startswith("serving")
            server.terminate()
            _, err = server.communicate(timeout=PATIENCE)
            assert err.startswith(f"ivshmem: no control socket: {SOCKET}.control: another process")

    isolated(body)


def test_an_impostor_is_not_asked() -> None:
    """A user's commands do not believe another user; root's say whose server it is."""

    def body() -> None:
        lie = {"ok": True, "region": "db", "changes": []}
        with squatting(Path(f"{SOCKET}.control"), NOBODY, json.dumps(lie)):
            for words in (["status"], ["evict", "1"], ["reload"]):
                status, out, err = run(*words, "-S", SOCKET, user=OTHER)
                assert (status, out) == (1, "")
                assert err == (
                    f"ivshmem: {SOCKET}.control: nobody (uid {NOBODY}) answers here, not your"
                    " server: give the path of yours by -S or --control, or ask as nobody (uid"
                    f" {NOBODY}) or as root\n"
                )
            _, out, _ = run("evict", "1", "-S", SOCKET)
            whose = f"(according to the server of nobody (uid {NOBODY}))"
            assert out == f"peer 1 of region db was evicted {whose}\n"
            _, out, _ = run("reload", "-S", SOCKET)
            assert (
                out == f"nothing has changed (according to the server of nobody (uid {NOBODY}))\n"
            )

    isolated(body)
