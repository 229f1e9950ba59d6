"""The state of a service as a successor gets it, and the checks before the successor uses it.

Knows: the types in a snapshot and in a journal's records, and of what kind each descriptor must be.
Does not know: who wrote them, or the order of fields in a record (server/records.py does).

A snapshot is {"next": number, "service": {setting: value}, "regions": [[REGION, STATE], ..]}.
REGION has the fields of records.RegionRecord. STATE is what replay.snapshot returns. A journal
holds a snapshot, and the records of what happened since.

Invariants:
1. If `check` accepts a snapshot, or `rehearse` a history, a successor can resume it: the types are
   right, and a rehearsal on a roster succeeded.
2. If `examine` accepts descriptors, each is what the snapshot says: a listening socket that is
   bound to the region's path, a connection, or an eventfd.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping

from ..errors import IvshmemError, JournalError, Misshapen, reason_of
from ..lasting.journal import Journal, group_name
from ..memory.region import posix_path
from ..protocol.limits import MAX_VECTORS
from ..protocol.roster import Roster
from ..server import records, replay
from ..server.replay import UnfinishedBatch
from ..system import credentials, json_shapes, sockets
from ..system.named_tuple import NamedTuple
from .config import ServiceConfig, from_json
from .limits import EXISTING, LOG_FORMATS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..lasting.journal import Record
    from ..server.records import MemberRecord, ServiceRecord

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
        **dict.fromkeys(("names", "channels"), json_shapes.optional(json_shapes.integer(0))),
        "mode": json_shapes.optional(json_shapes.integer(0, 0o777)),
        **dict.fromkeys(("owner", "group"), _WHO),
        **dict.fromkeys(("allow", "deny", "readonly_for", "accept_owner"), _RULES),
        **dict.fromkeys(("peers_per_uid", "joins_per_minute"), _LIMIT),
    },
    socket=json_shapes.text(),
)


def _in_order(made: Any, **shapes: json_shapes.Shape) -> list[json_shapes.Shape]:
    """Return the shapes of a record's fields, in their order, without those that have a default."""
    assert set(shapes) == {*made._fields} - {*made._field_defaults}
    return [shapes[name] for name in made._fields if name in shapes]


_REGION = json_shapes.tuple_of(
    *_in_order(
        records.RegionRecord,
        number=json_shapes.integer(1),
        name=json_shapes.text(),
        config=_CONFIG,
        listener=_FD,
        unlinks=json_shapes.flag(),
        memory=_FD,
        source=json_shapes.text("anonymous", "posix", "file", "directory", "descriptor", "device"),
        source_name=_WORD,
        created=json_shapes.flag(),
        file=json_shapes.optional(
            json_shapes.tuple_of(json_shapes.integer(0), json_shapes.integer(0))
        ),
    )
)
_HAD: dict[str, json_shapes.Shape] = {
    "fd": _FD,
    "fds": json_shapes.array(_FD, MAX_VECTORS),
    "since": json_shapes.moment(),
    "readonly": json_shapes.flag(),
}
_MEMBER = json_shapes.begins_with(*_in_order(records.MemberFds, **_HAD))
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
    regions=json_shapes.array(json_shapes.tuple_of(_REGION, _STATE)),
)


# Records by their kind.
_NUMBER = json_shapes.integer(1)
_COUNT = json_shapes.integer(0, (1 << 31) - 1)
_SERIAL = json_shapes.integer(0)
_BEGINNING = json_shapes.integer(0), json_shapes.text()  # of each: its section, its kind


def _record(made: Any, **shapes: json_shapes.Shape) -> json_shapes.Shape:
    return json_shapes.begins_with(*_BEGINNING, *_in_order(made, **shapes))


_OF_THE_SERVICE: Mapping[str, json_shapes.Shape] = {
    "service": _record(records.SettingsRecord, values=_SERVICE),
    "config": _record(records.ConfigRecord, number=_NUMBER, config=_CONFIG),
    "gone": _record(records.GoneRecord, number=_NUMBER),
}
_OF_MEMBERS: Mapping[str, json_shapes.Shape] = {
    "join": _record(records.JoinRecord, member=_SERIAL, **_HAD),
    "mute": _record(
        records.MuteRecord, member=_SERIAL, seconds=json_shapes.optional(json_shapes.number(0, 1e6))
    ),
    "hold": _record(records.HoldRecord, member=_SERIAL),
    "unmute": _record(records.UnmuteRecord, member=_SERIAL),
    "leave": _record(records.LeaveRecord, member=_SERIAL),
    "sent": _record(records.SentRecord, member=_SERIAL, messages=_COUNT),
    "split": _record(
        records.SplitRecord, member=_SERIAL, messages=_COUNT, done=_COUNT, batch=_COUNT
    ),
    "crowd": _record(records.CrowdRecord, batch=_COUNT, members=_COUNT),
}


