"""Internal: the whole tree of exceptions, and whose fault each is. `ivshmem` has the public ones.

    IvshmemError
     +-- ProtocolError                what the other end sent is not protocol version 0
     +-- ServerGone (ConnectionError) the server ended the connection before set-up was complete
     +-- RegionError (ValueError)     a size or a source that cannot be shared memory
     +-- ImageError (ValueError)      a saved region that is damaged, or does not fit
     +-- NoSuchPeer (LookupError)     no peer with that id is connected
     +-- NoSuchVector (LookupError)   that peer, or this endpoint, has no such vector
     +-- NoDirectory (LookupError)    the region has no directory of names
     +-- NoSuchName (LookupError)     no peer has published that name
     +-- NameTaken                    another living peer has published that name
     +-- DirectoryFull                a living peer holds each slot of the directory
     +-- NoFreeId                     every id is taken, or known to a peer that is connected
     +-- NoSuchDevice (LookupError)   no ivshmem device there, or several and none named
     +-- NoInterrupts                 the device, or the way it was opened, has no interrupts
     +-- DeviceGone (ConnectionError) the device was unplugged while it was in use
     +-- ClosedError (ValueError)     the object was closed before, or while, it was used
     |    +-- ServerFailed            the thread of Server.start ended by an error: its __cause__
     +-- ChannelError                 a channel cannot do that now           ivshmem.channel
     |    +-- NoChannels (LookupError)      the region has no room for channels
     |    +-- NoSuchChannel (LookupError)   no channel of that name
     |    +-- ChannelExists                 there is a channel of that name
     |    +-- ChannelTypeError (TypeError)  another kind, or another type of messages
     |    +-- MessageTooLong (ValueError)   longer than the channel's limit, or the buffer
     |    +-- MessagesLost                  writers continued without this reader
     |    +-- Overtaken                     a message was overwritten while it was looked at
     |    +-- Redelivered                   another reader has the message, too
     |    +-- CallFailed                    a call that has no reply
     |    |    +-- ServerLost               its server is gone; it may have done the work
     |    +-- ChannelCorrupt                a shared word is impossible
     +-- ConfigError (ValueError)     a configuration that cannot be served      ivshmem.config
     +-- ControlError                 a running server refused a request         ivshmem.control
     +-- MigrationError               a migration that did not happen            ivshmem.migration
     |    +-- MigrationRefused        it would not work; nothing was touched
     |    +-- MigrationFailed         the group runs at the source as before
     |    +-- MigrationUnfinished     it stands still, and can be finished or undone
     |    +-- StepFailed              one step failed
     |    |    +-- UnplugPending      a guest was asked to release a device, and may still do so
     |    |    +-- UnplugRefused      QEMU did not even ask the guest to release the device
     |    +-- AlreadyMigrated         the step cannot be undone: the VM runs at the destination
     +-- QmpError                     QEMU refused a command, or is silent       ivshmem.migration
     |    +-- WrongAnswer             a reply that no known QEMU sends
     |    +-- QemuGone                the connection to QEMU ended
     +-- MetricsError                 metrics cannot be served here
     +-- JournalError                 a journal that is damaged, or of another version
     +-- HandoverError                a service was not handed over
     +-- Misshapen (ValueError)       JSON of another process that has the wrong form
     +-- NoAnswer                     the other side of a measurement is silent
     +-- CommandError (ValueError)    a command of `ivshmem connect` that cannot be done
    OSError                           what the operating system refuses, with its path in `filename`
     +-- VfioUnusable                 vfio cannot give this device to any process here
     +-- GroupHeld                    another process has the vfio group open
     +-- WrongKind                    a path that leads to something else than a regular file
          +-- WrongKindDirectory (IsADirectoryError)  it leads to a directory
    RuntimeError
     +-- WorkerFailed                 a process of a benchmark ended, or got stuck

`ivshmem` exports what stands above ChannelError. A module that is named beside a class exports that
class and those below it, except StepFailed, UnplugPending, UnplugRefused, AlreadyMigrated,
WrongAnswer and QemuGone. These six, and all others, are internal: programs catch them by their
base. A time limit that ran out before an object existed is the built-in TimeoutError.
"""

from __future__ import annotations

from .text import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeVar

    _E = TypeVar("_E", bound=BaseException)


def reason_of(error: OSError) -> str:
    """Say what the operating system refuses, without the number that str() puts before it."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason[:1].lower()}{reason[1:]}"


class IvshmemError(Exception):
    """The root: catches whatever this package raises of its own."""

    def __reduce__(self) -> tuple[object, ...]:
        # By default, pickle calls the class with `args`, which has the message and nothing else.
        args = super().__reduce__()[1]  # of an OSError also the path
        return _remake, (type(self), args, vars(self))


def _remake(kind: type[_E], args: tuple[object, ...], attributes: dict[str, object]) -> _E:
    """Make an exception as it was, without its constructor."""
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class ProtocolError(IvshmemError):
    """The other end sent what protocol version 0 does not allow; the connection is over."""


class ServerGone(IvshmemError, ConnectionError):
    """The server ended the connection before set-up was complete."""


class RegionError(IvshmemError, ValueError):
    """A size or a source that cannot be a shared memory region."""


class ImageError(IvshmemError, ValueError):
    """A file that holds no region, or not whole, or not one that fits."""


class NoSuchPeer(IvshmemError, LookupError):
    """No peer with that id is connected, as far as the server has told this endpoint."""


class NoSuchVector(IvshmemError, LookupError):
    """A vector number outside 0..vectors-1."""


class NoDirectory(IvshmemError, LookupError):
    """The region has no directory of names, or one of a version that is not known here."""


class NoSuchName(IvshmemError, LookupError):
    """No living peer has published that name."""


class NameTaken(IvshmemError):
    """Another living peer has published that name."""


class DirectoryFull(IvshmemError):
    """No slot is left in the directory of names."""


class NoFreeId(IvshmemError):
    """No id is left that every connected peer could be told of safely."""


class NoSuchDevice(IvshmemError, LookupError):
    """This machine has no such ivshmem device, or several and none was named."""


class NoInterrupts(IvshmemError):
    """A device without interrupts: a plain one, or one opened in a way that has none."""


class DeviceGone(IvshmemError, ConnectionError):
    """The device was unplugged; the kernel waits until it is closed here."""


class ClosedError(IvshmemError, ValueError):
    """The object is closed."""


class ServerFailed(ClosedError):
    """The thread that `Server.start` made ended by an error, and closed the server.

    `__cause__` is that error; `Server.error` has it, too.
    """


class ChannelError(IvshmemError):
    """A channel cannot do that now: all slots of a role are taken, or all loans are out."""


class NoChannels(ChannelError, LookupError):
    """The region has no room for channels, or of a version that is not known here."""


class NoSuchChannel(ChannelError, LookupError):
    """No channel has that name."""


class ChannelExists(ChannelError):
    """A channel of that name is there already."""


class ChannelTypeError(ChannelError, TypeError):
    """A channel is of another kind, or its messages are of another type; the message shows both."""


class MessageTooLong(ChannelError, ValueError):
    """A message is longer than the channel's limit, or than the buffer for it."""


