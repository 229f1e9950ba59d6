"""Puts man pages and completions into wheels.

    python3 packages/into_wheels.py WHEEL ...

Makes them by the package of the first wheel, which this interpreter must be able to load, and adds
them to each wheel, whose place the new one takes. `pip install` puts them below the folder `share`
of the environment, where man, bash and zsh look. Needs what command_line.py needs, and wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMMAND_LINE = Path(__file__).with_name("command_line.py")


def places(name: str) -> dict[str, str]:
    """Where the files of a command belong, by their names."""
    return {
        f"{name}.1": f"share/man/man1/{name}.1",
        f"{name}.bash": f"share/bash-completion/completions/{name}",
        f"_{name}": f"share/zsh/site-functions/_{name}",
    }


PLACES = {**places("ivshmem"), **places("ivshmem-server")}


def _wheel(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "wheel", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def add(wheels: Sequence[Path]) -> None:
    """Add the files to each wheel."""
    with tempfile.TemporaryDirectory() as folder:
        pages, trees = Path(folder, "pages"), Path(folder, "trees")
        pages.mkdir()
        for number, wheel in enumerate(wheels):
            _wheel("unpack", "--dest", trees / str(number), wheel)
            (tree,) = (trees / str(number)).iterdir()
            if not number:
                command = [sys.executable, "-B", str(COMMAND_LINE), str(pages)]
                subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tree)})
            for name, place in PLACES.items():
                target = tree / f"{tree.name}.data/data" / place
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(pages / name, target)
            _wheel("pack", "--dest-dir", wheel.parent, tree)


if __name__ == "__main__":
    add([Path(name) for name in sys.argv[1:]])