class RegionPast(NamedTuple):
    """What a snapshot or a journal says of one region.

    Attributes:
        state, records: as `replay` takes them.
        unfinished: the batch that was being sent when the server ended; None: there was none.
    """

    record: records.RegionRecord
    state: Mapping[str, Any] | None
    records: list[MemberRecord]
    unfinished: UnfinishedBatch | None


def check(snapshot: Any) -> None:
    """Check all of a snapshot.

    Raises:
        Misshapen: a successor cannot resume it. The message says what is wrong.
    """
    _SNAPSHOT(snapshot, "state")
    regions = [
        RegionPast(records.RegionRecord(*record), state, [], None)
        for record, state in snapshot["regions"]
    ]
    _check_meaning("state", snapshot["service"], regions, list(descriptors(snapshot)))


def _check_meaning(
    where: str, service: Mapping[str, Any], regions: Iterable[RegionPast], named: list[int]
) -> None:
    """Check what types do not show: do on a new roster what a successor would do."""
    ServiceConfig._from_json({"regions": {}, **service})
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
        # `check` does not know the types in a roster's own state. A wrong one raises one of these.
        except (IvshmemError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise Misshapen(f"{which} makes no sense ({json_shapes.shown(str(error))})") from None
    if len(named) != len(set(named)):
        raise Misshapen(f"{where} names one descriptor twice")


def _rehearse(past: RegionPast, where: str) -> None:
    if past.record.source == "posix":
        posix_path(past.record.source_name or "")
    roster = Roster(from_json(past.record.config).vectors, (), ())
    had = replay.replay(roster, past.state, past.records, past.unfinished)
    if had.keys() != {member.serial for member in roster.members}:
        raise Misshapen(f"{where}: its peers and their descriptors do not match")


def descriptors(snapshot: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of all descriptors that a snapshot names."""
    for record, state in snapshot["regions"]:
        region = records.RegionRecord(*record)
        yield from (region.listener, region.memory)
        for fds in replay.descriptors(state).values():
            yield from fds


def examine(snapshot: Mapping[str, Any], found: Mapping[int, int]) -> None:
    """Check the descriptors themselves.

    Args:
        found: the descriptors of this process, by their numbers in the snapshot.

    Raises:
        Misshapen: one is missing, or is not what the snapshot says.
    """
    if missing := set(descriptors(snapshot)) - set(found):
        raise Misshapen(f"{len(missing)} of the descriptors that the state names are missing")
    for record, state in snapshot["regions"]:
        region = records.RegionRecord(*record)
        whose = f"region {json_shapes.shown(region.name)}"
        _examine_listener(found[region.listener], region.config["socket"], whose)
        if not stat.S_ISREG(os.fstat(found[region.memory]).st_mode):
            raise Misshapen(f"{whose}: its memory is not a file")
        for fd, *fds in replay.descriptors(state).values():
            if not sockets.is_connection(found[fd]):
                raise Misshapen(f"{whose}: a peer's connection is not a connected Unix socket")
            for each in fds:
                # No system call tells what a descriptor is; the kernel's name for it does.
                if os.readlink(f"/proc/self/fd/{found[each]}") != "anon_inode:[eventfd]":
                    raise Misshapen(f"{whose}: a peer's doorbell is not an eventfd")


def _examine_listener(fd: int, path: str, whose: str) -> None:
    """Check that `fd` listens at `path`, and that root or this process's user called listen(2)."""
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
        # Otherwise a service manager passed the socket: it has an abstract address, or none.
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
        next_number: the number of the next region.
        service: the settings that belong to no region.
        regions: the regions that are served, by number.
        descriptors: the numbers of all descriptors, by group: first a socket, then the descriptors
            that belong to it.
    """

    next_number: int
    service: Mapping[str, Any]
    regions: Mapping[int, RegionPast]
    descriptors: Mapping[str, list[int]]

    @property
    def config(self) -> ServiceConfig:
        """The configuration without the regions."""
        return ServiceConfig._from_json({"regions": {}, **self.service})


def read(journal: Journal) -> History:
    """Read a journal, and check its types.

    Raises:
        JournalError: it is damaged.
    """
    state, records = journal.read()
    try:
        return _history(state, records, journal.outbox.unfinished())
    except Misshapen as error:
        raise JournalError(f"the journal is damaged: {error}") from None


def rehearse(history: History) -> None:
    """Do on a new roster what a successor would do.

    Raises:
        JournalError: that fails, so the journal is damaged.
    """
    named = [fd for fds in history.descriptors.values() for fd in fds]
    try:
        _check_meaning("journal", history.service, history.regions.values(), named)
    except Misshapen as error:
        raise JournalError(f"the journal is damaged: {error}") from None


def _history(
    state: Any, lines: list[Record], unfinished: tuple[int, int, int, int, int] | None
) -> History:
    reader = _JournalReader()
    if state is not None:
        reader.begin(state)
    for place, line in enumerate(lines):
        where = f"journal.records[{place}]"
        json_shapes.begins_with(*_BEGINNING)(line, where)
        section, kind, *fields = line
        if section != records.SERVICE_SECTION:
            _shape_of(_OF_MEMBERS, kind, where)(line, where)
            reader.add_of_region(section, records.member_record(kind, *fields))
        elif kind == "region":
            _REGION(fields, where)
            reader.add(records.RegionRecord(*fields))
        else:
            _shape_of(_OF_THE_SERVICE, kind, where)(line, where)
            reader.add(records.service_record(kind, *fields))
    regions = reader.regions
    if unfinished and unfinished[0] in regions:
        regions[unfinished[0]] = regions[unfinished[0]]._replace(unfinished=unfinished[1:])
    return History(reader.next_number, reader.service, regions, reader.descriptors)


class _JournalReader:
    """What the lines of a journal say so far. The attributes are those of History."""

    def __init__(self) -> None:
        self.next_number = 1
        self.service: Mapping[str, Any] = {}
        self.regions: dict[int, RegionPast] = {}
        self.descriptors: dict[str, list[int]] = {}

    def begin(self, snapshot: Any) -> None:
        _SNAPSHOT(snapshot, "journal")
        for fields, state in snapshot["regions"]:
            region = records.RegionRecord(*fields)
            self.add(region)
            self.regions[region.number] = RegionPast(region, state, [], None)
            for member, fds in replay.descriptors(state).items():
                self.descriptors[group_name(region.number, member)] = fds
        self.next_number, self.service = snapshot["next"], snapshot["service"]

    def add_of_region(self, number: int, record: MemberRecord) -> None:
        if number not in self.regions:
            return
        self.regions[number].records.append(record)
        if isinstance(record, records.JoinRecord):
            self.descriptors[group_name(number, record.member)] = [record.fd, *record.fds]
        elif isinstance(record, records.LeaveRecord):
            self.descriptors.pop(group_name(number, record.member), None)

    def add(self, record: ServiceRecord) -> None:
        if isinstance(record, records.RegionRecord):
            self.regions[record.number] = RegionPast(record, None, [], None)
            self.descriptors[group_name(record.number)] = [record.listener, record.memory]
            self.next_number = record.number + 1
        elif isinstance(record, records.SettingsRecord):
            self.service = record.values
        elif isinstance(record, records.GoneRecord):
            self.regions.pop(record.number, None)
            of_region = group_name(record.number)
            for name in [each for each in self.descriptors if each.startswith(of_region)]:
                del self.descriptors[name]
        elif record.number in self.regions:
            past = self.regions[record.number]
            region = past.record._replace(config=record.config)
            self.regions[record.number] = past._replace(record=region)


def _shape_of(known: Mapping[str, json_shapes.Shape], kind: str, where: str) -> json_shapes.Shape:
    if kind not in known:
        raise Misshapen(f"{where} is of an unknown kind, {json_shapes.shown(kind)}")
    return known[kind]


def renumbered(snapshot: Any, found: Mapping[int, int]) -> Any:
    """Return the snapshot with the numbers that its descriptors have in this process."""
    regions = []
    for fields, state in snapshot["regions"]:
        region = records.RegionRecord(*fields)
        here = region._replace(listener=found[region.listener], memory=found[region.memory])
        regions.append([here, replay.renumbered(state, found)])
    return {**snapshot, "regions": regions}
