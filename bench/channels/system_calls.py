"""The system calls of a stream, counted by strace.

Knows: strace's table. Does not know: what streams.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from ivshmem.bench.cores import cores_for
from ivshmem.bench.roundtrip import Pair

from .ours import PutGet

MESSAGES, TURNS = 1_000_000, 10


class NoStrace(RuntimeError):
    """It is not installed, and the message says how to get it."""


def count(messages: int = MESSAGES) -> dict[str, int]:
    """How often each system call was made by both ends, all their threads, for so many messages.

    Each end also reads one line of its input, and one of them writes the durations.

    Raises:
        NoStrace: it is missing.
    """
    if shutil.which("strace") is None:
        raise NoStrace("no strace: apt-get install strace")
    way = PutGet(64, messages // TURNS)
    with way.ends() as ends, Pair(*ends, cores_for("two")) as pair:
        pair.trips(1)
        with tempfile.TemporaryDirectory() as directory:
            table = Path(directory) / "calls"
            command = ["strace", "-f", "-c", "-U", "calls,name", "-o", str(table)]
            command += [word for pid in pair.pids for word in ("-p", str(pid))]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
                assert strace.stderr is not None
                for _ in pair.pids:
                    strace.stderr.readline()  # "strace: Process N attached with 2 threads"
                pair.trips(TURNS)
                strace.send_signal(signal.SIGINT)
            return parsed(table.read_text())


def parsed(table: str) -> dict[str, int]:
    """What strace counted, by name."""
    found = re.findall(r"^\s*(\d+)\s+(\w+)$", table, re.MULTILINE)
    return {name: int(calls) for calls, name in found if name != "total"}
