"""A call that is interrupted where a signal handler can come: between any two bytecodes.

The handler is called by a trace function, which is one more place than CPython has: it runs signal
handlers only after calls and at backward jumps. So what holds here holds for signals.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ivshmem

_HOME = str(Path(ivshmem.__file__).parent)
_LIMIT = 20  # seconds that a call may take before it is taken for a deadlock


@contextmanager
def no_deadlock(seconds: int = _LIMIT) -> Iterator[None]:
    """Fail if the block, which runs in the main thread, takes longer."""

    def give_up(*_: object) -> None:
        raise AssertionError(f"a deadlock: nothing happened for {seconds} seconds")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def interrupted(
    call: Callable[[], object],
    handler: Callable[[], object] = lambda: None,
    *,
    at: int | None = None,
    opcodes: bool = False,
) -> dict[int, str]:
    """Make the call, and run the handler inside it.

    Args:
        at: before which line of the package's that this thread comes to; None: before each.
        opcodes: count bytecodes, not lines.

    Returns:
        When this came to each line, or bytecode, for the first and for the last time, and in which
        module it is.
    """
    count = 0
    first: dict[tuple[str, int, int], int] = {}
    last: dict[tuple[str, int, int], int] = {}
    kind = "opcode" if opcodes else "line"

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(_HOME):
            return None
        frame.f_trace_opcodes = opcodes
        if event == kind:
            where = frame.f_code.co_filename, frame.f_lineno, opcodes * frame.f_lasti
            last[where] = count
            first.setdefault(where, count)
            count += 1
            if at is None or count == at + 1:
                handler()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with no_deadlock():
            call()
    finally:
        sys.settrace(before)
    return {count: Path(where[0]).stem for came in (first, last) for where, count in came.items()}
