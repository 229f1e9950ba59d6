"""Whatever a server sends, a session answers with events or ProtocolError, and nothing else.

Every descriptor that came is accounted for exactly once: in an event, in the message that failed,
in those behind it, or held by the framer.
"""

from __future__ import annotations

import contextlib

from hypothesis import example, given
from hypothesis import strategies as st

from ivshmem import ProtocolError
from ivshmem.protocol.framing import Framer, encode
from ivshmem.protocol.session import GotMemory, GotVector, Session, SessionState

VALUES = st.one_of(
    st.sampled_from([-2, -1, 0, 1, 2, 3, 65535, 65536]),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
# How many descriptors come with it, and whether set-up is said to be over after it.
MESSAGES = st.tuples(
    VALUES, st.sampled_from([0, 0, 1, 1, 1, 2]), st.sampled_from([None, None, None, False, True])
)
GREETING = [(0, 0, None), (1, 0, None), (-1, 1, None)]


@given(
    begin=st.integers(0, 3),
    script=st.lists(MESSAGES, max_size=40),
    vectors=st.one_of(st.none(), st.integers(0, 3)),
    cut=st.integers(1, 8),
)
@example(begin=3, script=[(1, 1, True), (2, 1, None)], vectors=None, cut=8)
@example(begin=3, script=[(2, 1, None), (2, 0, None), (1, 1, None)], vectors=None, cut=3)
def test_events_or_protocol_error(
    begin: int,
    script: list[tuple[int, int, bool | None]],
    vectors: int | None,
    cut: int,
) -> None:
    session, framer = Session(vectors), Framer()
    came: list[int] = []
    accounted: list[int] = []
    for value, count, over in GREETING[:begin] + script:
        fds = tuple(range(len(came), len(came) + count))
        came += fds
        data = encode(value)
        # Descriptors come with the first byte, wherever the message is cut.
        messages = [
            *framer.feed(data[:cut], fds),
            *(framer.feed(data[cut:]) if cut < 8 else ()),
        ]
        assert [m.value for m in messages] == [value]
        before = session.state
        try:
            event = session.receive(messages[0])
        except ProtocolError:
            assert session.state is SessionState.FAILED
            accounted += messages[0].fds
            continue
        assert before is not SessionState.FAILED
        if isinstance(event, GotMemory | GotVector):
            accounted.append(event.fd)
            assert messages[0].fds == (event.fd,)
        else:
            assert messages[0].fds == ()
        if over is not None:
            with contextlib.suppress(ProtocolError):
                session.end_setup(guessed=over)
            assert session.state is not SessionState.SETUP
        peers = session.peers
        assert peers == sorted(set(peers))
        assert session.id not in peers
        assert session.vectors is None or session.vectors >= 0
    assert accounted == came
    assert framer.held == ()


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.integers(0, 2)), max_size=20))
def test_garbage(chunks: list[tuple[bytes, int]]) -> None:
    session, framer = Session(), Framer()
    came: list[int] = []
    accounted: list[int] = []
    for data, count in chunks:
        fds = tuple(range(len(came), len(came) + count))
        came += fds
        for message in framer.feed(data, fds):
            try:
                event = session.receive(message)
            except ProtocolError:
                accounted += message.fds
            else:
                if isinstance(event, GotMemory | GotVector):
                    accounted.append(event.fd)
    assert accounted + list(framer.held) == came
