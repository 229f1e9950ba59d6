"""What a server's journal says of one region: the roster as it was, and who had what descriptors.

Knows: the records, and what they did to the roster. Does not know: where records are kept, or what
a descriptor is beside its number.

Records, in the order of happening; a member is named by its serial number:

    ["join", member, fd, fds, since, readonly, holds]
                                        one joined: its socket, its eventfds, when, with what
                                        memory, whether it is never told of a leave
    ["hold", member]                    it is told of none from now on
    ["mute", member, seconds]           it is sent nothing until further notice, or until so long
                                        after the one who asked for that is gone
    ["unmute", member]                  it is sent what it must be told again
    ["leave", member]
    ["sent", member, count]             it was sent so many messages of what was pending
    ["split", member, count, done, all] of the batch of `all` messages for the crowd, it was sent
                                        `count`, and the first `done` of the crowd all of it
    ["crowd", all, number]              everybody in the crowd, so many, was sent that batch

The roster needs nothing but these to be what it was, since all that it decides follows from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..protocol.roster import Member, Roster
from ..system.named_tuple import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BATCH = 64  # messages that an outbox sends at once

# What `Outbox.unfinished` says, without the region: member, batches, messages, of how many.
UnfinishedBatch = tuple[int, int, int, int]


class MemberFds(NamedTuple):
    """What a member had: the numbers of its socket and of its eventfds; when it joined."""

    fd: int
    fds: list[int]
    since: float
    readonly: bool
    holds: bool = False  # when it joined


def replay(
    roster: Roster,
    state: Mapping[str, Any] | None,
    records: Iterable[list[Any]],
    unfinished: UnfinishedBatch | None,
) -> dict[int, MemberFds]:
    """Make a new roster what the former one was.

    Args:
        state: as `snapshot` made it, before the records; None: nobody had joined.
        records: without the region's number.
        unfinished: what was being sent at the end.

    Returns:
        What each member had, by serial number. The vectors of members are place-holders, to be
        replaced before anything is sent.
    """
    blank = range(roster.vectors)
    held: dict[int, MemberFds] = {}
    if state is not None:
        roster.load(state["roster"], blank)
        held = {int(serial): MemberFds(*kept) for serial, kept in state["held"].items()}
    members = {member.serial: member for member in roster.members}
    told: tuple[int, int] | None = None  # the crowd's batch: how many have it, how long it is
    for kind, *rest in records:
        if kind == "join":
            had = MemberFds(*rest[1:])
            member = roster.join(blank, holds=had.holds)
            members[member.serial] = member
            held[member.serial] = had
        elif kind == "hold":
            roster.hold(members[rest[0]])
        elif kind == "mute":
            roster.mute(members[rest[0]])
        elif kind == "unmute":
            roster.unmute(members[rest[0]])
        elif kind == "leave":
            del held[rest[0]]
            roster.leave(members.pop(rest[0]))
        elif kind == "sent":
            _sent(roster, members[rest[0]], rest[1])
        elif kind == "split":
            serial, count, done, batch = rest
            _split(roster, members[serial], count, batch)
            told = done, batch
        elif kind == "crowd":
            roster.sent_to_crowd(roster.news(rest[0]), rest[0])
            told = None
    if unfinished is not None:
        serial, step, count, batch = unfinished
        if serial >= 0:
            # It may have left since: nothing was sent then.
            if serial in members and step * BATCH + count:
                _sent(roster, members[serial], step * BATCH + count)
        else:
            told = step, batch
            if count > 0 and step < len(roster.crowd):
                _split(roster, list(roster.crowd.values())[step], count, batch)
    if told is not None and roster.crowd:
        done, batch = told
        runs = roster.news(batch)
        for member in list(roster.crowd.values())[done:]:
            roster.split(member)
        roster.sent_to_crowd(runs, batch)
    return held


def snapshot(roster: Roster, held: Mapping[int, MemberFds]) -> dict[str, Any]:
    """What `replay` takes instead of all the records up to now."""
    return {"roster": roster.dump(), "held": held}


def muted_for(
    state: Mapping[str, Any] | None, records: Iterable[list[Any]]
) -> dict[int, float | None]:
    """How long each muted member stays so after those who asked are gone (None: for ever).

    Args:
        state: with "muted_for" beside what `snapshot` made, if anybody was muted.
        records: as of `replay`.
    """
    found = {int(serial): each for serial, each in (state or {}).get("muted_for", {}).items()}
    for kind, *rest in records:
        if kind == "mute":
            found[rest[0]] = rest[1]
        elif kind in ("unmute", "leave"):
            found.pop(rest[0], None)
    return found


def _sent(roster: Roster, member: Member, count: int) -> None:
    roster.sent(member, roster.pending(member, count), count)


def _split(roster: Roster, member: Member, count: int, batch: int) -> None:
    runs = roster.news(batch)
    roster.split(member)
    roster.sent(member, runs, count)
