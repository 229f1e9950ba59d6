"""Opening and closing in a thread, while the event loop of the caller continues.

Knows: what becomes of a result when the caller was cancelled, or the loop has ended.
Does not know: what is opened, and how.
"""

from __future__ import annotations

import contextlib
import threading
from asyncio import get_running_loop
from collections.abc import Callable
from typing import Protocol, TypeVar

from .endpoint import Endpoint

_E = TypeVar("_E", bound=Endpoint)


class Closable(Protocol):
    def close(self) -> None: ...


async def open_in_thread(
    open_: Callable[[], _E],
    stop: Callable[[], object] | None = None,
    abandon: Callable[[], object] | None = None,
) -> _E:
    """Call `open_` in a thread of its own.

    It is not a thread of the loop's executor. Those stay, and while there is another thread each
    ring must release the interpreter's lock. And the end of the loop would wait for a server that
    is silent.

    Args:
        stop: makes the call end early.
        abandon: called instead of `open_`, if no thread can be started.
    """
    loop = get_running_loop()
    done = loop.create_future()
    lock = threading.Lock()
    found: list[_E | BaseException] = []
    wanted = True

    def run() -> None:
        try:
            deliver(open_())
        except BaseException as error:
            deliver(error)

    def deliver(result: _E | BaseException) -> None:
        with lock:
            if wanted:
                found.append(result)
                with contextlib.suppress(RuntimeError):  # the loop is closed; the task finds it
                    loop.call_soon_threadsafe(arrive)
                return
        if isinstance(result, Endpoint):
            result.close()

    def arrive() -> None:
        if not done.done():
            done.set_result(None)

    # Without `stop` it is not a daemon: the process ends only after a device was given back.
    thread = threading.Thread(target=run, name="ivshmem-open", daemon=stop is not None)
    try:
        thread.start()
        await done
    except BaseException:
        with lock:
            wanted = False
        if stop is not None:
            stop()
        if thread.ident is None and abandon is not None:
            abandon()
        for late in found:
            if isinstance(late, Endpoint):
                _start_closing(late)
        raise
    thread.join()  # it is about to return
    if isinstance(found[0], BaseException):
        raise found.pop()  # type: ignore[misc]
    return found[0]


async def close_in_thread(thing: Closable) -> None:
    """Call close() in a thread of its own, and raise what that raises.

    If this is cancelled, the thread continues by itself.
    """
    loop = get_running_loop()
    done = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if done.done():
            return  # cancelled
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def closed(error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, error)

    thread = _start_closing(thing, closed)
    await done
    if thread is not None:
        thread.join()  # it is about to return


def _start_closing(
    thing: Closable, closed: Callable[[BaseException | None], object] | None = None
) -> threading.Thread | None:
    """Close it in a thread, or here if none can start; then call `closed` with the error."""

    def run() -> None:
        failure: BaseException | None = None
        try:
            thing.close()
        except BaseException as error:
            failure = error
        if closed is not None:
            closed(failure)

    # Not a daemon: the process ends only after a device was given back.
    thread = threading.Thread(target=run, name="ivshmem-close")
    try:
        thread.start()
    except RuntimeError:  # no more threads: to block the loop is better than to keep the device
        run()
        return None
    return thread
