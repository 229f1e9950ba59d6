"""Internal: one device for several processes of a guest, which connect to it as to a server.

Knows: what passes between the device and clients. Does not know: the ways to open a device (any
endpoint works), or how clients are served; Server does.

To other machines a virtual machine is one peer. So all clients here have its id, each interrupt of
the device reaches all of them, and they are not told of one another. The device does not say which
peers exist. Clients can ring the peers in the region's directory of names, and those in `peers`.

All peers have as many vectors as the device has. Where this machine gets only one interrupt for all
of them, as by UIO, that interrupt goes to each vector of each client.

Invariants:
1. A client can neither block nor end this process: the kernel signals its eventfds, and they are
   read without blocking.
2. An interrupt that was taken from the device was signalled to every client.
3. All clients have the id of the device. A client is told its id once: when a migration has changed
   it, all clients are disconnected, and must connect again.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial

from .. import _core
from ..errors import NoDirectory
from ..native import areas, descriptors
from ..peer.directory import Directory
from ..peer.endpoint import Endpoint
from ..protocol.limits import MAX_ID
from ..protocol.roster import Member
from ..server.report import Peer
from ..server.server import Server
from ..system.listener import Listener
from ..text import counted
from .device import GuestDevice

_log = logging.getLogger("ivshmem.guest")

_LOOK_SECONDS = 1.0  # between looks into the directory of names

# Eventfds for peers found in the directory, which any peer can fill. Each client gets all of them,
# and many processes may have only 1,024 descriptors.
_BELLS = 512

# Interrupts passed on in a row, before clients that connect or ring have their turn.
_BATCH = 64


class Broker(Server):
    """Serves a guest's device to other processes of the guest, on a Unix socket.

    Args:
        device: an open device (or any endpoint), which stays the caller's. Its memory must begin a
            file that can be passed to clients: "resource2" or "resource2_wc".
        path: of the socket, as Server takes it.
        peers: ids that clients can ring, in addition to those in the directory of names and those
            that use channels.
        on_join, on_leave: as Server's.

    It runs as a Server does. When the device is unplugged, running it raises DeviceGone.

    Raises:
        ValueError: the device's memory is mapped in a way that cannot be passed on.
        OSError: as of Server, or no asynchronous I/O in this kernel (io_setup(2)).
    """

    def __init__(
        self,
        device: Endpoint,
        path: str | os.PathLike[str] | Listener,
        *,
        peers: Iterable[int] = (),
        on_join: Callable[[Peer], object] | None = None,
        on_leave: Callable[[Peer], object] | None = None,
    ) -> None:
        self._closed = True  # until there is something to close
        if device.region.offset:
            raise ValueError(
                "memory that is mapped by vfio or UIO cannot be handed on: open the device with"
                " memory='resource2', for which a guest with a UIO driver boots with iomem=relaxed"
            )
        self.device = device
        self._shared_id = device.id
        self._fixed = frozenset(peers)
        if wrong := [peer for peer in self._fixed if not 0 <= peer <= MAX_ID]:
            raise ValueError(f"peer {wrong[0]}: ids are 0 to {MAX_ID}")
        self._remote: dict[int, tuple[Member, descriptors.FdArray]] = {}
        self._directory: Directory | None = None
        self._complaint = ""
        heard = device.vectors
        known = device.device.vectors if isinstance(device, GuestDevice) and heard else None
        vectors = heard if known is None else known
        self._one_for_all = vectors > heard
        super().__init__(path, device.region, vectors, on_join=on_join, on_leave=on_leave)
        try:
            self._signaller = _signaller()
            self._resources.callback(self._signaller.close)
            self._timer = descriptors.Timer()
            self._resources.callback(self._timer.close)
            self._resources.callback(self._close_bells)
            self._engine.poller.watch(self._timer.fileno(), self._look)
            if heard:
                self._engine.poller.watch(device.fileno(), self._interrupts)
            self._look()
        except BaseException:
            self.close()
            raise

    @property
    def remote(self) -> list[int]:
        """The ids of the peers that clients can ring now, ascending."""
        return sorted(self._remote)

    def _interrupts(self) -> None:
        """Pass on the interrupts of the device."""
        for _ in range(_BATCH):
            if (event := self.device.next_event(0)) is None:
                break
            if isinstance(event, _core.Interrupt):
                any_of = range(self.vectors) if self._one_for_all else (event.vector,)
                for vector in any_of:
                    self._signaller.signal(self._engine.bells(vector))

    # -- peers elsewhere --------------------------------------------------------------------------

    def _look(self) -> None:
        """Announce and remove peers, as the directory lists them now."""
        self._timer.set(_LOOK_SECONDS)
        if (current := self.device.current_id()) != self._shared_id:
            self._change_id(current)
        published = self._published()
        room = max(_BELLS // max(self.vectors, 1) - len(self._fixed), 1)
        if len(published) > room:
            self._complain(
                f"the directory and channels have {counted(len(published), 'peer')}, room is for"
                f" {room}"
            )
        wanted = self._fixed.union(published[:room]) - {self._shared_id}
        self._remove([peer for peer in self._remote if peer not in wanted])
        for peer in sorted(wanted - self._remote.keys()):
            try:
                self._announce(peer)
            except OSError as error:  # EMFILE and its like; the next look tries again
                self._complain(f"peer {peer} cannot be offered now: {error.strerror}")
                break

    def _change_id(self, peer: int) -> None:
        before, self._shared_id = self._shared_id, peer
        text = f"the device has id {peer} now, not {before}: clients must connect again"
        self._engine.say(partial(_log.warning, text))
        self._remove(
            list(self._remote)
        )  # one of them may have this id; the others are announced again
        self._engine.become(peer)

    def _complain(self, text: str) -> None:
        """Log a complaint that may come every second only once."""
        if text != self._complaint:
            self._complaint = text
            self._engine.say(partial(_log.warning, text))

    def _published(self) -> list[int]:
        """Return the ids in the directory, the live ones first, and then those of channels."""
        if self._directory is None:
            try:
                self._directory = Directory.open(self.device.region)
            except NoDirectory:
                return []
            self._resources.callback(self._directory.close)
        entries = sorted(self._directory.entries(), key=lambda entry: (not entry.alive, entry.id))
        ids = dict.fromkeys([*(entry.id for entry in entries), *areas.peers_of(self.device.region)])
        return [peer for peer in ids if peer != self._shared_id and peer not in self._fixed]

    def _announce(self, peer: int) -> None:
        bells = descriptors.FdArray.eventfds(self.vectors)
        self._remote[peer] = self._engine.admit(peer, bells), bells
        for vector, bell in enumerate(bells):
            self._engine.poller.watch(bell, partial(self._ring, peer, vector, bells))

    def _ring(self, peer: int, vector: int, bells: descriptors.FdArray) -> None:
        if bells.drain(vector):
            self.device.ring(peer, vector)

    def _remove(self, peers: Iterable[int]) -> None:
        for peer in peers:
            member, bells = self._remote.pop(peer)
            self._engine.dismiss(member)
            for bell in bells:
                self._engine.poller.unwatch(bell)
            bells.close()

    def _close_bells(self) -> None:
        for _, bells in self._remote.values():
            bells.close()


def _signaller() -> descriptors.Signaller:
    try:
        return descriptors.Signaller()
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOSYS:
            reason = (
                "this kernel has no asynchronous I/O (CONFIG_AIO, or a seccomp filter), and without"
                " it a client could block the others: let one process use the device, by `open`"
            )
        elif error.errno == errno.EAGAIN:
            reason = (
                "too many users of asynchronous I/O: as root,"
                " echo 1048576 > /proc/sys/fs/aio-max-nr"
            )
        raise OSError(error.errno, reason) from None
