"""The exceptions of this package, and whose fault each one is.

    IvshmemError
     +-- ProtocolError                what the other end sent is not protocol version 0
     +-- ServerGone (ConnectionError) the server ended the connection before set-up was complete
     +-- RegionError (ValueError)     a size or a source that cannot be shared memory
     +-- ImageError (ValueError)      a saved region that is damaged, or does not fit
     +-- NoSuchPeer (LookupError)     nobody with that id is connected
     +-- NoSuchVector (LookupError)   that peer, or this endpoint, has no such vector
     +-- NoDirectory (LookupError)    the region has no directory of names
     +-- NoSuchName (LookupError)     nobody has published that name
     +-- NameTaken                    somebody else has published that name, and lives
     +-- DirectoryFull                every slot of the directory has an entry of the living
     +-- NoFreeId                     every id is taken, or known to somebody who is connected
     +-- NoSuchDevice (LookupError)   no ivshmem device there, or several and none named
     +-- NoInterrupts                 the way a device was opened, or its variant, has none
     +-- DeviceGone (ConnectionError) the device was unplugged while it was in use
     +-- ClosedError (ValueError)     the object was closed before, or while, it was used
          +-- ServerFailed            the thread of Server.start ended by an error: its __cause__

What the operating system refuses stays a plain OSError, with its path in `filename`; a time limit
that ran out before an object existed is the built-in TimeoutError.
"""

__all__ = [
    "ClosedError",
    "DeviceGone",
    "DirectoryFull",
    "ImageError",
    "IvshmemError",
    "NameTaken",
    "NoDirectory",
    "NoFreeId",
    "NoInterrupts",
    "NoSuchDevice",
    "NoSuchName",
    "NoSuchPeer",
    "NoSuchVector",
    "ProtocolError",
    "RegionError",
    "ServerFailed",
    "ServerGone",
]


def reason_of(error: OSError) -> str:
    """Say what the operating system refuses, without the number that str() puts before it."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason[:1].lower()}{reason[1:]}"


class IvshmemError(Exception):
    """The root: catches whatever this package raises of its own."""


class ProtocolError(IvshmemError):
    """The other end sent what protocol version 0 does not allow; the connection is over."""


class ServerGone(IvshmemError, ConnectionError):
    """The server ended the connection before set-up was complete."""


class RegionError(IvshmemError, ValueError):
    """A size or a source that cannot be a shared memory region."""


class ImageError(IvshmemError, ValueError):
    """A file that holds no region, or not whole, or not one that fits."""


class NoSuchPeer(IvshmemError, LookupError):
    """Nobody with that id is connected, as far as the server has told."""


class NoSuchVector(IvshmemError, LookupError):
    """A vector number outside 0..vectors-1."""


class NoDirectory(IvshmemError, LookupError):
    """The region has no directory of names, or one of a version that is not known here."""


class NoSuchName(IvshmemError, LookupError):
    """Nobody who is alive has published that name."""


class NameTaken(IvshmemError):
    """Somebody else who is alive has published that name."""


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
