"""Hypothesis drives a roster with random joins, leaves, stalls and cuts.

Proven, for each member, by the real Session and by a model of QEMU: greeting first, every vector in
order, no id told twice, one leave for each id announced and none for another, nothing at all to one
that is muted, at rest everyone knows exactly everyone. And of the roster: an id is given out again
as soon as, and not before, it is safe; memory is bounded by the members and what they were told,
not by what has happened.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.members import Client, make_roster, send_to_crowd

from ivshmem.errors import NoFreeId
from ivshmem.protocol import roster as protocol
from ivshmem.server.records import MemberFds, member_record
from ivshmem.server.replay import BATCH, UnfinishedBatch, muted_for, replay, snapshot


class Rosters(RuleBasedStateMachine):
    """Ids are few here, so that they run out."""

    @initialize(vectors=st.integers(0, 4), ids=st.integers(1, 12))
    def begin(self, vectors: int, ids: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(protocol, "MAX_ID", ids - 1)
        self.ids = ids
        self.roster = make_roster(vectors)
        self.clients: list[Client] = []
        self.joined = 0
        self.state: dict[str, Any] | None = None  # the journal: a state, and what came after it
        self.records: list[list[Any]] = []
        # For each id that left while somebody knew it: who was connected then.
        self.quarantine: dict[int, set[int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "roster"):
            try:
                self.everyone_is_told()
            finally:
                self.patch.undo()

    def free_ids(self) -> set[int]:
        here = {client.key for client in self.clients}
        taken = {client.id for client in self.clients}
        unsafe = {peer for peer, witnesses in self.quarantine.items() if witnesses & here}
        return set(range(self.ids)) - taken - unsafe

    # -- what happens -----------------------------------------------------------------------------

    @rule(holds=st.sampled_from([False, False, True]))
    def join(self, holds: bool) -> None:
        free = self.free_ids()
        assert self.roster.full == (not free)
        if not free:
            with pytest.raises(NoFreeId):
                self.roster.join([0] * self.roster.vectors)
            return
        client = Client(self.roster, self.joined, holds=holds)
        self.joined += 1
        assert client.id == min(free), "not the lowest id that is safe"
        for other in self.clients:
            assert client.id not in other.qemu.alive
            assert client.id not in other.qemu.left, "somebody was told of this id before"
        self.quarantine.pop(client.id, None)
        self.clients.append(client)
        self.note("join", client.key, client.key, [], 0.0, False, holds)
        client.note = self.note

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """From now on one is told of nobody who leaves, not even of those who have left."""
        client = data.draw(st.sampled_from(self.clients), label="who is told of no leave")
        self.roster.stop_leaves(client.member)
        self.note("hold", client.member.serial)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def mute(self, data: st.DataObject) -> None:
        """From now on one is sent nothing, but for the rest of its set-up."""
        client = data.draw(st.sampled_from(self.clients), label="who is muted")
        self.roster.pause(client.member)
        self.note("mute", client.member.serial, 60.0)

    @precondition(lambda self: any(client.member.paused for client in self.clients))
    @rule(data=st.data())
    def unmute(self, data: st.DataObject) -> None:
        muted = [client for client in self.clients if client.member.paused]
        self.listen_again(data.draw(st.sampled_from(muted), label="who is not muted any more"))

    def listen_again(self, client: Client) -> None:
        self.roster.resume(client.member)
        self.note("unmute", client.member.serial)

    @precondition(lambda self: self.roster.vectors > 1 and len(self.clients) > 1)
    @rule(data=st.data())
    def leave_in_mid_announcement(self, data: st.DataObject) -> None:
        """Told of some vectors of another one, which leaves then."""
        client = data.draw(st.sampled_from(self.clients), label="who is told of it")
        here = {c.id: c for c in self.clients}
        while client.send(1):
            told = here.get(peer) if (peer := client.qemu.last) is not None else None
            if told not in (None, client) and len(client.qemu.alive[told.id]) < self.roster.vectors:
                self.goes(told)
                return

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.goes(data.draw(st.sampled_from(self.clients), label="who leaves"))

    def goes(self, client: Client) -> None:
        self.clients.remove(client)
        knowing = [c for c in self.clients if client.id in c.qemu.alive]
        told = [c for c in knowing if not c.member.no_leaves]
        assert self.roster.leave(client.member) == bool(told)
        self.note("leave", client.member.serial)
        if knowing:
            self.quarantine[client.id] = {c.key for c in self.clients}

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), count=st.integers(0, 30), limit=st.sampled_from([0, 1, 5, 1024]))
    def stall(self, data: st.DataObject, count: int, limit: int) -> None:
        """The buffer takes so many messages and then is full, in the middle of anything."""
        data.draw(st.sampled_from(self.clients), label="who reads").send(count, limit)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def one_reads(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.clients), label="who reads").send_all()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), limit=st.sampled_from([0, 1, 5, 1024]))
    def crowd_is_told(self, data: st.DataObject, limit: int) -> None:
        """All at once, of whom some take only a part; the server may be killed amidst it."""
        takes = st.sampled_from([1 << 30, 0, 1, 1, 2, 5])
        end = data.draw(st.sampled_from([None, 0, 0, 1, 2]), label="killed after so many")
        unfinished = send_to_crowd(
            self.clients,
            lambda _: data.draw(takes, label="how much it takes"),
            limit,
            lambda done: done == end,
            self.note,
        )
        if unfinished is not None:
            self.succeed(unfinished)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), count=st.integers(0, 200))
    def killed_while_sending(self, data: st.DataObject, count: int) -> None:
        """What one was sent is out, and only the outbox knows."""
        client = data.draw(st.sampled_from(self.clients), label="to whom")
        runs = self.roster.pending(client.member, 4 * BATCH)
        count = min(count, sum(run.length for run in runs))
        client.take(runs, count)
        if count and count % BATCH == 0 and data.draw(st.booleans(), label="before the next"):
            self.succeed((client.member.serial, count // BATCH - 1, BATCH, BATCH))
        else:
            self.succeed((client.member.serial, count // BATCH, count % BATCH, BATCH))

    @rule()
    def killed(self) -> None:
        """A successor makes of the records what the roster was."""
        before = self.roster.dump()
        muted = {client.member.serial for client in self.clients if client.member.paused}
        assert set(muted_for(self.state, self.told())) == muted
        self.succeed(None)
        assert self.roster.dump() == before

    @rule()
    def rewritten(self) -> None:
        """The journal begins anew with a state."""
        held = {
            c.member.serial: MemberFds(c.key, [], 0.0, False, c.member.no_leaves)
            for c in self.clients
        }
        muted = {c.member.serial: 60.0 for c in self.clients if c.member.paused}
        state = {**snapshot(self.roster, held), "muted_for": muted}
        self.state = json.loads(json.dumps(state))
        self.records.clear()

    def note(self, *record: object) -> None:
        self.records.append(list(record))

    def told(self) -> list[Any]:
        return [member_record(*record) for record in json.loads(json.dumps(self.records))]

    def succeed(self, unfinished: UnfinishedBatch | None) -> None:
        old = self.roster
        self.roster = make_roster(old.vectors)
        held = replay(self.roster, self.state, self.told(), unfinished)
        by_serial = {client.member.serial: client for client in self.clients}
        assert {serial: kept.fd for serial, kept in held.items()} == {
            serial: client.key for serial, client in by_serial.items()
        }
        for member in self.roster.members:
            client = by_serial[member.serial]
            member.give_vectors(client.member.vectors)
            client.member, client.roster = member, self.roster
        self.rewritten()

    @rule()
    def everyone_reads(self) -> None:
        for client in self.clients:
            client.send_all()
        for client in self.clients:
            if client.member.paused:
                assert client.is_set_up
            else:
                client.check_knows(self.clients)
                assert not client.member.told.leaves_due

    @rule()
    def everyone_is_told(self) -> None:
        for client in self.clients:
            if client.member.paused:
                self.listen_again(client)
        self.everyone_reads()

    # -- what always holds ------------------------------------------------------------------------

    @invariant()
    def memory_is_bounded(self) -> None:
        if not hasattr(self, "roster"):
            return
        here = {client.id for client in self.clients}
        for client in self.clients:
            owed = list(client.member.told.leaves_due)
            assert len(owed) == len(set(owed))
            # Exactly those that it was told of and that are gone: never more than it was told.
            gone = set(client.qemu.alive) - here
            assert set(owed) == (set() if client.member.no_leaves else gone)
            assert self.roster.leaves_told(client.member) == len(client.qemu.left)
            if client.member.no_leaves and self.roster.vectors:
                assert client.member.told.leaves_held == len(gone)
        roster = self.roster
        assert set(roster.caught_up) | set(roster.told_singly) == {m.serial for m in roster.members}
        assert not set(roster.caught_up) & set(roster.told_singly)
        assert all(m.told is roster._told_to_all for m in roster.caught_up.values())
        assert not any(m.no_leaves or m.paused for m in roster.caught_up.values())
        assert list(roster.members) == [client.member for client in self.clients]
        kept = [peer for _, peer in roster._known] + roster._free + [m.id for m in roster.members]
        assert len(kept) == len(set(kept)) == roster._unused <= self.ids
        if not self.clients:
            assert not roster._known

    @invariant()
    def pending_changes_nothing(self) -> None:
        if hasattr(self, "roster"):
            for client in self.clients:
                assert self.roster.pending(client.member) == self.roster.pending(client.member)

    @invariant()
    def backlogs_are_what_is_pending(self) -> None:
        if hasattr(self, "roster"):
            for client in self.clients:
                pending = self.roster.pending(client.member, 1 << 40)
                count = sum(run.length for run in pending)
                if client.member.paused:
                    assert count <= self.roster.backlog(client.member)
                else:
                    assert count == self.roster.backlog(client.member)


TestRosters = Rosters.TestCase
TestRosters.settings = settings(stateful_step_count=60)
