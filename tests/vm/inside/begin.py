"""Begins a program that comes as a line of stdin: in a guest that carries its files, the only one.

With the argument "stay" it begins one after the other, each in a child, and says how each has
ended.
"""

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


def run(told: dict[str, object]) -> None:
    program, argv, env = told["program"], told["argv"], told["env"]
    assert isinstance(program, str)
    assert isinstance(argv, list)
    assert isinstance(env, dict)
    PROGRAM.write_text(program)
    os.environ.update(env)
    sys.argv = [str(PROGRAM), *argv]
    runpy.run_path(str(PROGRAM), run_name="__main__")


def stay() -> None:
    # For the children, which are forked in a moment: to import it takes seconds in a guest.
    # Here, since a guest that does not stay may have a program that does without.
    import ivshmem.guest  # noqa: F401

    print("resident: ready", flush=True)
    while True:
        told = orders()
        child = os.fork()
        if not child:
            run(told)
            return
        _, status = os.waitpid(child, 0)
        print("resident: ended with status", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["stay"]:
        stay()
    else:
        run(orders())
