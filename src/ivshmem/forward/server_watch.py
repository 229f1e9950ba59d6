"""Internal: the server of a process that forwards: whether it is gone, and whether a new one came.

Knows: when it is better to join the new one than to stay in the memory of the old one. Does not
know: how a forward joins.

Without a server the memory and the doorbells work, so that connections continue. A new server has
memory of its own, unless it found the old one's again by its name. Whoever starts from now on joins
it, so that this process has to, too. Two reasons to stay for a while:

- Virtual machines keep the old memory and doorbells until they end: QEMU never reconnects.
- In the same memory connections continue, and who comes later is only slower until they have ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..channel import Channels
from ..errors import IvshmemError
from ..memory.pages import file_system
from ..memory.region import Region
from ..peer.client import Client, connect
from ..peer.endpoint import Disconnected, Endpoint
from ..system import late_logging
from ..system.uncopied import Uncopied
from .turns import Turns

_log = late_logging.log_of("ivshmem.forward")

LOOK = 1.0  # seconds between two looks
_CONNECT_LIMIT = 0.5  # seconds: the loop waits for it
_LOOKS_AFTER_SILENCE = 10  # that are left out after a server that did not answer in this time


class ServerWatch(Uncopied):
    """Looks after the server of a Client; a guest's device has none.

    Args:
        is_idle: whether no connection is open.
        leave: called with a Client of the new server, which is then the callee's.
    """

    def __init__(
        self,
        turns: Turns,
        endpoint: Endpoint,
        channels: Channels,
        *,
        is_idle: Callable[[], bool],
        leave: Callable[[Client], object],
    ) -> None:
        self._turns = turns
        self._channels = channels
        self._is_idle = is_idle
        self._leave = leave
        self._left_out = 0
        self._said: set[str] = set()
        self._new_is_same: bool | None = None  # memory; None: no new server came yet
        if isinstance(endpoint, Client):
            self._client = endpoint
            turns.after(LOOK, self._look)

    def _look(self) -> None:
        for event in self._client.peer_events():  # or the server would take it for stalled
            if isinstance(event, Disconnected):
                self._say(
                    f"{event.reason}: connections continue in its memory, and a server that comes"
                    " is joined"
                )
        if not self._client.connected and not self._seek():
            return
        self._turns.after(LOOK, self._look)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning("server %s: %s", self._client.path, text)

    def _seek(self) -> bool:
        """Look for a new server; whether to look again."""
        if self._left_out:
            self._left_out -= 1
            return True
        region = self._client.region
        is_device = region.source == "device" or file_system(region.fileno()) == "sysfs"
        same = self._new_is_same
        if same is not None and self._reason_to_stay(same=same, is_device=is_device):
            return True
        try:
            found = connect(self._client.path, timeout=_CONNECT_LIMIT)
        except TimeoutError:
            self._left_out = _LOOKS_AFTER_SILENCE
            return True
        except (IvshmemError, OSError):
            return True  # nobody is there yet
        self._new_is_same = _is_same(found.region, region)
        reason = self._reason_to_stay(same=self._new_is_same, is_device=is_device)
        if reason:
            found.close()
            self._say(f"a new one is there, and this forward {reason}")
            return True
        self._say("joins the new one; connections end")
        self._leave(found)
        return False

    def _reason_to_stay(self, *, same: bool, is_device: bool) -> str:
        """Why the old memory is the better one; "": it is not.

        The clients of a broker have the memory of a device, and without the broker no interrupts.
        """
        if is_device:
            return ""
        if self._channels._member.has_foreign_places():
            return (
                "stays in the memory of the old one while other machines are at work there: restart"
                " the virtual machines, and it follows, or restart this command"
            )
        if same and not self._is_idle():
            return "joins it when no connection is open: it has the same memory"
        return ""


def _is_same(one: Region, other: Region) -> bool:
    """Whether two regions are one file."""
    first, second = os.fstat(one.fileno()), os.fstat(other.fileno())
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
