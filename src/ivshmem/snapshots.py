"""What a service says of itself to a successor, checked before anything is done with it.

Knows: the layout of a snapshot, what its descriptors must be. Does not know: where it comes from.

A snapshot is {"next": number, "service": {setting: value}, "regions": [[RECORD, STATE], ..]}: see
Service.snapshot, Served.record and replay.snapshot.

Invariants:
1. A snapshot that passes `check` can be resumed: its types are right, and a rehearsal of it on a
   roster succeeded.
2. What `examine` lets through is what the snapshot says that it is: a listening socket is bound to
   the region's path, a connection is one, an eventfd is one.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from . import shapes, sockets
from .config import EXISTING, LOG_FORMATS, ServiceConfig, from_json
from .errors import IvshmemError
from .protocol import MAX_VECTORS, Roster
from .region import Source, posix_path
from .replay import replay
from .shapes import Misshapen

_MOST_FDS = 1 << 20

_FD = shapes.integer(0, (1 << 31) - 1)
_WORD = shapes.optional(shapes.text())
_WHO = shapes.optional(shapes.either(shapes.integer(0, (1 << 32) - 2), shapes.text()))
_LIMIT = shapes.optional(shapes.integer(1))
_RULES = shapes.array(shapes.text())

_CONFIG = shapes.record(
    {
        "size": shapes.optional(shapes.either(shapes.integer(0), shapes.text())),
        "vectors": shapes.integer(0, MAX_VECTORS),
        **dict.fromkeys(("name", "file", "directory"), _WORD),
        "hugepages": shapes.either(shapes.flag(), shapes.text()),
        **dict.fromkeys(("prealloc", "readonly", "keep", "hold_leaves"), shapes.flag()),
        "existing": shapes.text(*EXISTING),
        "names": shapes.optional(shapes.integer(0)),
        "mode": shapes.optional(shapes.integer(0, 0o777)),
        **dict.fromkeys(("owner", "group"), _WHO),
        **dict.fromkeys(("allow", "deny", "readonly_for"), _RULES),
        **dict.fromkeys(("peers_per_uid", "joins_per_minute"), _LIMIT),
    },
    socket=shapes.text(),
)
_RECORD = shapes.tuple_of(
    shapes.integer(1),
    shapes.text(),
    _CONFIG,
    _FD,
    shapes.flag(),
    _FD,
    shapes.text(*get_args(Source)),
    _WORD,
    shapes.flag(),
    shapes.optional(shapes.tuple_of(shapes.integer(0), shapes.integer(0))),
)
_MEMBER = shapes.begins_with(_FD, shapes.array(_FD, MAX_VECTORS), shapes.moment(), shapes.flag())
_STATE = shapes.record(
    {
        "counts": shapes.table(shapes.integer(0)),
        "muted_for": shapes.table(shapes.optional(shapes.number(0, 1e6)), key=shapes.digits()),
    },
    roster=shapes.record(),
    held=shapes.table(_MEMBER, key=shapes.digits()),
)
_SNAPSHOT = shapes.record(
    next=shapes.integer(1),
    service=shapes.record(
        {
            "control": _WORD,
            "metrics": _WORD,
            "source": _WORD,
            "log_format": shapes.text(*LOG_FORMATS),
        }
    ),
    regions=shapes.array(shapes.tuple_of(_RECORD, _STATE)),
)


class RegionRecord(NamedTuple):
    """What a snapshot says of a region, beside its peers: Served.record less its first word."""

    number: int
    name: str
    config: Mapping[str, Any]
    listener: int
    unlinks: bool
    memory: int
    source: Source
    source_name: str | None
    created: bool
    file: tuple[int, int] | None


def check(snapshot: Any) -> None:
    """Check a snapshot whole.

    Raises:
        Misshapen: a successor cannot resume it; the message says what is wrong.
    """
    _SNAPSHOT(snapshot, "state")
    _check_meaning(snapshot)


def _check_meaning(snapshot: Mapping[str, Any]) -> None:
    """Check what types do not say; for that, do with a roster what a successor would do."""
    ServiceConfig.from_json({"regions": {}, **snapshot["service"]})
    names = set()
    for number, (record, state) in enumerate(snapshot["regions"]):
        region, where = RegionRecord(*record), f"state.regions[{number}]"
        if region.name in names:
            raise Misshapen(f"{where} is a second region {shapes.shown(region.name)}")
        names.add(region.name)
        config = from_json(region.config)
        roster = Roster(config.vectors, (), ())
        try:
            if region.source == "posix":
                posix_path(region.source_name or "")
            replay(roster, state, (), None)
            held = {int(serial) for serial in state["held"]}
            if held != {member.serial for member in roster.members}:
                raise Misshapen(f"{where}: its peers and their descriptors do not match")
        except Misshapen:
            raise
        # The roster's own state has no types here, so what does not fit is one of these.
        except (IvshmemError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise Misshapen(f"{where} makes no sense ({shapes.shown(str(error))})") from None
    named = list(descriptors(snapshot))
    if len(named) != len(set(named)):
        raise Misshapen("state names one descriptor twice")


def descriptors(snapshot: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of all descriptors that a snapshot names."""
    for record, state in snapshot["regions"]:
        region = RegionRecord(*record)
        yield from (region.listener, region.memory)
        for fd, fds, *_ in state["held"].values():
            yield fd
            yield from fds


def examine(snapshot: Mapping[str, Any], found: Mapping[int, int]) -> None:
    """Look at the descriptors themselves, which `found` has by the numbers of the snapshot.

    Raises:
        Misshapen: one is missing, or is not what the snapshot says.
    """
    if missing := set(descriptors(snapshot)) - set(found):
        raise Misshapen(f"{len(missing)} of the descriptors that the state names did not come")
    for record, state in snapshot["regions"]:
        region = RegionRecord(*record)
        whose = f"region {shapes.shown(region.name)}"
        _examine_listener(found[region.listener], region.config["socket"], whose)
        if not stat.S_ISREG(os.fstat(found[region.memory]).st_mode):
            raise Misshapen(f"{whose}: its memory is not a file")
        for fd, fds, *_ in state["held"].values():
            if not sockets.is_connection(found[fd]):
                raise Misshapen(f"{whose}: a peer's connection is not a connected Unix socket")
            for each in fds:
                # The kernel's name for it; there is no system call that asks.
                if os.readlink(f"/proc/self/fd/{found[each]}") != "anon_inode:[eventfd]":
                    raise Misshapen(f"{whose}: a peer's doorbell is not an eventfd")


def _examine_listener(fd: int, path: str, whose: str) -> None:
    """Check that `fd` listens at `path`, and that root or our user made it do so."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        raise Misshapen(f"{whose}: its socket is not a socket") from None
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise Misshapen(f"{whose}: its socket is not a Unix stream socket")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise Misshapen(f"{whose}: its socket does not listen")
        bound = sock.getsockname()
        # An abstract address, or a socket without one: a service manager passed it.
        named = isinstance(bound, str) and bound.startswith("/")
        if named and os.path.realpath(bound) != os.path.realpath(path):
            raise Misshapen(
                f"{whose}: its socket is bound to {shapes.shown(bound)}, not to"
                f" {shapes.shown(path)}"
            )
        uid = sockets.credentials(sock).uid
        if uid not in {0, os.geteuid()}:
            raise Misshapen(f"{whose}: its socket was made by uid {uid}")
    except OSError as error:
        raise Misshapen(f"{whose}: its socket cannot be examined ({error})") from None
    finally:
        sock.detach()