class MessagesLost(ChannelError):
    """A reader that blocks was silent, and writers continued without it.

    `count` is how many messages of one writer it lost.
    """

    def __init__(self, message: str, count: int = 0) -> None:
        super().__init__(message)
        self.count = count


class Overtaken(ChannelError):
    """The writer overwrote a message while it was looked at: what was seen may be torn."""


class Redelivered(ChannelError):
    """This process was silent while it had a message of a queue: another reader has it, too."""


class CallFailed(ChannelError):
    """A call got no reply; the message says why."""


class ServerLost(CallFailed):
    """The server that had begun with a call is gone. Whether it did the work is not known."""


class ChannelCorrupt(ChannelError):
    """A shared word is impossible; the message names it, and whose place it belongs to. Any process
    that can write may have spoiled it. The channel's other slots are not affected.
    """


class ConfigError(IvshmemError, ValueError):
    """A configuration that cannot be served; nothing was changed."""


class ControlError(IvshmemError):
    """A running server refused a request at its control socket; the message says why.

    `code` is a word for programs (docs/reference/control-protocol.md lists them). It is "" where a
    server of an older version refused, or where the client itself found the fault. Newer servers
    may have more codes.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class MetricsError(IvshmemError):
    """Metrics were asked for, and this process cannot serve them."""


class JournalError(IvshmemError):
    """A journal that is damaged, or of another version; the message says which."""


class HandoverError(IvshmemError):
    """A service was not handed over: the old process keeps serving."""


class Misshapen(IvshmemError, ValueError):
    """JSON of the wrong form; the message says where, and what was seen."""


class QmpError(IvshmemError):
    """QEMU refused a command, does not answer, or is gone; the message says which, and why.

    `kind` is QEMU's error class ("GenericError", ..), "" if it did not refuse.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(plain(message))
        self.kind = kind


class WrongAnswer(QmpError):
    """A reply lacks a value, or has one of another type: no QEMU that we know sends it."""


class QemuGone(QmpError):
    """The connection to QEMU ended: QEMU ended, or what it sent was not QMP."""


class MigrationError(IvshmemError):
    """A migration that did not come about; the message says how things stand now, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))  # parts of it are QEMU's own words


class MigrationRefused(MigrationError):
    """It would not work: nothing was touched. `reasons` has all that were found, a line each."""

    def __init__(self, reasons: Sequence[str]) -> None:
        more = f" (and {len(reasons) - 1} more: see --dry-run)" if len(reasons) > 1 else ""
        super().__init__(f"{reasons[0]}{more}")
        self.reasons = tuple(map(plain, reasons))


class StepFailed(MigrationError):
    """One step of a migration failed."""


class UnplugPending(StepFailed):
    """A guest was asked to release a device and has not done so; it still may."""


class UnplugRefused(StepFailed):
    """QEMU did not even ask the guest to release a device."""


class MigrationFailed(MigrationError):
    """The migration failed; the group runs at the source as before."""


class MigrationUnfinished(MigrationError):
    """A migration stands still, and can be finished: see `migration.resume`.

    Attributes:
        step: the step at which it stands, in words ("migrate web").
        vm: the name of the VM that the step is about, "" if it is about none.
        path: the file that holds the state.
    """

    def __init__(self, message: str, step: str, vm: str, path: str) -> None:
        super().__init__(message)
        self.step = step
        self.vm = vm
        self.path = path


class AlreadyMigrated(MigrationError):
    """A migration that was to be undone has completed; or not `wholly`: the guest has gone."""

    def __init__(self, message: str, *, wholly: bool = True) -> None:
        super().__init__(message)
        self.wholly = wholly


class NoAnswer(IvshmemError):
    """The peer does not answer, or stopped answering."""


class CommandError(IvshmemError, ValueError):
    """A command of `ivshmem connect` that cannot be carried out as it stands."""


class WorkerFailed(RuntimeError):
    """One of the two processes of a measurement ended, or got stuck."""


class VfioUnusable(OSError):
    """vfio cannot give this device to any process, as this machine is set up."""


class GroupHeld(OSError):
    """Another process has the vfio group open."""


class WrongKind(OSError):
    """A path leads to something else than a regular file."""


class WrongKindDirectory(WrongKind, IsADirectoryError):
    """The path leads to a directory."""
