"""The control socket: the requests to a running server, and the server's answers.

Knows: the requests, their codes of errors, which users are answered. Does not know: how a server
does its work, what a status has (status.py), how connections are bounded (RequestServer does).

docs/reference/control-protocol.md describes the protocol: each request, code and field.

Invariants:
1. A request is checked whole before anything is done.
2. Whatever a caller sends, and whatever fails on its behalf, the server continues.
3. The server answers only root and its own user, by SO_PEERCRED, whatever mode the socket has.
4. A reply has the fields and types that the page lists; `control_client.REPLIES` checks that.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from .. import __version__
from ..errors import (
    ClosedError,
    ControlError,
    IvshmemError,
    Misshapen,
    NoSuchPeer,
)
from ..server import log_events
from ..server.limits import LINGER, LONGEST_LINGER
from ..system import credentials, json_shapes, late_logging
from ..system.listener import Listener
from ..system.requests import LONGEST, Requester, RequestServer
from ..system.uncopied import Uncopied
from ..text import command, counted, plain
from .control_client import PROTOCOL, as_line
from .status import Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, TypeAlias

    from .status import Reporting

_log = late_logging.log_of("ivshmem.control")
MODE = 0o600
_MOST_ERROR = 500  # characters of an error


# -- what is asked: a service, which serves regions -----------------------------------------------

if TYPE_CHECKING:

    class Inspectable(Reporting, Protocol):
        """What is asked of a Server."""

        def evict(self, peer_id: int) -> None: ...
        def hold_leaves(self, holds: bool) -> None: ...
        def hold(
            self, peer_id: int, *, linger: float | None = ..., asker: object | None = ...
        ) -> bool: ...
        def release(self, peer_id: int) -> bool: ...
        def asker_is_gone(self, asker: object) -> None: ...

    class ControlledRegion(Protocol):
        """What is asked of a region that is being served."""

        @property
        def server(self) -> Inspectable: ...
        @property
        def listener(self) -> Listener: ...

    class Regions(Protocol):
        """Whatever serves regions; asked in the thread that makes the steps."""

        @property
        def regions(self) -> Mapping[str, ControlledRegion]: ...

    class ControlledService(Regions, Protocol):
        """The same, with a configuration."""

        @property
        def changing(self) -> bool: ...
        def reload(self) -> Sequence[str] | None:
            """Read the configuration again; what has changed, a line each."""

    # What does one kind of request: the reply but for "ok", or None: the connection was detached.
    Handler: TypeAlias = Callable[[Requester, Mapping[str, Any]], Mapping[str, Any] | None]


# -- the server's side ----------------------------------------------------------------------------


class Control(Uncopied):
    """Answers requests to a service on a listener; a context manager.

    Args:
        listener: bound and, best, of mode MODE (see `listen`); closed with this object.
        handlers: more kinds of requests, or others for known ones, by the word after "do".
        uids: the users who are answered; None: root and this process's.

    The loop that serves the regions calls `step()` when `fileno()` is readable.
    """

    def __init__(
        self,
        listener: Listener,
        service: ControlledService,
        *,
        handlers: Mapping[str, Handler] | None = None,
        uids: frozenset[int] | None = None,
    ) -> None:
        self._service = service
        self._uids = frozenset({0, os.geteuid()}) if uids is None else uids
        self._state = Status()
        # Who has asked to hold back which peers' messages, and is still connected.
        self._askers: dict[Requester, set[tuple[str, int]]] = {}
        self._handlers: dict[str, Handler] = {
            "version": self._version,
            "status": self._status,
            "evict": self._evict,
            "hold-leaves": self._hold_leaves,
            "hold": self._hold,
            "release": self._release,
            "free-places": self._free_places,
            "reload": self._reload,
            **(handlers or {}),
        }
        self.listener = listener
        self.path = listener.path
        try:
            self._answering = RequestServer(
                listener.socket,
                _cut_line,
                self._answer,
                too_long=as_line(
                    _refusal(f"a request has at most {LONGEST} bytes: send less", "bad-request")
                ),
                admit=self._admit,
            )
            listener.listen()
        except BaseException:
            listener.close()
            raise

    def fileno(self) -> int:
        """Readable when `step()` has something to do."""
        return self._answering.fileno()

    def step(self) -> None:
        """Do what there is to do, without waiting."""
        self._answering.step()

    def close(self) -> None:
        """Disconnect everybody and remove the socket; may be called twice."""
        self._answering.close()
        self.listener.close()

    def bind_again(self) -> None:
        """Bind the socket's path, which leads elsewhere, to this socket again.

        Raises:
            OSError: as of Listener.bind_again; nothing has changed.
        """
        self._answering.relisten(partial(self.listener.bind_again, mode=MODE))

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _admit(self, sock: socket.socket) -> bytes | None:
        uid = credentials.credentials(sock).uid
        if uid in self._uids:
            return None
        heard = " and ".join(map(str, sorted(self._uids)))
        reason = f"uid {uid} is not answered here, only uid {heard}: ask as one of these users"
        return as_line(_refusal(reason, "not-allowed"))

    def _answer(self, caller: Requester, request: bytes) -> bytes | None:
        try:
            message = _parse(request)
            kind = message.get("do")
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                raise ControlError(
                    f'"do" is {_shown(kind)}: known are {", ".join(self._handlers)}',
                    "unknown-request",
                )
            reply = handler(caller, message)
            return None if reply is None else as_line({"ok": True, **reply})
        except (ControlError, OSError) as error:
            return as_line(_refusal(_one_line(error), getattr(error, "code", "system")))
        except Exception as error:
            _log.exception("a request to the control socket failed")
            reason = f"the server has an error, and logged it: {_one_line(error)}"
            return as_line(_refusal(reason, "internal"))

    # -- requests ---------------------------------------------------------------------------------

    def _version(self, _: Requester, __: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"version": __version__, "protocol": PROTOCOL, "pid": os.getpid()}

    def _status(self, _: Requester, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peers = message.get("peers", True)
        if not isinstance(peers, bool):
            raise ControlError(f'"peers" is {_shown(peers)}: expected true or false', "bad-field")
        regions = self._service.regions
        if message.get("region") is not None:
            name, served = self._named(message)
            regions = {name: served}
        status = self._state
        shown = [status.of_region(name, each, peers=peers) for name, each in regions.items()]
        status.forget_all_but(each.server.region for each in self._service.regions.values())
        return {"server": status.of_process(), "regions": shown}

    def _evict(self, caller: Requester, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peer = _id(message)
        name, served = self._named(message)
        with self._known(name):
            served.server.evict(peer)
        by = _who(caller)
        told = log_events.fields("evicted", peer=peer, region=name, **by)
        _log.info(
            "peer %d of %s was evicted, as uid %d asked", peer, name, by["by_uid"], extra=told
        )
        return {"region": name}

    def _hold_leaves(self, caller: Requester, message: Mapping[str, Any]) -> Mapping[str, Any]:
        on = message.get("on")
        if not isinstance(on, bool):
            raise ControlError(f'"on" is {_shown(on)}: expected true or false', "bad-field")
        name, served = self._named(message)
        served.server.hold_leaves(on)
        by = _who(caller)
        told = log_events.fields("held", on=on, region=name, **by)
        what = "is told of no leaves" if on else "is told of leaves if it connects later"
        _log.info("QEMU %s of %s, as uid %d asked", what, name, by["by_uid"], extra=told)
        return {"region": name}

    def _hold(self, caller: Requester, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peer, linger = _id(message), message.get("linger", LINGER)
        number = isinstance(linger, int | float) and not isinstance(linger, bool)
        if linger is not None and not (number and 0 < linger <= LONGEST_LINGER):
            raise ControlError(
                f'"linger" is {_shown(linger)}: allowed are more than 0 and at most'
                f" {LONGEST_LINGER:g} seconds, or null for no limit",
                "bad-field",
            )
        name, served = self._named(message)
        with self._known(name):
            seconds = None if linger is None else float(linger)
            read = served.server.hold(peer, linger=seconds, asker=caller)
        caller.at_end = functools.partial(self._asker_is_gone, caller)
        asked = self._askers.setdefault(caller, set())
        if (name, peer) not in asked:  # it does not ask again whether all was read
            asked.add((name, peer))
            by = _who(caller)
            told = log_events.fields("holding", peer=peer, region=name, linger=linger, **by)
            by_uid = by["by_uid"]
            _log.info(
                "messages to peer %d of %s are held back, as uid %d asked",
                *(peer, name, by_uid),
                extra=told,
            )
        return {"region": name, "read": read}

    def _release(self, caller: Requester, message: Mapping[str, Any]) -> Mapping[str, Any]:
        peer = _id(message)
        name, served = self._named(message)
        with self._known(name):
            held = served.server.release(peer)
        if held:
            by = _who(caller)
            told = log_events.fields("released", peer=peer, region=name, **by)
            by_uid = by["by_uid"]
            _log.info(
                "messages to peer %d of %s are sent again, as uid %d asked",
                *(peer, name, by_uid),
                extra=told,
            )
        return {"region": name, "held": held}

    def _free_places(self, caller: Requester, message: Mapping[str, Any]) -> Mapping[str, Any]:
        from ..memory import left_places  # here: few servers are asked for it

        name, served = self._named(message)
        freed = left_places.free_places(served.server.region)
        by = _who(caller)
        told = log_events.fields("freed", places=freed, region=name, **by)
        by_uid = by["by_uid"]
        _log.info(
            "%s of channels in %s freed, as uid %d asked",
            *(counted(freed, "place"), name, by_uid),
            extra=told,
        )
        return {"region": name, "freed": freed}

    def _asker_is_gone(self, caller: Requester) -> None:
        self._askers.pop(caller, None)
        for served in list(self._service.regions.values()):
            with contextlib.suppress(ClosedError):
                served.server.asker_is_gone(caller)

    def _reload(self, caller: Requester, _: Mapping[str, Any]) -> Mapping[str, Any]:
        by = _who(caller)
        try:
            if self._service.changing:
                reason = "another change is under way: ask again when it is done"
                raise ControlError(reason, "busy")
            changes = list(self._service.reload() or ())
        except (IvshmemError, OSError, ValueError) as error:
            reason = _one_line(error)
            told = log_events.fields("unreloaded", reason=reason, **by)
            _log.warning("nothing was reloaded: %s", reason, extra=told)
            if isinstance(error, ValueError) and not isinstance(error, ClosedError):
                # Of the configuration, or of a region that it names.
                raise ControlError(reason, "bad-config") from error
            raise
        told = log_events.fields("reloaded", changes=changes, **by)
        _log.info("reloaded: %s", "; ".join(changes) or "nothing has changed", extra=told)
        return {"changes": changes}

    def _named(self, message: Mapping[str, Any]) -> tuple[str, ControlledRegion]:
        """The region that a message means."""
        regions = self._service.regions
        name = message.get("region")
        if name is None and len(regions) == 1:
            name = next(iter(regions))
        if isinstance(name, str) and name in regions:
            return name, regions[name]
        known = ", ".join(regions) or "none"
        if name is None:
            raise ControlError(
                f'which region is meant? "region" (--region NAME) has to be one of {known}',
                "region-needed",
            )
        reason = f"no region {_shown(name)} is served here: there are {known}"
        raise ControlError(reason, "no-such-region")

    @contextlib.contextmanager
    def _known(self, name: str) -> Iterator[None]:
        """Add the region to the error for a peer that is not connected."""
        try:
            yield
        except NoSuchPeer as error:
            listing = command(["ivshmem", "status", "--control", os.path.abspath(self.path)])
            reason = f"region {name}: {error} (`{listing}` lists who is)"
            raise ControlError(reason, "no-such-peer") from None


def listen(path: str | os.PathLike[str]) -> Listener:
    """A listener for a Control: nobody but this user may connect to it, from the beginning.

    Raises:
        OSError: as of Listener; ENAMETOOLONG for the default of a long socket path.
    """
    return Listener(path, mode=MODE)


def _cut_line(buffer: bytearray) -> bytes | None:
    end = buffer.find(b"\n")
    if end < 0:
        return None
    line = bytes(buffer[:end])
    del buffer[: end + 1]
    return line


def _parse(request: bytes) -> dict[str, Any]:
    try:
        message = json_shapes.loads(request)
    except Misshapen as error:
        reason = f'no JSON ({_one_line(error)}): send {{"do": "status"}}'
        raise ControlError(reason, "bad-request") from None
    if not isinstance(message, dict):
        reason = f'{_shown(message)} is not a JSON object: send {{"do": "status"}}'
        raise ControlError(reason, "bad-request")
    return message


def _id(message: Mapping[str, Any]) -> int:
    peer = message.get("id")
    if not isinstance(peer, int) or isinstance(peer, bool):
        raise ControlError(f'"id" is {_shown(peer)}: expected the number of a peer', "bad-field")
    return peer


def _refusal(error: str, code: str) -> dict[str, Any]:
    return {"ok": False, "error": error[:_MOST_ERROR], "code": code}


def _shown(value: object) -> str:
    """What was sent, short."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a number of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}.."


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return plain(text)


def _who(caller: Requester) -> dict[str, Any]:
    who = credentials.credentials(caller.socket)
    return {"by_uid": who.uid, "by_pid": who.pid}
