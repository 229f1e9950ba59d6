"""Events are told apart by their kind: a join is not a leave of the same peer."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest

from ivshmem import Disconnected, IdChanged, Interrupt, PeerJoined, PeerLeft

EVENTS = [
    *(PeerJoined(1), PeerLeft(1), PeerJoined(2), Interrupt(1, 1), IdChanged(1, 1)),
    Disconnected("gone"),
]


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(EVENTS, 2)])
def test_different_events_are_not_equal(one: object, other: object) -> None:
    assert one != other
    assert other != one
    assert len({one, other}) == 2


@pytest.mark.parametrize("event", EVENTS)
def test_equal_to_its_like(event: object) -> None:
    assert event == eval(repr(event))  # noqa: S307


def test_shown_as_written() -> None:
    assert repr(PeerJoined(1)) == "PeerJoined(peer=1)"
    assert repr(Interrupt(1, 2)) == "Interrupt(vector=1, rings=2)"
    assert Interrupt(vector=1, rings=2).rings == 2


@pytest.mark.parametrize("event", [event for event in EVENTS if not isinstance(event, tuple)])
def test_as_a_frozen_dataclass(event: object) -> None:
    (name, *_) = event.__match_args__  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="does not change"):
        setattr(event, name, 5)
    with pytest.raises(AttributeError, match="does not change"):
        delattr(event, name)
    assert pickle.loads(pickle.dumps(event)) == copy.copy(event) == event  # noqa: S301
    match event:
        case PeerJoined(peer) | PeerLeft(peer):
            assert peer in (1, 2)
        case IdChanged(before, id):
            assert (before, id) == (1, 1)
        case _:
            assert isinstance(event, Disconnected)
