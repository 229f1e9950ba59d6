"""The channels of a server's regions, seen without becoming a peer.

Knows: where a process's memory can be opened. Does not know: what is shown of it.

A peer that only looks would be announced to all others, and so would its leave; a QEMU that was
told of a leave can crash when its device is unplugged. So this opens the memory by the server's own
descriptor, /proc/PID/fd/N, for reading only. That needs the rights that the control socket needs:
those of root, or of the server's user.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import Any

from .. import channel
from ..errors import IvshmemError, NoChannels, ServerGone
from ..memory.region import Region
from ..peer import inquiry
from ..system import processes
from ..system.uncopied import Uncopied
from .channel_counting import Rates

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .status_text import StatusReply

_SECONDS = 1.0  # for an answer; the keys have to wait for it


class ServedChannels(Uncopied):
    """What passes through the channels of all regions of a server."""

    def __init__(self) -> None:
        self._opened: dict[tuple[int, str, str], _AreaRates | str] = {}

    def rates(self, status: StatusReply) -> dict[str, list[dict[str, Any]] | str]:
        """Return the rates of each region that has channels, or why they cannot be seen."""
        server = status["server"]
        found: dict[str, list[dict[str, Any]] | str] = {}
        wanted = {}
        for region in status["regions"]:
            if region.get("channels"):
                key = (server["pid"], region["name"], region["socket"])
                wanted[key] = (
                    self._opened.pop(key) if key in self._opened else _open(server, region)
                )
        self.close()
        self._opened = wanted
        for (_, name, _), opened in wanted.items():
            found[name] = opened if isinstance(opened, str) else opened.next()
        return found

    def close(self) -> None:
        for each in self._opened.values():
            if not isinstance(each, str):
                each.close()
        self._opened = {}


class _AreaRates(Uncopied):
    """The channels of a region."""

    def __init__(self, region: Region) -> None:
        self._rates = Rates()
        with contextlib.ExitStack() as stack:
            stack.enter_context(region)
            self._channels = stack.enter_context(channel.open(region))
            self._stack = stack.pop_all()

    def next(self) -> list[dict[str, Any]] | str:
        try:
            return self._rates.next(self._channels.list(), time.monotonic())
        except IvshmemError as error:
            return str(error)

    def close(self) -> None:
        self._stack.close()


def _open(server: StatusReply, region: StatusReply) -> _AreaRates | str:
    """Open a region's channels; or say why that cannot be."""
    if not server["pid_namespace"] == processes.pid_namespace() != 0:
        return "the server is in a container: `ivshmem channel top` joins them as a peer"
    try:
        facts = inquiry.ask(region["socket"], _SECONDS)
        return _AreaRates(_memory(server["pid"], facts["device"], facts["inode"]))
    except (NoChannels, ServerGone, KeyError):
        return "they have another version, or the server has"
    except (IvshmemError, OSError) as error:
        return " ".join(str(error).split())


def _memory(pid: int, device: int, inode: int) -> Region:
    """The memory with that device and inode, which a process has open."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            if not _is(os.stat(path), device, inode):
                continue
            # It can be another file by now, a pipe for example, whose opening would wait.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if _is(os.fstat(fd), device, inode):
                return Region.from_fd(fd, readonly=True)
            os.close(fd)
    raise FileNotFoundError(f"process {pid} has no such memory")


def _is(found: os.stat_result, device: int, inode: int) -> bool:
    return (found.st_dev, found.st_ino) == (device, inode) and stat.S_ISREG(found.st_mode)
