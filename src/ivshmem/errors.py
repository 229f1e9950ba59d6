"""The exceptions of this package, and whose fault each one is.

    IvshmemError
     +-- ProtocolError                what the other end sent is not protocol version 0
     +-- ServerGone (ConnectionError) the server ended the connection before set-up was complete
     +-- RegionError (ValueError)     a size or a source that cannot be shared memory
     +-- NoSuchPeer (LookupError)     nobody with that id is connected
     +-- NoSuchVector (LookupError)   that peer, or this endpoint, has no such vector
     +-- NoFreeId                     every id is taken, or known to somebody who is connected
     +-- ClosedError (ValueError)     the object was closed before, or while, it was used

What the operating system refuses stays a plain OSError, with its path in `filename`; a time limit
that ran out before an object existed is the built-in TimeoutError.
"""

__all__ = [
    "ClosedError",
    "IvshmemError",
    "NoFreeId",
    "NoSuchPeer",
    "NoSuchVector",
    "ProtocolError",
    "RegionError",
    "ServerGone",
]


class IvshmemError(Exception):
    """The root: catches whatever this package raises of its own."""


class ProtocolError(IvshmemError):
    """The other end sent what protocol version 0 does not allow; the connection is over."""


class ServerGone(IvshmemError, ConnectionError):
    """The server ended the connection before set-up was complete."""


class RegionError(IvshmemError, ValueError):
    """A size or a source that cannot be a shared memory region."""


class NoSuchPeer(IvshmemError, LookupError):
    """Nobody with that id is connected, as far as the server has told."""


class NoSuchVector(IvshmemError, LookupError):
    """A vector number outside 0..vectors-1."""


class NoFreeId(IvshmemError):
    """No id is left that every connected peer could be told of safely."""


class ClosedError(IvshmemError, ValueError):
    """The object is closed."""
