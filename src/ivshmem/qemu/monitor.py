"""A running QEMU, spoken to over QMP.

Knows: the library `qemu.qmp` (not needed otherwise), addresses, time limits.
Does not know: what QEMU is asked for.

A monitor socket serves one client at a time: a second one is accepted and gets no greeting.

Invariants:
1. Nothing waits without a limit.
2. Each error, and anything that the other side sends, becomes a QmpError or an OSError with one
   line that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import QemuGone, QmpError
from ..system.answers import Answer
from ..system.uncopied import Uncopied

if TYPE_CHECKING:
    from qemu.qmp import EventListener, QMPClient

SECONDS = 20.0  # for an answer: a QEMU at work on something else takes its time

_HANG_UP = 2.0  # seconds that QEMU may take to notice that a client is gone

_NO_MONITOR = ": is this a monitor of QEMU (-qmp)?"

_T = TypeVar("_T")

_UCRED = struct.Struct("3i")


class Monitor(Uncopied):
    """A connection to a QEMU's monitor; an asynchronous context manager.

    Args:
        address: path of its Unix socket, or HOST:PORT.
        name: how messages call this QEMU; the address if "".
        seconds: for connecting, and for each command, unless it says otherwise.

    Entering raises:
        QmpError: not a QMP monitor, or another client has it; or the library is not installed.
        OSError: as of connect(2), with the address.
    """

    def __init__(self, address: str, name: str = "", seconds: float = SECONDS) -> None:
        self.address = address
        self.name = name or address
        self.pid: int | None = None
        self._seconds = seconds
        self._client: QMPClient | None = None
        self._ended = ""  # why the connection has ended
        self._events: EventListener | None = None

    @property
    def local(self) -> bool:
        """Whether QEMU is on this machine, as far as the address tells."""
        return "/" in self.address

    async def __aenter__(self) -> Monitor:
        qmp = library()
        end = time.monotonic() + _HANG_UP
        while True:
            client = qmp.QMPClient(self.name)
            # What it logs, the exceptions say.
            client.logger = logging.getLogger("qemu.qmp.quiet")
            client.logger.disabled = True
            self._events = qmp.EventListener()
            client.register_listener(self._events)
            try:
                await self._greeted(client)
            except TimeoutError:
                raise QmpError(
                    f"{self.name}: no greeting within {self._seconds:g} s at {self.address}: end"
                    " the other client of this monitor, or give QEMU one more -qmp"
                ) from None
            except qmp.ConnectError as error:
                # QEMU may take a client before it has noticed that the last one is gone. Then it
                # hangs up on both, or says that they had agreed on capabilities already, which the
                # library did not expect (AssertionError), or sends what was for the last one, an
                # event or an answer, before its greeting (KeyError).
                passing = isinstance(_bottom(error), EOFError | OSError | AssertionError | KeyError)
                if passing and time.monotonic() < end:
                    await asyncio.sleep(0.05)
                    continue
                raise QmpError(
                    f"{self.name}: {self.address} is not a QMP monitor ({_reason(error)}): give"
                    " the address of -qmp, not of -monitor"
                ) from None
            self._client = client
            return self

    async def _greeted(self, client: QMPClient) -> None:
        """Connect a client, and shake hands."""
        sock = await self._connected()
        try:
            if self.local:
                self.pid = _UCRED.unpack(
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                )[0]
            await _within(self._seconds, client.connect(sock))
        except BaseException:
            # Cancelled in the moment when all was well, it would keep the monitor for itself.
            if client.runstate.name == "RUNNING":
                await to_the_end(client.disconnect())
            sock.close()
            raise

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect; QEMU continues. May be called twice."""
        client, self._client = self._client, None
        if client is None:
            return
        self._ended = self._ended or f"the connection to the monitor at {self.address} was closed"
        # Left in the middle of it, the library would leave tasks behind; and why the connection
        # ended, whoever used it was told.
        with contextlib.suppress(Exception):
            await to_the_end(client.disconnect())

    async def execute(
        self, command: str, /, arguments: Mapping[str, Any] | None = None, **more: Any
    ) -> Answer:
        """A command's result. What is in `more` is an argument, too.

        Raises:
            QmpError: refused, or no answer in time; whether it was done is not known then.
            QemuGone: the same of a QEMU that has ended, or that sent what is not QMP.
        """
        qmp = library()
        if self._client is None:
            raise QemuGone(f"{self.name}: {self._ended} (it was asked for {command})")
        words = {**(arguments or {}), **more}
        try:
            value = await _within(self._seconds, self._client.execute(command, words))
        except qmp.ExecuteError as error:
            text = " ".join(str(error).split())
            raise QmpError(f"{self.name}: {command}: {text}", error.error_class) from None
        except (qmp.ExecInterruptedError, qmp.StateError):
            await self._ask_why()
            raise QemuGone(f"{self.name}: {self._ended} (it was asked for {command})") from None
        except TimeoutError:
            raise QmpError(
                f"{self.name}: no answer to {command} within {self._seconds:g} s: is QEMU stopped?"
            ) from None
        except qmp.QMPError as error:  # neither a result nor an error
            raise QmpError(f"{self.name}: {command}: {_reason(error)}{_NO_MONITOR}") from None
        return Answer(value, f"{self.name}: {command}")

    async def _ask_why(self) -> None:
        """Find out why the connection has ended, and let go of it."""
        client, self._client = self._client, None
        self._ended = "QEMU has ended"
        if client is None:
            return
        try:
            await to_the_end(client.disconnect())
        except (EOFError, OSError):
            pass
        except Exception as error:  # the library's reader died of what it read
            self._ended = f"its answer is not QMP ({_reason(error)}){_NO_MONITOR}"

    async def event(self, name: str, seconds: float, **data: Any) -> bool:
        """Take events up to the first such one with these data; whether it came in time."""
        assert self._events is not None
        with contextlib.suppress(TimeoutError):
            await _within(seconds, self._event(self._events, name, data))
            return True
        return False

    async def _event(self, events: EventListener, name: str, data: Mapping[str, Any]) -> None:
        while True:
            message = await events.get()
            found = message.get("data", {})
            if message["event"] != name or not isinstance(found, dict):
                continue
            if all(found.get(key) == value for key, value in data.items()):
                return

    async def _connected(self) -> socket.socket:
        """A socket, connected; asyncio's own ways do not let its peer's pid be asked for."""
        family, address = _parse(self.address)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await _within(self._seconds, _connect(sock, address))
        except TimeoutError:
            sock.close()
            raise QmpError(
                f"{self.name}: no answer at {self.address}: is the host reachable?"
            ) from None
        except OSError as error:
            sock.close()
            reason = os.strerror(error.errno or 0) if error.errno else str(error)
            raise OSError(
                error.errno, f"{reason}: is the QEMU of {self.name} running?", self.address
            ) from None
        except BaseException:
            sock.close()
            raise
        return sock


