"""Begins the program of a guest that carries its files: it comes as the first line of stdin."""

import json
import os
import runpy
import sys
from pathlib import Path

PROGRAM = Path("/tmp/program.py")


def orders() -> dict[str, object]:
    """Byte by byte: what follows the line is the program's to read."""
    line = bytearray()
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    told: dict[str, object] = json.loads(line)
    return told


def main() -> None:
    told = orders()
    program, argv, env = told["program"], told["argv"], told["env"]
    assert isinstance(program, str)
    assert isinstance(argv, list)
    assert isinstance(env, dict)
    PROGRAM.write_text(program)
    os.environ.update(env)
    sys.argv = [str(PROGRAM), *argv]
    runpy.run_path(str(PROGRAM), run_name="__main__")


if __name__ == "__main__":
    main()
