"""A client's session: legal and illegal sequences, what each message means, what is learnt.

Also that a failed session stays failed, and that each error says what was got and what is allowed.
"""

from __future__ import annotations

import pytest

from ivshmem import ProtocolError
from ivshmem.protocol.framing import Message
from ivshmem.protocol.session import GotLeave, GotMemory, GotVector, Session, SessionState
from ivshmem.text import counted

# Messages in short: a number, or a number with descriptors.
Short = int | tuple[int, ...]

GREETING: list[Short] = [0, 3, (-1, 50)]  # version, own id, memory


def message(short: Short) -> Message:
    return Message(short) if isinstance(short, int) else Message(short[0], short[1:])


def feed(session: Session, *shorts: Short) -> list[object]:
    return [session.receive(message(short)) for short in shorts]


def state_of(session: Session) -> SessionState:
    """A call, so that mypy does not take it for unchanged."""
    return session.state


def greeted(vectors: int | None = None) -> Session:
    session = Session(vectors)
    feed(session, *GREETING)
    return session


# -- the order of things --------------------------------------------------------------------------


def test_states_in_order() -> None:
    session = Session()
    assert (session.state, session.id) == (SessionState.VERSION, -1)
    assert feed(session, 0) == [None]
    assert (session.state, session.id) == (SessionState.ID, -1)
    assert feed(session, 3) == [None]
    assert (session.state, session.id) == (SessionState.MEMORY, 3)
    assert feed(session, (-1, 50)) == [GotMemory(50)]
    assert (session.state, session.id) == (SessionState.SETUP, 3)
    assert session.vectors is None
    assert session.peers == []


ILLEGAL: list[tuple[str, list[Short], str]] = [
    ("version 1", [1], "the server speaks protocol version 1, this client only 0"),
    ("version -1", [-1], "the server speaks protocol version -1, this client only 0"),
    (
        "a descriptor first",
        [(0, 50)],
        "the server began with a descriptor instead of its protocol version",
    ),
    ("id -1", [0, -1], "the server gave id -1, allowed are 0 to 65535"),
    ("id 65536", [0, 65536], "the server gave id 65536, allowed are 0 to 65535"),
    ("id with a descriptor", [0, (3, 50)], "id 3"),
    (
        "no memory but a peer",
        [0, 3, (4, 50)],
        "expected the memory (message -1 with a descriptor), got message 4 with 1",
    ),
    (
        "memory without its descriptor",
        [0, 3, -1],
        "expected the memory (message -1 with a descriptor), got message -1 with 0",
    ),
    (
        "memory with two",
        [0, 3, (-1, 50, 51)],
        "message -1 came with 2 descriptors, not 0 or 1",
    ),
    ("two on a vector", [*GREETING, (4, 50, 51)], "message 4 came with 2 descriptors"),
    ("memory again", [*GREETING, (-1, 51)], "message -1 is not a peer id (0 to 65535)"),
    ("peer 65536", [*GREETING, (65536, 51)], "message 65536 is not a peer id (0 to 65535)"),
    ("leave of -2", [*GREETING, -2], "message -2 is not a peer id (0 to 65535)"),
    (
        "own leave",
        [*GREETING, (3, 51), 3],
        "the server says that this client itself (3) has left",
    ),
    (
        "own leave at once",
        [*GREETING, 3],
        "the server says that this client itself (3) has left",
    ),
    (
        "more own vectors than a peer's",
        [*GREETING, (4, 51), (3, 52), (3, 53)],
        "peer 3 was announced with more than 1 vector",
    ),
    (
        "a second peer with more",
        [*GREETING, (4, 51), (5, 52), (5, 53)],
        "peer 5 was announced with more than 1 vector",
    ),
    (
        "a peer goes on after its group has ended",
        [*GREETING, (4, 51), (5, 52), (4, 53)],
        "peer 4 was announced with more than 1 vector",
    ),
]


@pytest.mark.parametrize(
    ("shorts", "text"), [case[1:] for case in ILLEGAL], ids=[case[0] for case in ILLEGAL]
)
def test_illegal(shorts: list[Short], text: str) -> None:
    session = Session()
    feed(session, *shorts[:-1])
    with pytest.raises(ProtocolError) as caught:
        feed(session, shorts[-1])
    assert text in str(caught.value)
    assert state_of(session) is SessionState.FAILED
    for anything in (0, 3, (-1, 50), (4, 51)):
        with pytest.raises(ProtocolError, match="has failed before"):
            feed(session, anything)
    assert state_of(session) is SessionState.FAILED


