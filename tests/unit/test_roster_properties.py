"""Hypothesis drives a roster with random joins, leaves, stalls and cuts.

Proven, for each member, by the real Session and by a model of QEMU: greeting first, every vector in
order, no id told twice, one leave for each id announced and none for another, at rest everyone
knows exactly everyone. And of the roster: an id is given out again as soon as, and not before, it
is safe; memory is bounded by the members and what they were told, not by what has happened.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.members import Client, make_roster

from ivshmem import protocol
from ivshmem.errors import NoFreeId


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
        # For each id that left while somebody knew it: who was connected then.
        self.quarantine: dict[int, set[int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "roster"):
            try:
                self.everyone_reads()
            finally:
                self.patch.undo()

    def free_ids(self) -> set[int]:
        here = {client.key for client in self.clients}
        taken = {client.id for client in self.clients}
        unsafe = {peer for peer, witnesses in self.quarantine.items() if witnesses & here}
        return set(range(self.ids)) - taken - unsafe

    # -- what happens -----------------------------------------------------------------------------

    @rule()
    def join(self) -> None:
        free = self.free_ids()
        assert self.roster.full == (not free)
        if not free:
            with pytest.raises(NoFreeId):
                self.roster.join([0] * self.roster.vectors)
            return
        client = Client(self.roster, self.joined)
        self.joined += 1
        assert client.id == min(free), "not the lowest id that is safe"
        for other in self.clients:
            assert client.id not in other.qemu.alive
            assert client.id not in other.qemu.left, "somebody was told of this id before"
        self.quarantine.pop(client.id, None)
        self.clients.append(client)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.clients), label="who leaves")
        self.clients.remove(client)
        knowing = [c for c in self.clients if client.id in c.qemu.alive]
        assert self.roster.leave(client.member) == [c.member for c in knowing]
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

    @rule()
    def everyone_reads(self) -> None:
        for client in self.clients:
            client.send_all()
        for client in self.clients:
            client.check_knows(self.clients)
            assert not client.member.owed

    # -- what always holds ------------------------------------------------------------------------

    @invariant()
    def memory_is_bounded(self) -> None:
        if not hasattr(self, "roster"):
            return
        here = {client.id for client in self.clients}
        for client in self.clients:
            owed = list(client.member.owed)
            assert len(owed) == len(set(owed))
            # Exactly those that it was told of and that are gone: never more than it was told.
            assert set(owed) == set(client.qemu.alive) - here
        roster = self.roster
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


TestRosters = Rosters.TestCase
TestRosters.settings = settings(max_examples=300, stateful_step_count=60)
