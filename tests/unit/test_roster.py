"""Examples of what a server's roster decides: who is told what, and which id is safe to give.

The general case is test_roster_properties.
"""

from __future__ import annotations

import sys
from collections.abc import Sized

import pytest
from support.members import MEMORY_FD, NOBODY_FD, Client, make_roster, token

from ivshmem import NoFreeId
from ivshmem.protocol.limits import MAX_ID
from ivshmem.protocol.roster import Member, Roster, Run, Told


def joined(roster: Roster, count: int, key: int = 0) -> list[Client]:
    return [Client(roster, key + n) for n in range(count)]


def told(client: Client, limit: int = 1024) -> list[tuple[int, int, int]]:
    """What is pending: value, number of the first vector, how many messages."""
    return [
        (run.value, run.first, run.length) for run in client.roster.pending(client.member, limit)
    ]


# -- set-up ---------------------------------------------------------------------------------------


def test_an_only_client() -> None:
    roster = make_roster(2)
    (client,) = joined(roster, 1)
    memory: Sized = [MEMORY_FD]
    assert roster.pending(client.member) == [
        Run(0, None, 0, 1),
        Run(0, None, 0, 1),
        Run(-1, memory, 0, 1),
        Run(0, [token(0, 0), token(0, 1)], 0, 2, client.member),
    ]
    client.send_all()
    client.check_knows([client])


def test_others_come_before_own_vectors() -> None:
    roster = make_roster(1)
    first, second, third = joined(roster, 3)
    assert [run[0] for run in told(second)] == [0, 1, -1, 0, 1, 2]
    for client in (first, second, third):
        client.send_all()
        client.check_knows([first, second, third])


def test_set_up_is_complete_with_the_last_own_vector() -> None:
    roster = make_roster(3)
    joined(roster, 1)
    second = Client(roster, 1)
    total = 3 + 3 + 3
    for done in range(1, total + 1):
        assert second.send(1) == 1
        assert roster.is_set_up(second.member) == (done == total)


def test_no_vectors() -> None:
    roster = make_roster(0)
    first, second = joined(roster, 2)
    assert first.send(2) == 2
    assert not roster.is_set_up(first.member)
    assert first.send(9) == 1
    assert roster.is_set_up(first.member)
    second.send_all()
    assert not roster.leave(second.member)
    assert told(first) == []
    assert Client(roster, 2).id == 1, "nobody was told of it"


@pytest.mark.parametrize("vectors", [-1, 2049])
def test_a_number_of_vectors_that_no_device_has(vectors: int) -> None:
    with pytest.raises(ValueError, match=f"{vectors} vectors: allowed are 0 to 2048"):
        Roster(vectors, [MEMORY_FD], [NOBODY_FD])


def test_a_member_with_another_number_of_vectors() -> None:
    roster = make_roster(2)
    with pytest.raises(ValueError, match="3 vectors given, 2 wanted"):
        roster.join([1, 2, 3])
    assert not roster.members
    assert Client(roster, 0).id == 0


# -- leaves ---------------------------------------------------------------------------------------


def test_a_peer_that_was_never_announced_is_never_mentioned() -> None:
    roster = make_roster(1)
    first, second = joined(roster, 2)
    first.send(4)  # its set-up; nothing of the second
    assert not roster.leave(second.member)
    assert told(first) == []


def test_one_leave_for_one_announced() -> None:
    roster = make_roster(2)
    first, second = joined(roster, 2)
    first.send_all()
    assert roster.leave(second.member)
    assert told(first) == [(1, 0, 1)]
    first.send_all()
    assert first.qemu.left == {1}


@pytest.mark.parametrize("sent", [1, 2, 3])
def test_leave_in_mid_announcement(sent: int) -> None:
    """The rest of the vectors would be wrong to send; the leave must be."""
    roster = make_roster(4)
    first, second = joined(roster, 2)
    first.send(3 + 4 + sent)
    assert told(first) == [(1, sent, 4 - sent)]
    assert roster.leave(second.member)
    assert told(first) == [(1, 0, 1)]
    first.send_all()
    first.check_knows([first])


def test_leaves_wait_for_the_end_of_an_announcement() -> None:
    roster = make_roster(2)
    first, second, _third = joined(roster, 3)
    first.send(3 + 2 + 2 + 1)
    roster.leave(second.member)
    assert told(first) == [(2, 1, 1), (1, 0, 1)]


def test_one_that_leaves_while_it_is_greeted() -> None:
    roster = make_roster(1)
    first, second = joined(roster, 2)
    second.send(2)
    roster.leave(second.member)
    first.send_all()
    assert first.qemu.left == set()


