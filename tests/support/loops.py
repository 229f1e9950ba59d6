"""The kinds of event loops that tests run in, and how often a loop's tasks run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
with contextlib.suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop
    uvloop.new_event_loop().close()  # the first of a process leaves a pipe, for signals


class TaskSteps:
    """Counts in `steps` how often the tasks run that a loop makes from now on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.steps = 0
        factory: Any = self._make  # of the options that each Python passes
        loop.set_task_factory(factory)

    def _make(
        self, loop: asyncio.AbstractEventLoop, inner: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        return asyncio.Task(_Counted(inner, self), loop=loop, **options)


class _Counted(Coroutine[Any, Any, Any]):
    def __init__(self, inner: Coroutine[Any, Any, Any], counter: TaskSteps) -> None:
        self._inner = inner
        self._counter = counter

    def send(self, value: Any) -> Any:
        self._counter.steps += 1
        return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Any:
        raise AssertionError("a task does not await its coroutine")