@pytest.mark.parametrize("vectors", [0, 1, 5])
def test_more_than_were_promised(vectors: int) -> None:
    session = greeted(vectors)
    feed(session, *[(4, 60 + v) for v in range(vectors)])
    with pytest.raises(ProtocolError, match=f"peer 4 .* more than {counted(vectors, 'vector')}$"):
        feed(session, (4, 99))


def test_more_than_a_device_has() -> None:
    session = greeted()
    feed(session, *[(4, 60) for _ in range(2048)])
    with pytest.raises(ProtocolError, match=r"peer 4 .* more than 2048 vectors"):
        feed(session, (4, 60))


# -- what is learnt -------------------------------------------------------------------------------


def test_first_group_tells_the_number_of_vectors() -> None:
    session = greeted()
    assert feed(session, (4, 60), (4, 61)) == [
        GotVector(4, 0, 60, whole=False),
        GotVector(4, 1, 61, whole=False),
    ]
    assert session.vectors is None
    assert session.peers == []
    assert feed(session, (5, 62), (5, 63)) == [
        GotVector(5, 0, 62, whole=False),
        GotVector(5, 1, 63, whole=True),
    ]
    assert session.vectors == 2
    assert session.peers == [4, 5]
    assert state_of(session) is SessionState.SETUP
    assert feed(session, (3, 64), (3, 65)) == [
        GotVector(3, 0, 64, whole=False),
        GotVector(3, 1, 65, whole=True),
    ]
    assert state_of(session) is SessionState.READY
    assert session.peers == [4, 5]


def test_one_peer_is_enough() -> None:
    session = greeted()
    feed(session, (4, 60), (4, 61), (3, 62))
    assert session.vectors == 2
    assert state_of(session) is SessionState.SETUP
    feed(session, (3, 63))
    assert state_of(session) is SessionState.READY


def test_known_beforehand() -> None:
    session = greeted(2)
    assert session.vectors == 2
    feed(session, (3, 60))
    assert state_of(session) is SessionState.SETUP
    feed(session, (3, 61))
    assert state_of(session) is SessionState.READY


def test_alone_until_told() -> None:
    session = greeted()
    feed(session, (3, 60), (3, 61))
    assert state_of(session) is SessionState.SETUP
    assert session.vectors is None
    session.end_setup()
    assert state_of(session) is SessionState.READY
    assert session.vectors == 2
    with pytest.raises(ProtocolError, match=r"peer 3 .* more than 2 vectors"):
        feed(session, (3, 62))


def test_no_vectors_at_all() -> None:
    session = greeted()
    session.end_setup()
    assert state_of(session) is SessionState.READY
    assert session.vectors == 0
    assert feed(session, 4) == [None], "the example server announces such peers by leaves only"
    with pytest.raises(ProtocolError, match="more than 0 vectors"):
        feed(session, (4, 60))


def test_a_guess_is_fixed() -> None:
    session = greeted()
    feed(session, (3, 60))
    session.end_setup(guessed=True)
    assert (session.state, session.vectors) == (SessionState.READY, 1)
    assert feed(session, (3, 61)) == [GotVector(3, 1, 61, whole=True)]
    assert session.vectors == 2
    feed(session, (4, 62), (4, 63))
    assert session.peers == [4]


def test_a_guess_does_not_unlearn() -> None:
    """The example server drops messages of a large set-up: own vectors may be missing for good."""
    session = greeted()
    feed(session, (4, 60), (4, 61), (5, 62), (5, 63))
    session.end_setup(guessed=True)
    assert state_of(session) is SessionState.READY
    assert session.vectors == 2
    assert session.peers == [4, 5]
    feed(session, (6, 64), (6, 65))
    assert session.peers == [4, 5, 6]


def test_a_guess_is_of_whoever_was_announced() -> None:
    """A server that was silent in the middle: nobody joins later without an event."""
    session = greeted()
    feed(session, (4, 60))
    session.end_setup(guessed=True)
    assert (session.vectors, session.peers) == (1, [4])
    assert feed(session, (3, 61)) == [GotVector(3, 0, 61, whole=True)]
    assert session.peers == [4]