def test_whoever_is_not_connected_cannot_leave() -> None:
    roster = make_roster(1)
    first, second = joined(roster, 2)
    roster.leave(first.member)
    with pytest.raises(ValueError, match="peer 0 is not connected"):
        roster.leave(first.member)
    other = Client(make_roster(1), 0)
    with pytest.raises(ValueError, match="peer 0 is not connected"):
        roster.leave(other.member)
    assert roster.members == [second.member]


def test_limit_keeps_runs_short() -> None:
    roster = make_roster(2)
    clients = joined(roster, 100)
    assert sum(run[2] for run in told(clients[0])) == 3 + 200
    assert sum(run[2] for run in told(clients[0], limit=10)) <= 3 + 10 + 2
    assert told(clients[0], limit=0), "no progress"


# -- ids ------------------------------------------------------------------------------------------


def test_ids_are_the_lowest() -> None:
    roster = make_roster(1)
    clients = joined(roster, 4)
    assert [c.id for c in clients] == [0, 1, 2, 3]
    roster.leave(clients[2].member)
    roster.leave(clients[1].member)
    assert [c.id for c in joined(roster, 3, 4)] == [1, 2, 4]


def test_an_id_that_somebody_was_told_of_is_not_used_again() -> None:
    roster = make_roster(1)
    first, second = joined(roster, 2)
    first.send_all()
    roster.leave(second.member)
    assert Client(roster, 2).id == 2
    first.send_all()  # also when it has read the leave
    assert Client(roster, 3).id == 3
    roster.leave(first.member)
    # Nobody is left who was told of 1. (0 was told to nobody: the others have read nothing.)
    assert [Client(roster, key).id for key in (4, 5)] == [0, 1]


def test_part_of_an_announcement_is_enough() -> None:
    roster = make_roster(2)
    first, second = joined(roster, 2)
    first.send(3 + 2 + 1)
    roster.leave(second.member)
    assert Client(roster, 2).id == 2


def test_everybody_gone_everything_free() -> None:
    roster = make_roster(1)
    for generation in range(5):
        clients = joined(roster, 10, generation * 10)
        assert [c.id for c in clients] == list(range(10))
        for client in clients:
            client.send_all()
        for client in clients:
            roster.leave(client.member)


def test_ids_run_out() -> None:
    roster = make_roster(1)
    members = [roster.join([token(0, 0)]) for _ in range(MAX_ID + 1)]
    assert members[-1].id == MAX_ID
    assert roster.full
    with pytest.raises(NoFreeId, match="all 65536 ids are taken or known to a connected peer"):
        roster.join([0])
    assert len(roster.members) == MAX_ID + 1
    roster.leave(members[777])
    assert not roster.full
    assert roster.join([0]).id == 777


# -- a long life ----------------------------------------------------------------------------------

MANY = 70_000  # more than there are ids


def footprint(roster: Roster) -> int:
    """Entries in all that the roster and its members hold."""
    held = [*vars(roster).values()]
    told = {id(member.told): member.told for member in roster.members}.values()
    held += [getattr(member, name) for member in roster.members for name in Member.__slots__]
    held += [getattr(standing, name) for standing in told for name in Told.__slots__]
    return sum(len(value) for value in held if isinstance(value, Sized) and type(value) is not Run)


def test_many_come_and_go_and_nobody_stays() -> None:
    roster = make_roster(1)
    for key in range(MANY):
        member = roster.join([key])
        assert member.id == 0
        roster.leave(member)
    assert footprint(roster) < 10


def test_many_come_and_go_past_one_that_does_not_read() -> None:
    """It is told of nobody, so nothing has to be remembered and no id is used up."""
    roster = make_roster(1)
    stayer = Client(roster, 0)
    for key in range(MANY):
        member = roster.join([key])
        assert member.id == 1
        roster.leave(member)
    assert footprint(roster) < 10
    assert not stayer.member.told.leaves_due


@pytest.mark.nightly
def test_many_come_and_go_past_one_that_reads() -> None:
    """It knows every id once, and then there is none left that is safe: never a second use."""
    roster = make_roster(1)
    stayer = Client(roster, 0)
    for key in range(1, MAX_ID + 1):
        client = roster.join([token(key, 0)])
        stayer.send_all()
        roster.leave(client)
        stayer.send_all()
    assert stayer.qemu.left == set(range(1, MAX_ID + 1))
    with pytest.raises(NoFreeId):
        roster.join([0])
    assert footprint(roster) <= MAX_ID + 10
    stayer.check_knows([stayer])
    roster.leave(stayer.member)
    assert [roster.join([0]).id for _ in range(3)] == [0, 1, 2]


def test_leaves_owed_are_bounded_by_what_was_told() -> None:
    roster = make_roster(1)
    stayer = Client(roster, 0)
    crowd = joined(roster, 100, 1)
    stayer.send_all()
    for client in crowd:
        roster.leave(client.member)
    for key in range(1000, 6000):  # while it does not read
        roster.leave(roster.join([key]))
    assert len(stayer.member.told.leaves_due) == 100
    stayer.send_all()
    stayer.check_knows([stayer])