async def _connect(sock: socket.socket, address: Any) -> None:
    """Connect a socket that does not block.

    asyncio takes the EAGAIN of a Unix socket, whose queue of clients is full, for "under way".
    """
    if sock.family != socket.AF_UNIX:
        await asyncio.get_running_loop().sock_connect(sock, address)
        return
    while True:
        try:
            sock.connect(address)
            return
        except BlockingIOError:
            await asyncio.sleep(0.02)


async def _within(seconds: float, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of this, if it comes in time.

    asyncio.wait_for does the same, but before Python 3.12 forgets that it was cancelled if the work
    ends in that moment.

    Raises:
        TimeoutError: it does not.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Do something short wholly; if this task is cancelled during it, that comes after."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task})
    finally:
        await asyncio.wait({task})
        task.exception()  # asyncio warns of exceptions that are never read
    return task.result()


def library() -> Any:
    """The module qemu.qmp.

    Raises:
        QmpError: it is not installed.
    """
    try:
        import qemu.qmp  # here: it is optional (the extra "qemu")
    except ImportError:
        raise QmpError("the library qemu.qmp is not installed: pip install qemu.qmp") from None
    return qemu.qmp


def _parse(address: str) -> tuple[socket.AddressFamily, Any]:
    """A path has a slash in it; anything else is HOST:PORT."""
    if "/" in address:
        return socket.AF_UNIX, address
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(
            f"{address}: a monitor is the path of a Unix socket (with a slash), or HOST:PORT"
        )
    host = host.strip("[]") or "localhost"
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


def _bottom(error: BaseException) -> BaseException:
    """What an error of the library comes from."""
    while (cause := getattr(error, "exc", None) or error.__cause__) is not None:
        error = cause
    return error


def _reason(error: BaseException) -> str:
    """The library's messages have many lines, and all that was received."""
    cause = _bottom(error)
    try:
        lines = str(cause).strip().splitlines()
    except (ValueError, RecursionError):  # it shows what it has received
        lines = []
    return lines[0][:100] if lines else type(cause).__name__
