"""A guest: boots in seconds, runs one Python program, and talks with the test.

Knows: a guest's life, its program's channel, what to say when it fails.
Does not know: QEMU's options (machine.py), or the ivshmem device: tests give that in `args`.

    with Guest("print('hello', input())") as guest:
        guest.send("world")
        guest.expect("hello world")
        assert guest.wait() == 0

The guest has the host's files, whole and read-only below a tmpfs: the program may write anywhere
and the host sees nothing of it. A file that the host changes after the guest has read it may look
old there. A migratable guest carries its files instead, as they were at its start:

    with Guest(program, migratable=True) as source, source.twin() as destination:
        source.migrate(destination)
        destination.expect("still here")
"""

import json
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from . import image
from .machine import Machine, write_orders
from .process import spawn
from .qmp import Qmp
from .wire import Deadline, Wire

_T = TypeVar("_T")

# A boot takes six seconds of a processor, and several times that where the machine is busy.
BOOT_TIMEOUT = 60.0
TIMEOUT = 20.0
TAIL = 25  # lines of each log in a failure message


class GuestError(AssertionError):
    """The guest did not do what the test waited for. The message ends with its logs' last lines."""


class Guest:
    """A virtual machine that runs `program`. Owns QEMU, its sockets and `folder`, with its logs.

    `lines` is all that the program wrote; `boot_seconds`, once a line was read, how long it took to
    start the program.

    Args:
        program: source text (its indentation is removed), or the path of a file.
        args: more arguments for QEMU, last on the line: its devices, another -machine.
        argv: what the program finds in sys.argv[1:].
        name: how failure messages call this guest.
        memory, cpus: as QEMU's -m and -smp.
        iommu: with a virtual IOMMU, and the vfio modules loaded.
        env: the program's environment, on top of a small one of our own; tests/vm/inside precedes
            its PYTHONPATH.
        kernel_args: more kernel parameters.
        modules: more sets of modules to load (image.MODULES); after "vfio", if that is one.
        python: the host's interpreter to run; one in a virtual environment sees its packages.
        pass_fds: fds that QEMU inherits under the same numbers. They stay the caller's.
        migratable: carries its files. `python` must not be given then: it is this one's.
        incoming: with this for QEMU's -incoming it waits for another guest to come; see twin().
        boot: another kernel than Debian's.
    """

    def __init__(
        self,
        program: str | Path,
        *,
        args: Sequence[str] = (),
        argv: Sequence[str] = (),
        name: str = "guest",
        memory: str = "256M",
        cpus: int = 1,
        iommu: bool = False,
        env: Mapping[str, str] | None = None,
        kernel_args: Sequence[str] = (),
        modules: Sequence[str] = (),
        python: str = sys.executable,
        pass_fds: Sequence[int] = (),
        migratable: bool = False,
        incoming: str | None = None,
        boot: image.Image | None = None,
    ) -> None:
        if migratable and python != sys.executable:
            raise ValueError("a migratable guest has the Python that runs the tests")
        self.name = name
        self.lines: list[str] = []
        self.boot_seconds: float | None = None
        self._program, self._argv, self._python, self._env = program, argv, python, env or {}
        self._machine = Machine(
            args, memory, cpus, iommu, kernel_args, modules, migratable, incoming, boot
        )
        self._pass_fds = pass_fds
        self._exit = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Guest":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and not isinstance(error, GuestError):
                print(self.report(), file=sys.stderr)
        finally:
            self.close()

    def start(self) -> "Guest":
        """Starts QEMU and returns at once; expect() waits for the program.

        If that fails, nothing is left behind.
        """
        with ExitStack() as undo:
            self.folder = Path(
                undo.enter_context(tempfile.TemporaryDirectory(prefix="ivshmem-vm-"))
            )
            if not self._machine.migratable:
                write_orders(self.folder, self._python, self._program_file(), self._argv, self._env)
            (self.folder / "qemu").touch()
            program, far_program = socket.socketpair()
            monitor, far_monitor = socket.socketpair()
            with far_program, far_monitor:
                self._wire = Wire(program)
                self._monitor = Qmp(Wire(monitor))
                undo.callback(self._wire.close)
                undo.callback(self._monitor.close)
                fds = (far_program.fileno(), far_monitor.fileno())
                command = self._machine.command(self.folder, *fds)
                with (self.folder / "qemu").open("wb") as output:
                    self._started = time.monotonic()
                    self._process = spawn(command, (*fds, *self._pass_fds), output)
            undo.callback(self.kill)
            self._exit = undo.pop_all()
        if self._machine.incoming is not None:
            self.boot_seconds = 0.0  # what comes was started elsewhere: no hello
        elif self._machine.migratable:
            self.send(self._orders())
        return self

    def twin(self, *, args: Sequence[str] = (), incoming: str = "defer", **kwargs: Any) -> "Guest":
        """Another QEMU for a migratable guest to come to: the same machine with other devices.

        What the guest's program says after the migration is read here.
        """
        machine = self._machine
        same: dict[str, Any] = {
            "name": f"{self.name}-destination",
            "memory": machine.memory,
            "cpus": machine.cpus,
            "iommu": machine.iommu,
            "kernel_args": machine.kernel_args,
            "modules": machine.modules,
        }
        return Guest("", args=args, migratable=True, incoming=incoming, **{**same, **kwargs})

    def migrate(self, to: "Guest", uri: str | None = None, timeout: float = BOOT_TIMEOUT) -> None:
        """The guest goes on there, and this QEMU stays, paused (state "postmigrate").

        Args:
            uri: where to meet; in the destination's folder if None. With "defer" it is told.

        Raises:
            QmpError: one of the two refused.
            GuestError: not completed in that time, or failed; the message says why.
        """
        uri = uri or f"unix:{to.folder}/migration"
        # Without events nothing tells the end; without a return path a source calls it completed
        # though the destination has refused the devices' state.
        wanted = [{"capability": name, "state": True} for name in ("events", "return-path")]
        for end in (to, self):
            end.qmp("migrate-set-capabilities", capabilities=wanted)
        if to._machine.incoming == "defer":
            to.qmp("migrate-incoming", uri=uri)
        self.qmp("migrate", uri=uri)
        deadline = Deadline(timeout)
        if (status := self._migration_ended(deadline)) != "completed":
            reason = self.qmp("query-migrate").get("error-desc", "QEMU does not say why")
            raise self._error(f"its migration {status}: {reason}\n{to.report()}")
        to._migration_ended(deadline)
        # No event tells of this, which comes a moment after the migration's end.
        while (status := self.qmp("query-status")["status"]) != "postmigrate":
            if deadline.left() == 0.0:
                raise self._error(f"after its migration it stays in state {status!r}")

    def _migration_ended(self, deadline: Deadline) -> str:
        while True:
            status: str = self.qmp_event("MIGRATION", deadline.left())["status"]
            if status in ("completed", "failed", "cancelled"):
                return status

    @property
    def qmp_path(self) -> Path:
        """The socket of a second monitor, for tools; qmp() has its own."""
        return self.folder / "qmp"

    def close(self) -> None:
        """Kills QEMU if it runs and frees everything. The second time does nothing."""
        self._exit.close()

    @property
    def pid(self) -> int:
        """QEMU's."""
        return self._running.pid

    def readline(self, timeout: float | None = TIMEOUT) -> str:
        """The program's next line of output.

        Raises:
            GuestError: no line in that time, or the guest has ended.
        """
        return self._read("a line", Deadline(timeout))

    def expect(self, start: str, timeout: float | None = BOOT_TIMEOUT) -> str:
        """Reads lines until one starts with `start`, and returns that one.

        Raises:
            GuestError: none came in that time, or the guest has ended.
        """
        deadline = Deadline(timeout)
        while not (line := self._read(f"a line that starts with {start!r}", deadline)).startswith(
            start
        ):
            pass
        return line

    def send(self, line: str, timeout: float | None = TIMEOUT) -> None:
        """A line for the program's stdin; before it has started, too."""
        self._guarded(f"reading {line!r}", lambda: self._wire.send(line, Deadline(timeout)))

    def wait(self, timeout: float | None = BOOT_TIMEOUT) -> int:
        """The program's exit status, as a shell has it, once it and the guest have ended.

        Raises:
            GuestError: it runs on after that time, or the guest ended without the program's doing.
        """
        deadline = Deadline(timeout)
        try:
            while True:
                self._next_line(deadline)
        except EOFError:
            pass
        except TimeoutError:
            raise self._error("its program has not ended") from None
        self._guarded("the end of QEMU", lambda: self._running.wait(TIMEOUT))
        if (status := self._status()) is None:
            raise self._error("it ended and left no exit status of its program")
        return status

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        """A monitor command's result. Arguments with a dash: `**{"node-name": ..}`.

        A reset ends the guest, unless `qmp("set-action", reboot="reset")` came before.

        Raises:
            QmpError: QEMU refused the command.
            GuestError: no answer, or QEMU is gone.
        """
        return self._guarded(
            f"QMP {command}", lambda: self._monitor.execute(command, arguments, Deadline(TIMEOUT))
        )

    def qmp_event(self, name: str, timeout: float | None = TIMEOUT, **data: Any) -> dict[str, Any]:
        """Takes the first such event, past or to come, with these `data`; returns all its data.

        Raises:
            GuestError: none came in that time, or QEMU is gone.
        """
        return self._guarded(
            f"event {name}", lambda: self._monitor.event(name, data, Deadline(timeout))
        )

    def quit(self) -> None:
        """Ends QEMU the orderly way, its devices closed one by one; the program does not notice."""
        self.qmp("quit")
        self._guarded("the end of QEMU", lambda: self._running.wait(TIMEOUT))

    def kill(self) -> None:
        """Ends QEMU at once, if it runs, as a crash of the host's process would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def crashed(self) -> int | None:
        """The signal that has ended QEMU; None if it runs, or ended by itself."""
        status = self._running.poll()
        return -status if status is not None and status < 0 else None

    def report(self) -> str:
        """The last lines of all that the guest said, for a person to read."""
        said = {log: self._log(log) for log in ("stderr", "console", "qemu")}
        boot = (
            "never came up"
            if self.boot_seconds is None
            else f"came up in {self.boot_seconds:.1f} s"
        )
        parts = [f"guest {self.name!r} {boot}"]
        for source, text in {"stdout": "\n".join(self.lines), **said}.items():
            tail = text.strip().splitlines()[-TAIL:] or ["(nothing)"]
            parts += [f"--- {self.name}: {source} ---", *tail]
        return "\n".join(parts)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"guest {self.name!r} was not started")
        return self._process

    def _program_file(self) -> Path:
        if isinstance(self._program, Path):
            return self._program.resolve()
        path = self.folder / "program.py"
        path.write_text(textwrap.dedent(self._program))
        return path

    def _orders(self) -> str:
        """What inside/begin.py reads first."""
        text = self._program_file().read_text()
        return json.dumps({"program": text, "argv": [*self._argv], "env": {**self._env}})

    def _next_line(self, deadline: Deadline) -> str:
        if self.boot_seconds is None:
            self._wire.readline(deadline)  # the hello of inside/init
            self.boot_seconds = time.monotonic() - self._started
        line = self._wire.readline(deadline)
        self.lines.append(line)
        return line

    def _read(self, what: str, deadline: Deadline) -> str:
        return self._guarded(what, lambda: self._next_line(deadline))

    def _guarded(self, what: str, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except (TimeoutError, subprocess.TimeoutExpired):
            raise self._error(f"timed out waiting for {what}") from None
        except EOFError:
            self._running.wait(TIMEOUT)  # its sockets are closed: it ends now
            status = self._status()
            reason = "" if status is None else f": its program ended with status {status}"
            raise self._error(f"the guest ended{reason}; the test waited for {what}") from None

    def _error(self, what: str) -> GuestError:
        return GuestError(f"guest {self.name!r}: {what}\n{self.report()}")

    def _status(self) -> int | None:
        text = self._log("status").strip()
        return int(text) if text else None

    def _log(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""


# The `guest` fixture: takes what Guest takes, returns it started.
MakeGuest = Callable[..., Guest]