def test_nobody_joins_twice_by_more_vectors() -> None:
    session = greeted()
    feed(session, (4, 60), (4, 61), (5, 62))
    session.end_setup(guessed=True)
    feed(session, (3, 63), (3, 64))
    with pytest.raises(ProtocolError, match="peer 3 was announced with more than 2 vectors"):
        feed(session, (3, 65))
    assert session.peers == [4]


@pytest.mark.parametrize("own", [0, 1, 3])
@pytest.mark.parametrize("guessed", [False, True])
def test_other_than_expected(own: int, guessed: bool) -> None:
    """Too many own vectors are an error at once, too few when set-up is over."""
    session = greeted(2)
    feed(session, *[(3, 60 + v) for v in range(min(own, 2))])
    with pytest.raises(ProtocolError) as caught:
        feed(session, (3, 62)) if own > 2 else session.end_setup(guessed=guessed)
    assert str(caught.value) == (
        f"the server gave {counted(own, 'vector')}, 2 were expected"
        if own < 2
        else "peer 3 was announced with more than 2 vectors"
    )
    assert state_of(session) is SessionState.FAILED


@pytest.mark.parametrize("begin", range(3))
def test_end_of_setup_before_setup_means_nothing(begin: int) -> None:
    session = Session()
    feed(session, *GREETING[:begin])
    before = session.state
    session.end_setup()
    assert session.state is before
    feed(session, *GREETING[begin:], (3, 60))
    assert state_of(session) is SessionState.SETUP


def test_end_of_setup_does_not_fix_a_failure() -> None:
    session = greeted()
    with pytest.raises(ProtocolError):
        feed(session, -2)
    session.end_setup()
    assert state_of(session) is SessionState.FAILED


# -- joins and leaves -----------------------------------------------------------------------------


def ready(vectors: int = 2) -> Session:
    session = greeted()
    feed(session, *[(3, 60 + v) for v in range(vectors)])
    session.end_setup()
    return session


def test_join_and_leave() -> None:
    session = ready()
    assert feed(session, (9, 70), (9, 71)) == [
        GotVector(9, 0, 70, whole=False),
        GotVector(9, 1, 71, whole=True),
    ]
    assert session.peers == [9]
    assert feed(session, 9) == [GotLeave(9, whole=True)]
    assert session.peers == []


def test_leave_in_mid_announcement() -> None:
    session = ready()
    feed(session, (9, 70))
    assert session.peers == []
    assert feed(session, 9) == [GotLeave(9, whole=False)]
    feed(session, (10, 72), (10, 73))
    assert session.peers == [10]


def test_leave_during_setup_teaches_nothing() -> None:
    session = greeted()
    feed(session, (4, 60), (4, 61))
    assert feed(session, 4) == [GotLeave(4, whole=False)]
    feed(session, (3, 62), (3, 63), (3, 64))
    assert session.vectors is None
    session.end_setup()
    assert session.vectors == 3


def test_leave_of_a_complete_peer_during_setup() -> None:
    session = greeted()
    feed(session, (4, 60), (4, 61), (5, 62))
    assert feed(session, 4) == [GotLeave(4, whole=True)]
    feed(session, (5, 63), (3, 64), (3, 65))
    assert state_of(session) is SessionState.READY
    assert session.peers == [5]


def test_leave_between_the_vectors_of_another() -> None:
    session = ready()
    feed(session, (9, 70), (9, 71), (10, 72))
    assert feed(session, 9) == [GotLeave(9, whole=True)]
    feed(session, (10, 73))
    assert session.peers == [10]


def test_leave_of_nobody_is_nothing() -> None:
    assert feed(ready(), 12) == [None]


def test_a_foreign_server_may_use_an_id_again() -> None:
    session = ready()
    feed(session, (9, 70), (9, 71), 9, (9, 72), (9, 73))
    assert session.peers == [9]


def test_extreme_ids() -> None:
    session = Session()
    feed(session, 0, 65535, (-1, 50), (0, 51), (65535, 52))
    assert session.id == 65535
    assert state_of(session) is SessionState.READY
    assert session.peers == [0]


def test_a_descriptor_that_is_refused() -> None:
    """Nobody was told of that peer, so there is none; the others stay."""
    session = greeted(vectors=2)
    feed(session, (3, 1), (3, 2), (5, 3), (5, 4), (7, 5), (7, 6))
    assert session.peers == [5, 7]
    session.refuse(7)
    assert session.peers == [5]
    assert state_of(session) is SessionState.FAILED
    with pytest.raises(ProtocolError, match="failed before"):
        feed(session, (9, 7))
