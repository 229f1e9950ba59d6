"""The records of a server's journal: what is written when something happens, field by field.

Knows: the layout of each record and of a snapshot; nothing else in the package does. Does not know:
where records are kept, what a record did to a roster (replay.py does), which settings a region has.

A journal has one section for the service (SERVICE_SECTION) and one for each region, under the
region's number. A record stands there as a list: the section's number, the record's kind, its
fields. MEMBER_KINDS and SERVICE_KINDS name the kinds. A field that an older version did not write
has the default that is given here. A reader ignores further fields, which a newer version wrote;
but not those of a region, nor those of a member that joined: they can say what it must not be
told, as `holds` does.

Members are named by their serial numbers, descriptors by the numbers that they have in the process
that wrote the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import Misshapen
from ..system.named_tuple import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    from ..memory.region import Source

SERVICE_SECTION = 0  # regions have numbers from 1 on


# -- records of a region's section ----------------------------------------------------------------


class MemberFds(NamedTuple):
    """What a member had when it joined, as a snapshot holds it.

    Attributes:
        fd, fds: its socket, its eventfds.
        since: when it joined, seconds since the epoch.
        readonly: whether it was given memory that it can only read.
        holds: whether it is never told that a peer left.
    """

    fd: int
    fds: list[int]
    since: float
    readonly: bool
    holds: bool = False


class JoinRecord(NamedTuple):
    """A member joined; the fields are those of MemberFds."""

    member: int
    fd: int
    fds: list[int]
    since: float
    readonly: bool
    holds: bool = False

    @property
    def had(self) -> MemberFds:
        """What it had."""
        return MemberFds(*self[1:])


class HoldRecord(NamedTuple):
    """From now on a member is told of no leave."""

    member: int


class MuteRecord(NamedTuple):
    """From now on a member is sent nothing.

    That ends by UnmuteRecord, or `seconds` after the process that asked for it is gone (None:
    never).
    """

    member: int
    seconds: float | None


class UnmuteRecord(NamedTuple):
    """A member is sent what it has still to be told."""

    member: int


class LeaveRecord(NamedTuple):
    """A member left."""

    member: int


class SentRecord(NamedTuple):
    """A member was sent the first `messages` of its pending messages."""

    member: int
    messages: int


class SplitRecord(NamedTuple):
    """A member took only `messages` of a batch for the crowd, and is no longer in the crowd.

    The batch has `batch` messages; the first `done` members of the crowd were sent all of it.
    """

    member: int
    messages: int
    done: int
    batch: int


class CrowdRecord(NamedTuple):
    """All `members` of the crowd were sent a batch of `batch` messages."""

    batch: int
    members: int


# -- records of the service's section -------------------------------------------------------------


class SettingsRecord(NamedTuple):
    """What the configuration says beside its regions."""

    values: Mapping[str, Any]


class RegionRecord(NamedTuple):
    """A region is served from now on; in a snapshot, without its kind, it says the same.

    Attributes:
        config: its settings.
        listener, memory: descriptors.
        unlinks: whether the socket's file goes when the region does.
        source, source_name: of the memory, as memory.region.Region says.
        created: whether the server made the memory.
        file: device and inode of the socket's file, if that is known.
    """

    number: int
    name: str
    config: Mapping[str, Any]
    listener: int
    unlinks: bool
    memory: int
    source: Source
    source_name: str | None
    created: bool
    file: Sequence[int] | None


class ConfigRecord(NamedTuple):
    """A region's settings were changed."""

    number: int
    config: Mapping[str, Any]


class GoneRecord(NamedTuple):
    """A region is no longer served."""

    number: int


MEMBER_KINDS: dict[str, type[MemberRecord]] = {
    "join": JoinRecord,
    "hold": HoldRecord,
    "mute": MuteRecord,
    "unmute": UnmuteRecord,
    "leave": LeaveRecord,
    "sent": SentRecord,
    "split": SplitRecord,
    "crowd": CrowdRecord,
}
SERVICE_KINDS: dict[str, type[ServiceRecord]] = {
    "service": SettingsRecord,
    "region": RegionRecord,
    "config": ConfigRecord,
    "gone": GoneRecord,
}
_KIND_OF = {made: kind for kinds in (MEMBER_KINDS, SERVICE_KINDS) for kind, made in kinds.items()}

if TYPE_CHECKING:
    MemberRecord: TypeAlias = (
        JoinRecord
        | HoldRecord
        | MuteRecord
        | UnmuteRecord
        | LeaveRecord
        | SentRecord
        | SplitRecord
        | CrowdRecord
    )
    ServiceRecord: TypeAlias = SettingsRecord | RegionRecord | ConfigRecord | GoneRecord


def encode(record: MemberRecord | ServiceRecord) -> tuple[Any, ...]:
    """Return a record's kind and fields, as they stand in a journal after the section's number."""
    return (_KIND_OF[type(record)], *record)


def member_record(kind: str, *fields: Any) -> MemberRecord:
    """Return the record of a region's section that these fields are; see `encode`.

    Raises:
        Misshapen: as of `member_fds`.
    """
    made = MEMBER_KINDS[kind]
    if made is JoinRecord:
        return JoinRecord(fields[0], *member_fds(fields[1:]))
    return made(*fields[: len(made._fields)])


def service_record(kind: str, *fields: Any) -> ServiceRecord:
    """Return the record of the service's section that these fields are."""
    made = SERVICE_KINDS[kind]
    return made(*fields[: len(made._fields)])


def member_fds(fields: Sequence[Any]) -> MemberFds:
    """Return what a snapshot says of one member.

    Raises:
        Misshapen: it has more fields than are known here, and they could matter.
    """
    if len(fields) > len(MemberFds._fields):
        known = len(MemberFds._fields)
        raise Misshapen(f"a peer has {len(fields)} fields, of which {known} are known")
    return MemberFds(*fields)
