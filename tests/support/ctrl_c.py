"""A Ctrl-C before each line or bytecode of the package that a call comes to, or at its calls."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ivshmem

from .leaks import open_fds, shared_mappings
from .waiting import PATIENCE

_HOME = str(Path(ivshmem.__file__).parent)
# In a process of its own, since a server keeps eventfds ready for the next peer.
SERVER = """
import sys
from ivshmem import Server
with Server(sys.argv[1], int(sys.argv[2]), 2, names=True) as server:
    server.start()
    print("READY")
    sys.stdin.read()
"""

_FILLERS = 8  # files that take the numbers which an interrupted call has freed


class CtrlC:
    """A trace function that raises KeyboardInterrupt once, at moment number `at`."""

    def __init__(self, at: int, opcodes: bool) -> None:
        self.left = at
        self.opcodes = opcodes
        self.where = "nowhere"

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(_HOME) or finalizes(frame):
            return None
        frame.f_trace_opcodes = self.opcodes
        # Bytecodes without a line enter and leave exception handlers. The interpreter looks for
        # signals at calls and loops, never there: it would keep the exception for ever.
        if event == ("opcode" if self.opcodes else "line") and frame.f_lineno is not None:
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
                raise KeyboardInterrupt
        return self


def finalizes(frame: FrameType | None) -> bool:
    """Whether this is a part of __del__: the interpreter ignores what is raised there."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


class CtrlCAtCalls:
    """A profile function that raises KeyboardInterrupt once, at moment number `at`.

    The moments are those at which CPython 3.11 and newer run signal handlers: where a function of
    the package begins, and where one in C has returned to it, before its result is stored. (The
    others are the backward jumps of loops.) At a line, CtrlC also comes between a block and the
    __exit__ that belongs to it, where a signal does not.
    """

    def __init__(self, at: int) -> None:
        self.left = at
        self.where = "nowhere"

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or not code.co_filename.startswith(_HOME):
            return
        # A generator is also resumed to be closed, where what is raised is ignored.
        resumed = event == "call" and code.co_flags & inspect.CO_GENERATOR and frame.f_lasti > 8
        if resumed or finalizes(frame):
            return
        self.left -= 1
        if self.left == 0:
            sys.setprofile(None)
            after = f", after {what.__name__}" if event == "c_return" else ""
            self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name}{after})"
            raise KeyboardInterrupt


@contextlib.contextmanager
def finalizing_quietly() -> Iterator[None]:
    """Drop what a finalizer, or a generator that is closed, raises, as the interpreter does.

    pytest keeps it, and by its traceback all that its frames hold.
    """
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def interrupted(
    call: Callable[[], object], at: int, opcodes: bool, calls: bool = False
) -> tuple[bool, str]:
    """Whether the call came to that moment, and where it was."""
    ctrl_c = CtrlCAtCalls(at) if calls else CtrlC(at, opcodes)
    begin = sys.setprofile if calls else sys.settrace
    # The numbers of descriptors that a call has closed go to others while the frames of the
    # exception live, with the owners that they hold: who closes twice closes one of these.
    fillers: list[int] = []
    try:
        try:
            begin(ctrl_c)
            try:
                call()
            finally:
                begin(None)
        except KeyboardInterrupt:
            fillers = [os.open(os.devnull, os.O_RDONLY) for _ in range(_FILLERS)]
        for filler in fillers:
            assert os.readlink(f"/proc/self/fd/{filler}") == os.devnull, ctrl_c.where
    finally:
        for filler in fillers:
            os.close(filler)  # EBADF if it was closed for us
    return ctrl_c.left <= 0, ctrl_c.where


def ctrl_c_anywhere(
    call: Callable[[], object],
    after: Callable[[str], object],
    *,
    opcodes: bool = False,
    calls: bool = False,
    every: int = 1,
) -> int:
    """Interrupt a call at each moment, and call `after` each time; returns how many there are.

    With `every`, only at each so-manieth moment.

    No descriptor and no shared mapping is left, and no descriptor is closed twice.
    """
    gc.collect()
    before = open_fds(), shared_mappings()

    def clean() -> bool:
        return (open_fds(), shared_mappings()) == before

    for at in range(1, 100_000, every):
        with finalizing_quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of objects that nobody was given
            came, where = interrupted(call, at, opcodes, calls)
            for generation in range(3):
                if clean():
                    break
                # An exception raised while another is handled is in a cycle, and is young.
                gc.collect(generation)
        after(where)
        give_up = time.monotonic() + PATIENCE / 10
        while not clean() and time.monotonic() < give_up:
            time.sleep(0.001)  # another thread is still closing, or other peers are to be told
            after(where)
        left = {fd: what for fd, what in open_fds().items() if before[0].get(fd) != what}
        assert clean(), f"left by a Ctrl-C at {where}: {left or shared_mappings() - before[1]}"
        if not came:
            return at
    raise AssertionError("it does not end")
