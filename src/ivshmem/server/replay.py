"""What a journal says of one region: the roster as it was, and who had which descriptors.

Knows: what each record of records.py did to the roster. Does not know: the layout of a record,
where records are kept, what a descriptor is beside its number.

The roster needs nothing but these records to be what it was, because every decision of a roster
follows from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..protocol.roster import Member, Roster
from .records import (
    CrowdRecord,
    HoldRecord,
    JoinRecord,
    LeaveRecord,
    MemberFds,
    MuteRecord,
    SentRecord,
    SplitRecord,
    UnmuteRecord,
    member_fds,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .records import MemberRecord

BATCH = 64  # messages that an outbox sends at once

# What `Outbox.unfinished` says, without the section: member, batches, messages, of how many.
UnfinishedBatch = tuple[int, int, int, int]


def replay(
    roster: Roster,
    state: Mapping[str, Any] | None,
    records: Iterable[MemberRecord],
    unfinished: UnfinishedBatch | None,
) -> dict[int, MemberFds]:
    """Make a new roster what the former one was.

    Args:
        state: as `snapshot` made it, before the records; None: nobody had joined.
        records: of the region's section, in the order of happening.
        unfinished: what was being sent at the end.

    Returns:
        What each member had, by serial number. The vectors of members are place-holders, to be
        replaced before anything is sent.
    """
    blank = range(roster.vectors)
    had: dict[int, MemberFds] = {}
    if state is not None:
        roster.load(state["roster"], blank)
        had = {int(serial): member_fds(fields) for serial, fields in state["held"].items()}
    members = {member.serial: member for member in roster.members}
    told: tuple[int, int] | None = None  # the crowd's batch: how many have it, how long it is
    for record in records:
        if isinstance(record, JoinRecord):
            member = roster.join(blank, no_leaves=record.holds)
            members[member.serial] = member
            had[member.serial] = record.had
        elif isinstance(record, HoldRecord):
            roster.stop_leaves(members[record.member])
        elif isinstance(record, MuteRecord):
            roster.pause(members[record.member])
        elif isinstance(record, UnmuteRecord):
            roster.resume(members[record.member])
        elif isinstance(record, LeaveRecord):
            del had[record.member]
            roster.leave(members.pop(record.member))
        elif isinstance(record, SentRecord):
            _sent(roster, members[record.member], record.messages)
        elif isinstance(record, SplitRecord):
            _split(roster, members[record.member], record.messages, record.batch)
            told = record.done, record.batch
        elif isinstance(record, CrowdRecord):
            roster.sent_to_all(roster.messages_to_all(record.batch), record.batch)
            told = None
    if unfinished is not None:
        serial, step, count, batch = unfinished
        if serial >= 0:
            # It may have left since: nothing was sent then.
            if serial in members and step * BATCH + count:
                _sent(roster, members[serial], step * BATCH + count)
        else:
            told = step, batch
            if count > 0 and step < len(roster.caught_up):
                _split(roster, list(roster.caught_up.values())[step], count, batch)
    if told is not None and roster.caught_up:
        done, batch = told
        runs = roster.messages_to_all(batch)
        for member in list(roster.caught_up.values())[done:]:
            roster.tell_singly(member)
        roster.sent_to_all(runs, batch)
    return had


def snapshot(roster: Roster, had: Mapping[int, MemberFds]) -> dict[str, Any]:
    """What `replay` takes instead of all the records up to now."""
    return {"roster": roster.dump(), "held": had}


def muted_for(
    state: Mapping[str, Any] | None, records: Iterable[MemberRecord]
) -> dict[int, float | None]:
    """How long each muted member stays so after the process that asked is gone (None: no limit).

    Args:
        state: with "muted_for" beside what `snapshot` made, if anybody was muted.
        records: as of `replay`.
    """
    found = {int(serial): each for serial, each in (state or {}).get("muted_for", {}).items()}
    for record in records:
        if isinstance(record, MuteRecord):
            found[record.member] = record.seconds
        elif isinstance(record, UnmuteRecord | LeaveRecord):
            found.pop(record.member, None)
    return found


def renumbered(state: Mapping[str, Any], found: Mapping[int, int]) -> dict[str, Any]:
    """A state, with the numbers that its descriptors have in another process."""
    had = {serial: member_fds(fields) for serial, fields in state["held"].items()}
    here = {
        serial: each._replace(fd=found[each.fd], fds=[found[fd] for fd in each.fds])
        for serial, each in had.items()
    }
    return {**state, "held": here}


def descriptors(state: Mapping[str, Any]) -> dict[int, list[int]]:
    """The numbers of the descriptors that a state names, by member: its socket comes first."""
    had = {int(serial): member_fds(fields) for serial, fields in state["held"].items()}
    return {serial: [each.fd, *each.fds] for serial, each in had.items()}


def _sent(roster: Roster, member: Member, count: int) -> None:
    roster.sent(member, roster.pending(member, count), count)


def _split(roster: Roster, member: Member, count: int, batch: int) -> None:
    runs = roster.messages_to_all(batch)
    roster.tell_singly(member)
    roster.sent(member, runs, count)
