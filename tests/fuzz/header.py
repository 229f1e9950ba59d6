"""ivshmem_channel.h alone, in memory that others write at any moment: tests/channel/hostile.c.

An input is the seed from which that program draws what it writes and what it calls.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from ivshmem import channel

from .target import Finding, Target

_SOURCE = Path(__file__).parents[1] / "channel" / "hostile.c"
_STATES = 64  # of each input: then the program makes the area anew


class HeaderTarget(Target):
    """What stands in the words that peers share, read by the program in C."""

    name = "header"
    modules = ()
    share = 1

    def set_up(self) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise Finding("no C compiler: apt-get install gcc")
        folder = self.undo.enter_context(tempfile.TemporaryDirectory(prefix="ivshmem-fuzz-"))
        self._program = os.path.join(folder, "hostile")
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        command = [compiler, "-std=gnu11", "-g", *sanitize, f"-I{channel.get_include()}"]
        subprocess.run([*command, str(_SOURCE), "-o", self._program], check=True)

    def seeds(self) -> Sequence[bytes]:
        return [bytes([number]) for number in range(1, 4)]

    def mutate(self, data: bytes, numbers: Random, other: bytes) -> bytes:
        return numbers.randbytes(7)

    def run(self, data: bytes) -> None:
        seed = int.from_bytes(data, "little")
        # Without what watches this interpreter: it would not find the program's own.
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            [self._program, str(_STATES), str(seed)],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        if done.returncode != 0:
            raise Finding(f"{done.stdout}{done.stderr}")

    def show(self, data: bytes) -> str:
        return f"hostile {_STATES} {int.from_bytes(data, 'little')}"
