"""What a service manager is told, and what it hands over: sd_notify(3), sd_listen_fds(3).

Knows: systemd's protocols for a service and its fd store, with no library of systemd's. Does not
know: servers.

Invariants:
1. What the manager passed in the environment is taken out of it: a child would take it for its own.
2. No call waits longer than it says, whatever the manager does; without one, all calls do nothing.
3. The socket is there from the start: with no descriptor left, the watchdog must still be told.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from ..errors import reason_of
from ..text import counted, plain
from . import late_logging
from .time_limits import left_until
from .uncopied import Uncopied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_log = late_logging.log_of("ivshmem.system")

# To a service manager: do not try again (RestartPreventExitStatus=). EX_CONFIG of sysexits(3).
EXIT_FIRST_START = 78

_FIRST = 3  # the first descriptor passed, SD_LISTEN_FDS_START
_MOST = 253  # descriptors in a message, SCM_MAX_FD
_MAX_NAME = 255
_MAX_STATUS = 1024  # a line for a person; the manager takes 4096 bytes a message

# The socket's queue is full (EAGAIN), or too many descriptors are on their way, or there is no
# memory for the message: all of them pass when the manager reads.
_LATER = {errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM}
_PAUSE = 0.02  # seconds between tries where nothing can be waited for


def listen_fds(environ: MutableMapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """The descriptors that the service manager passed, with their names.

    These are the sockets of socket units, by FileDescriptorName= (the unit's name unless it is
    given), and what the service has put into the fd store. They are the caller's, close-on-exec. To
    be called once, by the process that the manager started: a second call finds nothing.

    Raises:
        ValueError: LISTEN_FDS is no number, or LISTEN_FDNAMES has another number of names.
        OSError: EBADF, a descriptor that was announced is not there.
    """
    pid, number, names = (
        environ.pop(key, None) for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()) or number is None:
        return []  # meant for a parent, or for nobody
    if not (number.isascii() and number.isdigit()):
        raise ValueError(
            f"LISTEN_FDS={number!r} is not a number of descriptors: which program set it?"
        )
    fds = range(_FIRST, _FIRST + int(number))
    named = ["unknown"] * len(fds) if names is None else names.split(":") if fds else []
    if len(named) != len(fds):
        raise ValueError(
            f"LISTEN_FDNAMES has {counted(len(named), 'name')} for"
            f" {counted(len(fds), 'descriptor')}: who set it?"
        )
    for fd in fds:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        except OSError as error:
            raise OSError(
                error.errno, f"LISTEN_FDS={number}, but descriptor {fd} is not open: who set it?"
            ) from None
    return list(zip(named, fds, strict=True))


def address(environ: Mapping[str, str] = os.environ) -> str | None:
    """Where the service manager listens, as the environment says; None: there is none."""
    return environ.get("NOTIFY_SOCKET") or None


def unit_words(words: Sequence[str]) -> str:
    """Words as a unit has them in ExecStart=, see systemd.service(5)."""
    return " ".join(map(_unit_word, words))


def _unit_word(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    special = any(character.isspace() or character in "\"'\\;" for character in word)
    return f'"{escaped}"' if special else escaped


def check_name(name: str) -> str:
    """`name`, if stored descriptors can have it.

    Raises:
        ValueError: it is longer than 255 characters, or not of printable ASCII, or has a colon.
    """
    if len(name) > _MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters: at most {_MAX_NAME} are allowed")
    if not name.isascii() or not name.isprintable() or ":" in name:
        raise ValueError(f"the name {name!r}: allowed is printable ASCII without a colon")
    return name


def _warn(text: str) -> None:
    _log.warning("%s", text)


class Notifier(Uncopied):
    """Tells the service manager how the service is, and stores descriptors there.

    Without an address it does nothing. A message that cannot be sent at once is tried again as long
    as each method says; those that return a bool say whether it was sent. Sent does not mean
    accepted: the manager does not answer. To be used from one thread at a time.

    Args:
        address: of the manager's socket, a path, or an abstract address with @ for its zero byte.
        watchdog_seconds: the service is dead to the manager when `watchdog()` is not called for so
            long; to be called at least twice in that time. None: nobody waits for it.

    Attributes:
        gone: whether its socket has no owner any more; one that comes later has another.

    Raises:
        OSError: as of connect(2), with the address.
    """

    def __init__(self, address: str | None, *, watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self.gone = False
        self._socket: socket.socket | None = None
        if address is None:
            return
        if not address.startswith(("/", "@")):
            raise OSError(
                errno.EAFNOSUPPORT, "NOTIFY_SOCKET is neither a path nor abstract", address
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            # Connected, or poll(2) would not see whether the manager's queue is full.
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, error.strerror, address) from None
        self._socket = sock

    @classmethod
    def from_environment(
        cls,
        environ: MutableMapping[str, str] = os.environ,
        warn: Callable[[str], object] = _warn,
    ) -> Notifier:
        """As NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say.

        An address where nobody is gives one that does nothing, and a warning in the log: the
        variable can come from far above, and be meant for somebody in another container.

        Args:
            warn: takes the warning in the log's place.
        """
        address = environ.pop("NOTIFY_SOCKET", None) or None
        watchdog = _watchdog_seconds(environ)
        try:
            return cls(address, watchdog_seconds=watchdog)
        except OSError as error:
            text = f"the service manager cannot be told anything: {address}: {reason_of(error)}"
            warn(text)
            return cls(None)

    @property
    def active(self) -> bool:
        """Whether there is anybody to tell."""
        return self._socket is not None

    # -- how the service is -----------------------------------------------------------------------

    def ready(self, status: str | None = None) -> bool:
        """Started, or reloaded. Waits up to 5 seconds for the manager to read."""
        return self._tell({"READY": 1, **_status(status)}, 5.0)

    def status(self, text: str) -> bool:
        """One line for `systemctl status`. Does not wait."""
        return self._tell(_status(text), 0.0)

    def reloading(self, status: str | None = None) -> bool:
        """Begun to reload, `ready` follows. Waits up to 5 seconds."""
        # A unit of Type=notify-reload tells by the time whether it is this reload that is meant.
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        return self._tell({"RELOADING": 1, "MONOTONIC_USEC": now, **_status(status)}, 5.0)

    def stopping(self, status: str | None = None) -> bool:
        """Begun to end. Waits up to half a second."""
        return self._tell({"STOPPING": 1, **_status(status)}, 0.5)

    def main_pid(self, pid: int) -> bool:
        """`pid` is the main process now: its end is the service's end. Waits up to 5 seconds."""
        return self._tell({"MAINPID": pid}, 5.0)

    def watchdog(self) -> bool:
        """Still alive. Does not wait: the next one comes soon."""
        return self._tell({"WATCHDOG": 1}, 0.0)

    # -- the fd store -----------------------------------------------------------------------------

    def store(
        self, name: str, fds: Sequence[int], *, poll: bool = False, timeout: float = 1.0
    ) -> int:
        """Have the manager keep duplicates, which `listen_fds` gives to the service's next process.

        The manager returns the descriptors of one call in any order (systemd 252 has them in a hash
        set). It returns the groups of several calls in the order of the calls, or in reverse.

        Args:
            name: what `listen_fds` calls them, see `check_name`.
            poll: let the manager drop a descriptor when it sees a hangup or an error on it.
            timeout: in seconds, for all of them together.

        Returns:
            How many of them, the first ones, were sent. Fewer than all: time has run out.

        Raises:
            ValueError: a name that is not allowed.
            OSError: EBADF and the like; an unknown number of the first ones was sent.
        """
        check_name(name)
        fields: dict[str, object] = {"FDSTORE": 1, "FDNAME": name}
        if not poll:
            fields["FDPOLL"] = 0
        deadline = time.monotonic() + timeout
        for start in range(0, len(fds), _MOST):
            part = fds[start : start + _MOST]
            if not self._tell(fields, deadline - time.monotonic(), part):
                return start
        return len(fds)

    def drop(self, name: str, *, timeout: float = 1.0) -> bool:
        """Have the manager close all stored descriptors of that name.

        Raises:
            ValueError: a name that is not allowed.
        """
        return self._tell({"FDSTOREREMOVE": 1, "FDNAME": check_name(name)}, timeout)

    def barrier(self, timeout: float) -> bool:
        """Wait until the manager has acted on all that was sent before; False: time has run out.

        True at once where there is nobody to tell.

        Raises:
            OSError: EMFILE and the like: it takes two descriptors.
        """
        if self._socket is None:
            return True
        deadline = time.monotonic() + timeout
        near, far = os.pipe()
        try:
            try:
                sent = self._tell({"BARRIER": 1}, timeout, [far])
            finally:
                os.close(far)
            # The manager closes its copy when the message's turn has come: then it hangs up.
            return sent and _poll(near, 0, deadline)
        finally:
            os.close(near)

    # -- sending ----------------------------------------------------------------------------------

    def _tell(self, fields: Mapping[str, object], timeout: float, fds: Sequence[int] = ()) -> bool:
        if self._socket is None:
            return True
        data = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
        deadline = time.monotonic() + timeout
        while True:
            try:
                socket.send_fds(self._socket, [data], fds, socket.MSG_NOSIGNAL)
                return True
            except OSError as error:
                if error.errno in (errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE):
                    self.gone = True
                    return False
                if error.errno not in _LATER:
                    raise
                full = error.errno == errno.EAGAIN
            if not self._wait(full, deadline):
                return False

    def _wait(self, full: bool, deadline: float) -> bool:
        """Wait for a reason to try again; False if there is no time left for it."""
        assert self._socket is not None
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if full:
            return _poll(self._socket.fileno(), select.POLLOUT, deadline)
        # No event tells when descriptors arrive, and a barrier, which carries one, is refused, too.
        time.sleep(min(_PAUSE, left))
        return True

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Say nothing any more; may be called twice. What is stored stays."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Notifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "_socket", None) is not None:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            self.close()


def _watchdog_seconds(environ: MutableMapping[str, str]) -> float | None:
    microseconds = environ.pop("WATCHDOG_USEC", "")
    pid = environ.pop("WATCHDOG_PID", None)
    if pid not in (None, str(os.getpid())):
        return None  # meant for a parent
    if not (microseconds.isascii() and microseconds.isdigit()):
        return None
    return int(microseconds) / 1e6 or None


def _status(text: str | None) -> dict[str, object]:
    """A line that cannot be taken for several: a newline begins the next field."""
    if text is None:
        return {}
    data = plain(text).encode(errors="replace")[:_MAX_STATUS]
    return {"STATUS": data.decode(errors="ignore")}


def _poll(fd: int, events: int, deadline: float) -> bool:
    """Whether one of the events, or a hangup, comes before the deadline."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(left_until(deadline) * 1000))
