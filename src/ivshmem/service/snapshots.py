"""What a service says of itself to a successor, checked before anything is done with it.

Knows: the layout of a snapshot and of a journal's records, what their descriptors must be. Does not
know: who wrote them.

A snapshot is {"next": number, "service": {setting: value}, "regions": [[RECORD, STATE], ..]}: see
Service.snapshot, Served.record and replay.snapshot. A journal holds a snapshot and the records
since: [0, ..] of the service itself, [NUMBER, ..] of a region's members.

    [0, "service", {setting: value}]
    [0, "region", RECORD..]
    [0, "config", NUMBER, {setting: value}]
    [0, "gone", NUMBER]

Invariants:
1. A snapshot that passes `check`, and a history that passes `rehearse`, can be resumed: the types
   are right, and a rehearsal on a roster succeeded.
2. What `examine` lets through is what the snapshot says that it is: a listening socket is bound to
   the region's path, a connection is one, an eventfd is one.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping

from ..errors import IvshmemError, JournalError, Misshapen, reason_of
from ..lasting.journal import OF_THE_SERVICE, Journal, group
from ..memory.region import posix_path
from ..protocol.limits import MAX_VECTORS
from ..protocol.roster import Roster
from ..server.replay import UnfinishedBatch, replay
from ..system import credentials, json_shapes, sockets
from ..system.named_tuple import NamedTuple
from .config import ServiceConfig, from_json
from .limits import EXISTING, LOG_FORMATS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..lasting.journal import Record
    from ..memory.region import Source
if TYPE_CHECKING:
    from typing import Any

MOST_FDS = 1 << 20

_FD = json_shapes.integer(0, (1 << 31) - 1)
_WORD = json_shapes.optional(json_shapes.text())
_WHO = json_shapes.optional(
    json_shapes.either(json_shapes.integer(0, (1 << 32) - 2), json_shapes.text())
)
_LIMIT = json_shapes.optional(json_shapes.integer(1))
_RULES = json_shapes.array(json_shapes.text())

_CONFIG = json_shapes.record(
    {
        "size": json_shapes.optional(
            json_shapes.either(json_shapes.integer(0), json_shapes.text())
        ),
        "vectors": json_shapes.integer(0, MAX_VECTORS),
        **dict.fromkeys(("name", "file", "directory"), _WORD),
        "hugepages": json_shapes.either(json_shapes.flag(), json_shapes.text()),
        **dict.fromkeys(("prealloc", "readonly", "keep", "hold_leaves"), json_shapes.flag()),
        "existing": json_shapes.text(*EXISTING),
        "names": json_shapes.optional(json_shapes.integer(0)),
        "mode": json_shapes.optional(json_shapes.integer(0, 0o777)),
        **dict.fromkeys(("owner", "group"), _WHO),
        **dict.fromkeys(("allow", "deny", "readonly_for", "accept_owner"), _RULES),
        **dict.fromkeys(("peers_per_uid", "joins_per_minute"), _LIMIT),
    },
    socket=json_shapes.text(),
)
_RECORD = json_shapes.tuple_of(
    json_shapes.integer(1),
    json_shapes.text(),
    _CONFIG,
    _FD,
    json_shapes.flag(),
    _FD,
    json_shapes.text("anonymous", "posix", "file", "directory", "descriptor", "device"),
    _WORD,
    json_shapes.flag(),
    json_shapes.optional(json_shapes.tuple_of(json_shapes.integer(0), json_shapes.integer(0))),
)
_MEMBER = json_shapes.begins_with(
    _FD, json_shapes.array(_FD, MAX_VECTORS), json_shapes.moment(), json_shapes.flag()
)
_STATE = json_shapes.record(
    {
        "counts": json_shapes.table(json_shapes.integer(0)),
        "muted_for": json_shapes.table(
            json_shapes.optional(json_shapes.number(0, 1e6)), key=json_shapes.digits()
        ),
    },
    roster=json_shapes.record(),
    held=json_shapes.table(_MEMBER, key=json_shapes.digits()),
)
_SERVICE = json_shapes.record(
    {
        "control": _WORD,
        "metrics": _WORD,
        "source": _WORD,
        "log_format": json_shapes.text(*LOG_FORMATS),
    }
)
_SNAPSHOT = json_shapes.record(
    next=json_shapes.integer(1),
    service=_SERVICE,
    regions=json_shapes.array(json_shapes.tuple_of(_RECORD, _STATE)),
)


# Records by what they say.
_NUMBER = json_shapes.integer(1)
_COUNT = json_shapes.integer(0, (1 << 31) - 1)
_SERIAL = json_shapes.integer(0)
_BEGINNING = json_shapes.integer(0), json_shapes.text()  # of each: the chapter, and what it says
_OF_REGIONS: Mapping[str, json_shapes.Shape] = {
    "service": json_shapes.begins_with(*_BEGINNING, _SERVICE),
    "config": json_shapes.begins_with(*_BEGINNING, _NUMBER, _CONFIG),
    "gone": json_shapes.begins_with(*_BEGINNING, _NUMBER),
}
_OF_MEMBERS: Mapping[str, json_shapes.Shape] = {
    "join": json_shapes.begins_with(
        *(
            *_BEGINNING,
            _SERIAL,
            _FD,
            json_shapes.array(_FD, MAX_VECTORS),
            json_shapes.moment(),
            json_shapes.flag(),
        )
    ),
    "mute": json_shapes.begins_with(
        *_BEGINNING, _SERIAL, json_shapes.optional(json_shapes.number(0, 1e6))
    ),
    **dict.fromkeys(("hold", "unmute", "leave"), json_shapes.begins_with(*_BEGINNING, _SERIAL)),
    "sent": json_shapes.begins_with(*_BEGINNING, _SERIAL, _COUNT),
    "split": json_shapes.begins_with(*_BEGINNING, _SERIAL, _COUNT, _COUNT, _COUNT),
    "crowd": json_shapes.begins_with(*_BEGINNING, _COUNT, _COUNT),
}


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


class RegionPast(NamedTuple):
    """What is said of a region.

    Attributes:
        state, records: as replay takes them.
        unfinished: what was being sent to a member of it at the end.
    """

    record: RegionRecord
    state: Mapping[str, Any] | None
    records: list[Record]
    unfinished: UnfinishedBatch | None


def check(snapshot: Any) -> None:
    """Check a snapshot whole.

    Raises:
        Misshapen: a successor cannot resume it; the message says what is wrong.
    """
    _SNAPSHOT(snapshot, "state")
    regions = [
        RegionPast(RegionRecord(*record), state, [], None) for record, state in snapshot["regions"]
    ]
    _check_meaning("state", snapshot["service"], regions, list(descriptors(snapshot)))


def _check_meaning(
    where: str, service: Mapping[str, Any], regions: Iterable[RegionPast], named: list[int]
) -> None:
    """Check what types do not say; for that, do with a roster what a successor would do."""
    ServiceConfig.from_json({"regions": {}, **service})
    names = set()
    for place, past in enumerate(regions):
        which, name = f"{where}.regions[{place}]", past.record.name
        if name in names:
            raise Misshapen(f"{which} is a second region {json_shapes.shown(name)}")
        names.add(name)
        try:
            _rehearse(past, which)
        except Misshapen:
            raise
        # The roster's own state has no types here, so what does not fit is one of these.
        except (IvshmemError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise Misshapen(f"{which} makes no sense ({json_shapes.shown(str(error))})") from None
    if len(named) != len(set(named)):
        raise Misshapen(f"{where} names one descriptor twice")


def _rehearse(past: RegionPast, where: str) -> None:
    if past.record.source == "posix":
        posix_path(past.record.source_name or "")
    roster = Roster(from_json(past.record.config).vectors, (), ())
    held = replay(roster, past.state, past.records, past.unfinished)
    if held.keys() != {member.serial for member in roster.members}:
        raise Misshapen(f"{where}: its peers and their descriptors do not match")


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
        whose = f"region {json_shapes.shown(region.name)}"
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
                f"{whose}: its socket is bound to {json_shapes.shown(bound)}, not to"
                f" {json_shapes.shown(path)}"
            )
        uid = credentials.credentials(sock).uid
        if uid not in {0, os.geteuid()}:
            raise Misshapen(f"{whose}: its socket was made by uid {uid}")
    except OSError as error:
        raise Misshapen(f"{whose}: its socket cannot be examined ({reason_of(error)})") from None
    finally:
        sock.detach()


# -- a journal -------------------------------------------------------------------------------------


class History(NamedTuple):
    """What a journal says.

    Attributes:
        next_number: of the next region.
        service: settings beside the regions.
        regions: those that are served, by number.
        descriptors: the numbers that are named, by group: first the socket, then what goes with it.
    """

    next_number: int
    service: Mapping[str, Any]
    regions: Mapping[int, RegionPast]
    descriptors: Mapping[str, list[int]]

    @property
    def config(self) -> ServiceConfig:
        """What it says beside the regions."""
        return ServiceConfig.from_json({"regions": {}, **self.service})


def read(journal: Journal) -> History:
    """Put together what a journal says, and check its types.

    Raises:
        JournalError: it is damaged.
    """
    state, records = journal.read()
    try:
        return _told(state, records, journal.outbox.unfinished())
    except Misshapen as error:
        raise JournalError(f"the journal is damaged: {error}") from None


def rehearse(history: History) -> None:
    """Do with a roster what a successor would do.

    Raises:
        JournalError: a successor cannot do it: the journal is damaged.
    """
    named = [fd for fds in history.descriptors.values() for fd in fds]
    try:
        _check_meaning("journal", history.service, history.regions.values(), named)
    except Misshapen as error:
        raise JournalError(f"the journal is damaged: {error}") from None


def _told(
    state: Any, records: list[Record], unfinished: tuple[int, int, int, int, int] | None
) -> History:
    begun: dict[int, RegionPast] = {}
    named: dict[str, list[int]] = {}
    next_number, service = 1, {}
    if state is not None:
        _SNAPSHOT(state, "journal")
        next_number, service = state["next"], state["service"]
        for record, server in state["regions"]:
            region = RegionRecord(*record)
            begun[region.number] = RegionPast(region, server, [], None)
            named[group(region.number)] = [region.listener, region.memory]
            for serial, held in server["held"].items():
                named[group(region.number, int(serial))] = [held[0], *held[1]]
    for place, record in enumerate(records):
        where = f"journal.records[{place}]"
        json_shapes.begins_with(*_BEGINNING)(record, where)
        chapter, kind, *rest = record
        if chapter != OF_THE_SERVICE:
            _shape_of(_OF_MEMBERS, kind, where)(record, where)
            if chapter not in begun:
                continue
            begun[chapter].records.append(record[1:])
            if kind == "join":
                named[group(chapter, rest[0])] = [rest[1], *rest[2]]
            elif kind == "leave":
                named.pop(group(chapter, rest[0]), None)
        elif kind == "region":
            _RECORD(rest, where)
            region = RegionRecord(*rest)
            begun[region.number] = RegionPast(region, None, [], None)
            named[group(region.number)] = [region.listener, region.memory]
            next_number = region.number + 1
        else:
            _shape_of(_OF_REGIONS, kind, where)(record, where)
            if kind == "service":
                service = rest[0]
            elif kind == "gone":
                begun.pop(rest[0], None)
                named = {k: v for k, v in named.items() if not k.startswith(group(rest[0]))}
            elif rest[0] in begun:
                past = begun[rest[0]]
                begun[rest[0]] = past._replace(record=past.record._replace(config=rest[1]))
    if unfinished and unfinished[0] in begun:
        begun[unfinished[0]] = begun[unfinished[0]]._replace(unfinished=unfinished[1:])
    return History(next_number, service, begun, named)


def _shape_of(known: Mapping[str, json_shapes.Shape], kind: str, where: str) -> json_shapes.Shape:
    if kind not in known:
        raise Misshapen(f"{where} is of an unknown kind, {json_shapes.shown(kind)}")
    return known[kind]


def renumbered(state: Any, found: Mapping[int, int]) -> Any:
    """What a service said of itself, with the numbers that its descriptors have here."""
    for record, server in state["regions"]:
        record[3], record[5] = found[record[3]], found[record[5]]
        for held in server["held"].values():
            held[0] = found[held[0]]
            held[1] = [found[fd] for fd in held[1]]
    return state
