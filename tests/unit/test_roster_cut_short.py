"""A peer leaves in the midst of its announcement: whoever was told of a part is told the rest.

Each example cuts an announcement short, so that a mistake shows in the first ones; in the general
machine, test_roster_properties, it takes luck to get there. A client learns from an announcement
how many vectors everybody has: one that never ends, neither wholly nor by a leave, teaches it a
wrong number for ever.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.members import NOBODY_FD, Client, make_roster, token

from ivshmem.protocol.roster import Roster

GREETING = 3


class Case(NamedTuple):
    """Attributes:
    vectors: of everybody.
    before: how many peers the listener was told of wholly.
    part: how many vectors of the next one, which leaves then.
    after: how many others there are, of whom it has not heard.
    holds: whether the listener is told of no leave, from its join on.
    """

    vectors: int
    before: int
    part: int
    after: int
    holds: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vectors = draw(st.integers(2, 6))
    return Case(
        vectors,
        draw(st.integers(0, 3)),
        draw(st.integers(1, vectors - 1)),
        draw(st.integers(0, 2)),
        draw(st.booleans()),
    )


def cut_short(case: Case) -> tuple[list[Client], Client, Client]:
    """Those who stay, the listener among them; the listener; the one that has left."""
    roster = make_roster(case.vectors)
    everyone = [Client(roster, key) for key in range(case.before + 1 + case.after)]
    listener = Client(roster, len(everyone), holds=case.holds)
    sent = GREETING + case.before * case.vectors + case.part
    assert listener.send(sent) == sent
    gone = everyone.pop(case.before)
    roster.leave(gone.member)
    return [*everyone, listener], listener, gone


def ends_well(stay: list[Client], listener: Client, gone: Client, case: Case) -> None:
    listener.send_all()
    listener.check_knows(stay)
    assert listener.session.vectors == case.vectors
    if listener.member.no_leaves:
        wanted = [token(gone.key, n) for n in range(case.part)]
        assert listener.qemu.alive[gone.id] == wanted + [NOBODY_FD] * (case.vectors - case.part)
    else:
        assert listener.qemu.left == {gone.id}


@settings(max_examples=50)
@given(case=cases(), steps=st.lists(st.integers(1, 9), max_size=6))
def test_the_rest_comes_in_whatever_pieces(case: Case, steps: list[int]) -> None:
    stay, listener, gone = cut_short(case)
    for count in steps:
        listener.send(count)
    ends_well(stay, listener, gone, case)


@settings(max_examples=50)
@given(case=cases(), later=st.integers(0, 3))
def test_it_begins_to_hold_at_any_time(case: Case, later: int) -> None:
    """Also when the leave is out already: then that is enough."""
    stay, listener, gone = cut_short(case)
    sent = listener.send(later)
    was_told = gone.id in listener.qemu.left
    listener.roster.stop_leaves(listener.member)
    listener.send_all()
    listener.check_knows(stay)
    assert listener.session.vectors == case.vectors
    assert (gone.id in listener.qemu.alive) == (not was_told)
    assert sent == later or not case.holds


@settings(max_examples=50)
@given(case=cases(), then=st.sampled_from(["leaves", "mutes", "succeeds"]))
def test_something_happens_in_between(case: Case, then: str) -> None:
    """Another one leaves; the listener is held for a time; a successor takes over."""
    stay, listener, gone = cut_short(case)
    roster = listener.roster
    if then == "leaves" and len(stay) > 1:
        roster.leave(stay.pop(0).member)
    elif then == "mutes":
        roster.pause(listener.member)
        listener.send_all()
        assert listener.is_set_up, "a set-up is completed"
        roster.resume(listener.member)
    elif then == "succeeds":
        take_over(roster, stay)
    listener.send_all()
    listener.check_knows(stay)
    assert listener.session.vectors == case.vectors
    assert (gone.id in listener.qemu.alive) == case.holds


def take_over(old: Roster, stay: list[Client]) -> None:
    new = make_roster(old.vectors)
    new.load(old.dump(), [0] * old.vectors)
    for client, member in zip(
        sorted(stay, key=lambda c: c.member.serial), new.members, strict=True
    ):
        member.give_vectors(client.member.vectors)
        client.member, client.roster = member, new


@pytest.mark.parametrize("holds", [False, True])
def test_the_example_of_two_vectors(holds: bool) -> None:
    """A joins; B joins and is sent its greeting and A's vector 0; A leaves; B is sent the rest."""
    case = Case(vectors=2, before=0, part=1, after=0, holds=holds)
    ends_well(*cut_short(case), case)