def test_peers_cost_no_square() -> None:
    """N peers that all know each other do not take N x N entries."""
    roster = make_roster(1)
    clients = joined(roster, 200)
    for client in clients:
        client.send_all()
    assert footprint(roster) < 200 * 6
    assert sys.getsizeof(clients[0].member) < 200


# -- clients that share an id ---------------------------------------------------------------------


def shared_roster(vectors: int) -> Roster:
    return Roster(vectors, [MEMORY_FD], [NOBODY_FD], shared_id=5)


def test_clients_of_a_shared_id_do_not_hear_of_one_another() -> None:
    roster = shared_roster(2)
    first, second = joined(roster, 2)
    assert first.id == second.id == 5
    for client in (first, second):
        client.send_all()
        client.check_knows([client])
    assert not roster.leave(first.member)
    assert told(second) == []
    third = Client(roster, 2)
    third.send_all()
    third.check_knows([third])


def test_who_is_admitted_is_announced_to_all_and_leaves() -> None:
    roster = shared_roster(2)
    early, late = Client(roster, 0), Client(roster, 1)
    early.send_all()
    remote = roster.announce_remote(9, [token(9, 0), token(9, 1)])
    assert told(early) == [(9, 0, 2)]
    for client in (early, late):
        client.send_all()
        assert client.session.peers == [9]
        assert client.qemu.alive[9] == [token(9, 0), token(9, 1)]
    assert roster.leave(remote)
    for client in (early, late):
        client.send_all()
        client.check_knows([client])


def test_a_crowd_of_a_shared_id_hides_nobody() -> None:
    """What is pending is limited by what is announced, not by who stands between."""
    roster = shared_roster(1)
    first = Client(roster, 0)
    first.send_all()
    joined(roster, 50, 1)
    roster.announce_remote(9, [token(9, 0)])
    assert told(first, limit=1) == [(9, 0, 1)]


def test_one_caught_in_the_middle_of_an_announcement() -> None:
    roster = shared_roster(3)
    client = Client(roster, 0)
    client.send_all()
    remote = roster.announce_remote(9, [token(9, v) for v in range(3)])
    client.send(1)
    roster.leave(remote)
    assert told(client) == [(9, 0, 1)]
    client.send_all()
    client.check_knows([client])


def test_a_shared_id_wants_admittance_and_nobody_else_has_it() -> None:
    with pytest.raises(ValueError, match="cannot be admitted"):
        make_roster(1).announce_remote(9, [0])
    with pytest.raises(ValueError, match="cannot be admitted"):
        shared_roster(1).announce_remote(5, [0])
    with pytest.raises(ValueError, match="cannot be admitted"):
        shared_roster(2).announce_remote(9, [0])


# -- one that leaves in the midst of its announcement ----------------------------------------------


def cut_short(*, holds: bool) -> tuple[Client, Client]:
    """B joins after A, is sent its greeting and one of A's two vectors; then A leaves."""
    roster = make_roster(2)
    a = Client(roster, 0)
    b = Client(roster, 1, holds=holds)
    assert b.send(4) == 4
    roster.leave(a.member)
    return a, b


def test_what_was_cut_short_ends_with_a_leave() -> None:
    a, b = cut_short(holds=False)
    assert told(b) == [(a.id, 0, 1), (b.id, 0, 2)]
    b.send_all()
    b.check_knows([b])
    assert b.qemu.left == {a.id}


def test_what_was_cut_short_is_completed_for_one_that_is_told_of_no_leave() -> None:
    """It would believe for ever that everybody has one vector."""
    a, b = cut_short(holds=True)
    assert b.roster.backlog(b.member) == 3
    b.send_all()
    b.check_knows([b])
    assert b.session.vectors == 2
    assert b.qemu.alive[a.id] == [token(0, 0), NOBODY_FD]
    assert b.qemu.left == set()
    assert b.member.told.leaves_held == 1
    newcomer = Client(b.roster, 2)
    assert newcomer.id not in (a.id, b.id), "it was told of that id"


def test_what_was_cut_short_is_completed_when_it_begins_to_hold_later() -> None:
    a, b = cut_short(holds=False)
    b.roster.stop_leaves(b.member)
    b.send_all()
    b.check_knows([b])
    assert b.qemu.alive[a.id] == [token(0, 0), NOBODY_FD]


@pytest.mark.parametrize("sent", range(1, 7))
def test_wherever_it_is_cut_short(sent: int) -> None:
    """Also where the rest is sent one by one."""
    roster = make_roster(7)
    a = Client(roster, 0)
    b = Client(roster, 1, holds=True)
    b.send(3 + sent)
    roster.leave(a.member)
    while b.send(1):
        pass
    b.check_knows([b])
    assert b.qemu.alive[a.id].count(NOBODY_FD) == 7 - sent


