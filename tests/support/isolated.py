"""A test in a mount namespace of its own, with empty /tmp, /run and /dev/shm. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

NOBODY, OTHER = 65534, 65533

# The variables that a user does not have.
_NOT_OF_A_USER = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "XDG_RUNTIME_DIR")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

_CLONE_NEWNS = 0x20000


def isolated(body: Callable[[], None]) -> None:
    """Run `body` in a forked child with a /tmp, /run and /dev/shm of its own; raise its errors."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(body, writer)
    os.close(writer)
    with open(reader) as told:
        trouble = told.read()
    os.waitpid(child, 0)
    assert not trouble, trouble


def _run(body: Callable[[], None], writer: int) -> NoReturn:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        for command in (
            "mount --make-rprivate /",
            "mount -t tmpfs -o mode=1777 ivt /tmp",
            "mount -t tmpfs -o mode=0755 ivt /run",
            # For names that are not chosen, such as ivshmem-server's: other tests list this folder.
            "mount -t tmpfs -o mode=1777 ivt /dev/shm",
        ):
            subprocess.run(command.split(), check=True)
        _open_up(Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve())
        os.chdir("/tmp")
        body()
    except BaseException:
        os.write(writer, traceback.format_exc().encode())
    os._exit(0)


def _open_up(*needed: Path) -> None:
    """Let every user run this Python, also if it is in root's home: here, and nowhere else."""
    for place in needed:
        closed = [p for p in [*reversed(place.parents), place] if not p.stat().st_mode & 0o001]
        if not closed:
            continue
        aside = Path("/run/aside")
        aside.mkdir()
        for command in (
            f"mount --bind {place} {aside}",
            f"mount -t tmpfs -o mode=0755 ivt {closed[0]}",
            f"mkdir -p {place}",
            f"mount --move {aside} {place}",
        ):
            subprocess.run(command.split(), check=True)
        aside.rmdir()


def environment(**more: str) -> dict[str, str]:
    """The environment of a user's command."""
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_OF_A_USER}
    return {**kept, **more}


def start(
    *words: str, user: int = 0, program: str = "from ivshmem.cli.main import main", **more: str
) -> subprocess.Popen[str]:
    """Start `ivshmem WORDS` as a user; `more`: of its environment."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{program}; raise SystemExit(main())", *words],
        user=user,
        group=user,
        extra_groups=[],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_SQUATTER = """
import os, socket, sys, threading
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(9)
os.chmod(sys.argv[1], 0o777)
def answer():
    while True:
        c, _ = s.accept()
        c.recv(1000) and c.sendall(sys.argv[2].encode() + b"\\n")
if sys.argv[2]:
    threading.Thread(target=answer, daemon=True).start()
print("bound", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def squatting(path: Path, user: int, answer: str = "") -> Iterator[None]:
    """A socket that another user bound first; it gives all the same answer, or none."""
    with subprocess.Popen(
        [sys.executable, "-c", _SQUATTER, str(path), answer],
        user=user,
        group=user,
        extra_groups=[],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "bound\n"
        yield
        process.stdin.close()


def run(*words: str, user: int = 0, **more: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `ivshmem WORDS` as a user."""
    process = start(*words, user=user, **more)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err
