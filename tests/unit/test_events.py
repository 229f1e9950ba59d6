"""Events are told apart by their kind: a join is not a leave of the same peer."""

from __future__ import annotations

import itertools

import pytest

from ivshmem import Disconnected, Interrupt, PeerJoined, PeerLeft

EVENTS = [PeerJoined(1), PeerLeft(1), PeerJoined(2), Interrupt(1, 1), Disconnected("gone")]


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(EVENTS, 2)])
def test_different_events_are_not_equal(one: object, other: object) -> None:
    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("event", EVENTS)
def test_equal_to_its_like(event: object) -> None:
    assert event == eval(repr(event))  # noqa: S307


def test_shown_as_written() -> None:
    assert repr(PeerJoined(1)) == "PeerJoined(peer=1)"
    assert repr(Interrupt(1, 2)) == "Interrupt(vector=1, rings=2)"
    assert Interrupt(vector=1, rings=2).rings == 2