# -- one that is sent nothing for now -------------------------------------------------------------


def three(*, holds: bool = False) -> tuple[Roster, list[Client]]:
    """All of them know everything; the first is muted."""
    roster = make_roster(2)
    clients = [Client(roster, 0, holds=holds), *joined(roster, 2, 1)]
    for client in clients:
        client.send_all()
    roster.pause(clients[0].member)
    return roster, clients


def test_who_is_muted_is_sent_nothing() -> None:
    roster, (muted, other, _) = three()
    newcomer = Client(roster, 3)
    roster.leave(other.member)
    assert told(muted) == []
    assert roster.backlog(muted.member) == 3, "which waits for it"
    assert muted.member.serial not in roster.caught_up
    newcomer.send_all()


def test_then_it_is_told_the_difference() -> None:
    roster, (muted, other, third) = three()
    newcomer, passer = Client(roster, 3), Client(roster, 4)
    for client in (newcomer, passer, third):
        client.send_all()
    roster.leave(other.member)
    roster.leave(passer.member)
    roster.resume(muted.member)
    assert told(muted) == [(other.id, 0, 1), (newcomer.id, 0, 2)], "of the passer it never hears"
    for client in (muted, third, newcomer):
        client.send_all()
        client.check_knows([muted, third, newcomer])
    assert set(roster.caught_up) == {client.member.serial for client in (muted, third, newcomer)}


def test_one_that_is_told_of_no_leave_hears_of_joins_only() -> None:
    roster, (muted, other, third) = three(holds=True)
    newcomer = Client(roster, 3)
    roster.leave(other.member)
    roster.resume(muted.member)
    assert told(muted) == [(newcomer.id, 0, 2)]
    assert muted.qemu.left == set()
    assert third.member.serial in roster.caught_up


def test_the_id_of_one_that_left_while_another_is_muted_is_not_used_again() -> None:
    roster, (muted, other, third) = three()
    roster.leave(other.member)
    roster.leave(third.member)
    assert Client(roster, 3).id == 3
    roster.resume(muted.member)
    muted.send_all()
    assert muted.qemu.left == {1, 2}


def test_an_id_that_no_muted_one_was_told_of_is_used_again() -> None:
    roster, (muted, other, third) = three()
    passer = Client(roster, 3)
    roster.leave(passer.member)
    again = Client(roster, 4)
    assert again.id == passer.id
    roster.resume(muted.member)
    for client in (muted, other, third, again):
        client.send_all()
        client.check_knows([muted, other, third, again])


def test_a_set_up_is_completed_though_it_is_muted() -> None:
    """QEMU waits for it for ever; but of those who came later it is told nothing."""
    roster = make_roster(2)
    elder, muted, later = joined(roster, 3)
    muted.send(4)
    roster.pause(muted.member)
    assert told(muted) == [(elder.id, 1, 1), (muted.id, 0, 2)]
    muted.send_all()
    assert muted.is_set_up
    assert set(muted.qemu.alive) == {elder.id, muted.id}
    roster.resume(muted.member)
    muted.send_all()
    muted.check_knows([elder, muted, later])


def test_muted_amid_an_announcement() -> None:
    roster, (muted, _, _) = three()
    roster.resume(muted.member)
    newcomer = Client(roster, 3)
    muted.send(1)
    roster.pause(muted.member)
    assert told(muted) == []
    roster.leave(newcomer.member)
    roster.resume(muted.member)
    assert told(muted) == [(newcomer.id, 0, 1)]


def test_muting_twice_is_as_once() -> None:
    roster, (muted, *_) = three()
    roster.pause(muted.member)
    roster.resume(muted.member)
    roster.resume(muted.member)
    assert muted.member.serial in roster.caught_up


@pytest.mark.parametrize("vectors", [0, 3])
def test_what_is_muted_survives_a_dump(vectors: int) -> None:
    roster = make_roster(vectors)
    clients = joined(roster, 3)
    roster.pause(clients[1].member)
    loaded = make_roster(vectors)
    loaded.load(roster.dump(), range(vectors))
    assert [member.paused for member in loaded.members] == [False, True, False]
    assert loaded.dump() == roster.dump()


def test_a_dump_of_an_older_version_is_read() -> None:
    """It says nothing of who is muted, and of what was cut short."""
    roster = make_roster(2)
    for client in joined(roster, 2):
        client.send(4)
    state = roster.dump()
    assert "muted" not in state
    assert all(len(standing) == 7 for _, _, standing, *_ in state["members"] if standing)
    loaded = make_roster(2)
    loaded.load(state, range(2))
    assert loaded.dump() == state
