"""The floor: programs in C, compiled with the machine's compiler.

Knows: compiling a file of this folder. Does not know: what the programs do.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


class NoCompiler(RuntimeError):
    """There is none, and the message says how to get one."""


def build(source: str, program: Path, *flags: str) -> None:
    """Compile a C file of this folder into a program, or with "-shared" into a library.

    Raises:
        NoCompiler: none was found.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompiler("no C compiler for the floor: apt-get install gcc libc6-dev")
    command = [compiler, "-O2", "-Wall", *flags, "-o", str(program), str(HERE / source)]
    subprocess.run(command, check=True)
