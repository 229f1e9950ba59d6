"""The kinds of event loops that tests run in: asyncio's own, and uvloop where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
with contextlib.suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop
    uvloop.new_event_loop().close()  # the first of a process leaves a pipe, for signals
