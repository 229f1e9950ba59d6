"""The harness: talking with a guest, its failures, its life and its end."""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from .harness import Guest, GuestError, MakeGuest
from .qmp import QmpError


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def gone(pid: int, timeout: float) -> bool:
    """Whether the process ends in that time; it may be another's child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)


class TestProgram:
    @pytest.mark.nightly  # each test that boots a guest talks with it and looks at its status
    def test_talks_and_leaves_its_status(self, guest: MakeGuest) -> None:
        a = guest(
            """
            import sys
            print("hello,", input(), sys.argv[1])
            print("bye")
            sys.exit(7)
            """,
            argv=["it's me"],
        )
        a.send("world")
        assert a.expect("hello") == "hello, world it's me"
        assert a.wait() == 7
        assert a.lines == ["hello, world it's me", "bye"]
        assert gone(a.pid, 0)

    @pytest.mark.nightly
    def test_has_our_python_and_environment(self, guest: MakeGuest, tmp_path: Path) -> None:
        (tmp_path / "ours.py").write_text("answer = 42")
        program = tmp_path / "program.py"
        program.write_text(
            "import os, sys, ours; print(ours.answer, sys.prefix, os.environ['COLOUR'])"
        )
        a = guest(program, env={"PYTHONPATH": str(tmp_path), "COLOUR": "blue"})
        assert a.expect("42") == f"42 {sys.prefix} blue"
        assert a.wait() == 0

    @pytest.mark.nightly
    def test_writes_stay_in_the_guest(self, guest: MakeGuest, tmp_path: Path) -> None:
        a = guest(
            f"""
            import pathlib
            for folder in ({str(tmp_path)!r}, "/dev/shm", "/root"):
                path = pathlib.Path(folder, "ivshmem-written-in-a-guest")
                path.write_text("x")
                print(path.read_text())
            """
        )
        assert a.wait() == 0
        assert a.lines == ["x", "x", "x"]
        assert not list(tmp_path.iterdir())
        assert not Path("/dev/shm/ivshmem-written-in-a-guest").exists()

    @pytest.mark.nightly
    def test_moves_much_without_loss(self, guest: MakeGuest) -> None:
        a = guest("for line in range(20_000): print(line, 'x' * 50)\ninput()\nprint('done')")
        a.send("go")
        a.expect("done")
        assert [line.split()[0] for line in a.lines[:-1]] == [
            str(number) for number in range(20_000)
        ]

    @pytest.mark.nightly
    def test_traceback_is_in_the_failure(self, guest: MakeGuest) -> None:
        a = guest("print('before')\nraise LookupError('the dog ate it')")
        with pytest.raises(GuestError) as failure:
            a.expect("READY")
        assert "waited for a line that starts with 'READY'" in str(failure.value)
        assert "its program ended with status 1" in str(failure.value)
        assert "LookupError: the dog ate it" in str(failure.value)
        assert "before" in str(failure.value)
        assert a.wait() == 1

    @pytest.mark.nightly
    def test_killed_by_a_signal(self, guest: MakeGuest) -> None:
        assert guest("import os; os.kill(os.getpid(), 15)").wait() == 128 + signal.SIGTERM

    @pytest.mark.nightly
    def test_silence_times_out_with_the_console(self, guest: MakeGuest) -> None:
        a = guest(
            """
            import termios
            with open("/dev/console", "w") as console:
                console.write("famous last words\\n")
                console.flush()
                termios.tcdrain(console)
            print("up")
            input()
            """
        )
        a.expect("up")
        with pytest.raises(GuestError, match=r"timed out .* 'READY'(.|\n)*famous last words"):
            a.expect("READY", timeout=0.01)
        with pytest.raises(GuestError, match="its program has not ended"):
            a.wait(timeout=0.01)


class TestLife:
    @pytest.mark.nightly
    def test_two_at_once(self, guest: MakeGuest) -> None:
        a, b = guest("print('A')", name="a"), guest("print('B')", name="b")
        assert (b.expect("B"), a.expect("A")) == ("B", "A")
        assert (a.wait(), b.wait()) == (0, 0)

    def test_leaves_nothing_behind(self) -> None:
        before = open_fds()
        a = Guest("input()")

        def interrupted() -> None:
            with a:
                assert a.folder.is_dir()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert gone(a.pid, 0)
        assert not a.folder.exists()
        assert open_fds() == before
        a.close()

    def test_wrong_arguments_are_in_the_failure(self) -> None:
        with (
            Guest("", args=["-device", "no-such-device"]) as a,
            pytest.raises(GuestError) as failure,
        ):
            a.expect("READY")
        assert "'no-such-device' is not a valid device model name" in str(failure.value)
        assert "never came up" in str(failure.value)

    @pytest.mark.nightly
    def test_dies_with_the_test_run(self) -> None:
        program = """if True:
            import sys
            from vm.harness import Guest
            with Guest("input()") as a:
                print(a.pid, a.folder, flush=True)
                sys.stdin.read()
            """
        run = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        with run:
            assert run.stdout is not None
            pid, folder = run.stdout.readline().split()
            run.kill()
            assert gone(int(pid), 10)
        shutil.rmtree(folder)  # killed like this, the run could not do it

    @pytest.mark.nightly
    def test_outlives_the_thread_that_started_it(self, guest: MakeGuest) -> None:
        guests: list[Guest] = []
        thread = threading.Thread(target=lambda: guests.append(guest("print(input())")))
        thread.start()
        thread.join()
        guests[0].send("still here")
        guests[0].expect("still here")
        assert guests[0].wait() == 0

    @pytest.mark.nightly
    def test_qmp(self, guest: MakeGuest) -> None:
        a = guest("input()")
        assert a.qmp("query-status")["status"] == "running"
        with pytest.raises(QmpError, match="Device 'nobody' not found") as refusal:
            a.qmp("device_del", id="nobody")
        assert refusal.value.kind == "DeviceNotFound"
        a.qmp("stop")
        assert a.qmp_event("STOP") == {}
        with pytest.raises(GuestError, match="timed out waiting for event RESUME"):
            a.qmp_event("RESUME", timeout=0.01)
        a.quit()
        with pytest.raises(GuestError, match="the guest ended"):
            a.expect("READY")
