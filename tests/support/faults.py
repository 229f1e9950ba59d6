"""Makes the system calls of a program fail; see faults.c."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from pathlib import Path

CALLS = (
    "accept4",
    "eventfd",
    "sendmmsg",
    "epoll_ctl",
    "epoll_wait",
    "setsockopt",
    "shutdown",
    "open",
)
_FAULT = struct.Struct("iiii")


class Faults:
    """The shim, compiled into `directory`, and the memory by which it is told what fails.

    Attributes:
        environment: for the program's.
    """

    def __init__(self, directory: Path) -> None:
        library = directory / "faults.so"
        source = Path(__file__).with_name("faults.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True
        )
        self._file = directory / "faults"
        self._file.write_bytes(bytes(_FAULT.size * len(CALLS)))
        # After what is preloaded already: a sanitizer's library has to come first.
        preloaded = os.environ.get("LD_PRELOAD", "").split()
        self.environment = {
            "LD_PRELOAD": " ".join([*preloaded, str(library)]),
            "FAULTS": str(self._file),
        }
        with self._file.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def arm(self, call: str, code: int, *, after: int = 0, times: int = 1) -> None:
        """Let `times` calls fail with this errno, when `after` others went well."""
        at = CALLS.index(call) * _FAULT.size
        # What makes it fail comes last.
        _FAULT.pack_into(self._memory, at, code, after, 0, 0)
        struct.pack_into("i", self._memory, at + 8, times)

    def seen(self, call: str) -> int:
        """How many calls have failed since."""
        return int(_FAULT.unpack_from(self._memory, CALLS.index(call) * _FAULT.size)[3])

    def disarm(self, call: str) -> None:
        self.arm(call, 0, times=0)

    def close(self) -> None:
        self._memory.close()
