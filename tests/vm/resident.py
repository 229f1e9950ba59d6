"""A guest that stays up and runs one program after the other: a boot takes six seconds.

Knows: how inside/begin.py is given a program, and the line with which it tells that one's end.
Does not know: the guest's devices, or what the programs do.
Invariant: one program at a time; after one that failed, the guest is given no other.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import BOOT_TIMEOUT, TIMEOUT, Guest, GuestError
from .wire import Deadline

# What such a guest is started with.
STAYS: dict[str, Any] = {
    "program": Path(__file__).parent / "inside" / "begin.py",
    "argv": ["stay"],
}
ENDED = "resident: ended with status "


class Run:
    """A program that a resident guest runs. What it offers is as of `Guest`."""

    def __init__(self, guest: Guest, program: str, argv: Sequence[str]) -> None:
        self._guest = guest
        self.status: int | None = None
        guest.send(json.dumps({"program": textwrap.dedent(program), "argv": argv, "env": {}}))

    def send(self, line: str) -> None:
        self._guest.send(line)

    def readline(self, timeout: float | None = TIMEOUT) -> str:
        """The program's next line of output.

        Raises:
            GuestError: no line came in that time, or the program has ended.
        """
        line = self._guest.readline(timeout)
        if line.startswith(ENDED):
            self.status = int(line.removeprefix(ENDED))
            raise GuestError(f"its program ended with status {self.status}\n{self.report()}")
        return line

    def expect(self, start: str, timeout: float | None = BOOT_TIMEOUT) -> str:
        """Reads lines until one starts with `start`, and returns that one.

        Raises:
            GuestError: none came in that time, or the program has ended.
        """
        deadline = Deadline(timeout)
        while not (line := self.readline(deadline.left())).startswith(start):
            pass
        return line

    def wait(self, timeout: float | None = BOOT_TIMEOUT) -> int:
        """The program's exit status; negative if a signal ended it.

        Raises:
            GuestError: the program runs on after that time.
        """
        deadline = Deadline(timeout)
        while self.status is None:
            try:
                self.readline(deadline.left())
            except GuestError:
                if self.status is None:
                    raise
        return self.status

    def report(self) -> str:
        return self._guest.report()


class Resident:
    """A guest that was started with `STAYS`. It stays the caller's."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._last: Run | None = None
        guest.expect("resident: ready")

    @property
    def pid(self) -> int:
        """QEMU's."""
        return self._guest.pid

    def run(self, program: str, *argv: object) -> Run:
        """Starts a program, with these as sys.argv[1:].

        Raises:
            GuestError: the last one failed, or has not ended: another test has left it so.
        """
        if self._last is not None and self._last.status != 0:
            raise GuestError(f"an earlier test failed in this guest\n{self._last.report()}")
        self._last = Run(self._guest, program, [str(each) for each in argv])
        return self._last
