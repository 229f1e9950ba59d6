"""Histories of holding and releasing a peer's news, in a table: who comes, goes, asks and dies.

Each history is a line of words, done one after the other with real sockets. After each word, what
must hold then is checked: a held peer is sent nothing; it is held until, and not after, what ends
that; and at the end of each history it is told exactly what is different.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support.peer import RawPeer
from support.served import Served
from support.waiting import PATIENCE, until

from ivshmem import control

VECTORS = 2
LONG = 1e5  # seconds: no history waits for that
SHORT = 0.05
SECONDS = 1000.0  # that the test may take in between

_ASKER = """
import sys, time
from ivshmem.service import control_client
client = control_client.ControlClient(sys.argv[1], 60)
client.hold(int(sys.argv[2]), linger=float(sys.argv[3]))
print("HELD", flush=True)
time.sleep(600)
"""


class History:
    """The peer that is held is `me`; others have letters, askers numbers."""

    def __init__(self, path: str, undo: ExitStack) -> None:
        self._undo = undo
        self.served = undo.enter_context(Served(path, VECTORS, size=4096))
        self.control = control.default_path(path)
        self.path = path
        self.me = self._joined()
        self.others: dict[str, RawPeer] = {}
        self.askers: dict[str, control.ControlClient] = {}
        self.lasts = False  # whether nothing has ended it
        self.asked: dict[str, float] = {}  # the time that each asker named, since it began

    def _joined(self) -> RawPeer:
        return self._undo.enter_context(RawPeer(self.path)).set_up(VECTORS)

    @property
    def held(self) -> bool:
        return any(r.held for r in self.served.server().report() if r.peer.id == self.me.id)

    def reads(self) -> None:
        """It is told all that there is for it."""
        alive = {peer.id for peer in self.others.values()} | {self.me.id}
        self.me.take_until(
            lambda: (
                set(self.me.counts) - self.me.left >= alive
                and all(self.me.counts[each] == VECTORS for each in alive)
                and not (set(self.me.counts) - self.me.left) - alive
            )
        )

    # -- words ------------------------------------------------------------------------------------

    def join(self, who: str) -> None:
        self.others[who] = self._joined()

    def leave(self, who: str) -> None:
        count = len(self.served.server().peers)
        self.others.pop(who).close()
        until(lambda: len(self.served.server().peers) == count - 1)

    def evict(self, who: str) -> None:
        count = len(self.served.server().peers)
        self.served.server().evict(self.others.pop(who).id)
        until(lambda: len(self.served.server().peers) == count - 1)

    def hold(self, who: str, linger: float = LONG) -> None:
        if who not in self.askers:
            client = self._undo.enter_context(control.ControlClient(self.control, PATIENCE))
            self.askers[who] = client
        if not self.held:
            self.reads()
        self.askers[who].hold(self.me.id, linger=linger)
        self.lasts = True
        self.asked[who] = max(linger, self.asked.get(who, 0))

    def hold_briefly(self, who: str) -> None:
        self.hold(who, SHORT)

    def crash(self, who: str) -> None:
        """An asker that is a process of its own asks, and is killed."""
        if not self.held:
            self.reads()
        line = [sys.executable, "-c", _ASKER, self.control, str(self.me.id), who]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "HELD\n"
            process.send_signal(signal.SIGKILL)
        self.lasts = True
        self.asked[f"killed with {who}"] = float(who)
        self.settle()

    def release(self, who: str) -> None:
        client = self.askers.get(who) or self._undo.enter_context(
            control.ControlClient(self.control, PATIENCE)
        )
        assert client.release(self.me.id) is self.lasts
        self.lasts = False
        self.asked.clear()

    def hang_up(self, who: str) -> None:
        self.askers.pop(who).close()
        self.settle()

    def ends(self, _: str) -> None:
        """Without a word of ours, since its time is over."""
        until(lambda: not self.held)
        self.lasts = False
        self.asked.clear()

    def settle(self) -> None:
        """Until the server has noticed that the last asker is gone, if there is time for that."""
        if max(self.asked.values(), default=0) == LONG and not set(self.asked) & set(self.askers):
            until(lambda: any(r.held_until for r in self.served.server().report()))

    def check(self) -> None:
        """Also how long it lasts: for ever while an asker is there, then the longest of times."""
        assert self.held == self.lasts
        if self.lasts:
            until_when = next(r.held_until for r in self.served.server().report() if r.held)
            if set(self.asked) & set(self.askers):
                assert until_when is None
            else:
                assert until_when is not None
                assert until_when - time.time() > max(self.asked.values()) - SECONDS
            # Others are told of somebody now, and the held one is not.
            with RawPeer(self.path) as witness:
                witness.set_up(VECTORS)
                assert not self.me.readable(0)
            until(lambda: len(self.served.server().peers) == len(self.others) + 1)
        else:
            self.reads()


HISTORIES = [
    # News of each kind, before, in, and after.
    "hold 1, join a, release 1",
    "join a, hold 1, leave a, release 1",
    "join a, hold 1, leave a, join b, release 1",
    "hold 1, join a, leave a, release 1",
    "hold 1, join a, leave a, join b, leave b, join c, release 1",
    "join a, hold 1, evict a, release 1",
    "join a, join b, hold 1, leave b, join c, leave a, release 1",
    "hold 1, release 1, join a",
    "hold 1, release 1, hold 1, join a, release 1",
    "hold 1, join a, release 1, hold 1, leave a, release 1",
    # Several askers, in every order.
    "hold 1, hold 2, join a, release 1",
    "hold 1, hold 2, join a, release 2",
    "hold 1, hold 2, release 1, release 2",
    "hold 1, release 2, join a",
    "hold 1, hold 2, hang_up 1, join a, release 2",
    "hold 1, hold 2, hang_up 2, join a, release 1",
    "hold 1, hold 1, hold 1, join a, release 1",
    "hold 1, hang_up 1, join a, release 2",
    "hold 1, hang_up 1, hold 2, join a, hang_up 2, release 3",
    "hold 1, hang_up 1, hold 2, hang_up 2, hold 3, join a, release 3",
    # Times that run out.
    "hold_briefly 1, join a, hang_up 1, ends .",
    "join a, hold_briefly 1, leave a, hang_up 1, ends .",
    "hold_briefly 1, hold_briefly 2, hang_up 1, join a, hang_up 2, ends .",
    "hold_briefly 1, hang_up 1, ends ., hold_briefly 1, hang_up 1, ends .",
    "hold_briefly 1, hang_up 1, ends ., hold 1, join a, release 1",
    # The longest of the times that were asked for counts, in whatever order.
    "hold 1, hold_briefly 2, hang_up 2, join a, release 1",
    "hold 1, hold_briefly 2, hang_up 1, join a, hang_up 2, join b, release 3",
    "hold_briefly 1, hold 2, hang_up 2, join a, hang_up 1, join b, release 3",
    "hold_briefly 1, hold 2, hang_up 1, join a, hang_up 2, join b, release 3",
    "hold 1, hang_up 1, hold_briefly 2, join a, hang_up 2, join b, release 3",
    "hold 1, hold_briefly 2, hang_up 2, hang_up 1, join a, release 3",
    # Nothing is left of what was released.
    "hold 1, hang_up 1, release 2, hold_briefly 3, hang_up 3, ends .",
    "hold 1, release 1, hold_briefly 2, hang_up 2, ends .",
    "hold_briefly 1, hang_up 1, hold_briefly 2, hang_up 2, ends .",
    # Askers that die.
    f"crash {SHORT}, ends .",
    f"crash {LONG}, join a, release 1",
    f"join a, crash {LONG}, leave a, release 1",
    f"crash {LONG}, crash {SHORT}, join a, release 1",
    f"crash {SHORT}, hold 1, join a, hang_up 1, join b, release 2",
    f"hold 1, crash {SHORT}, join a, release 1",
    f"crash {LONG}, hold 1, release 1, join a",
]


@pytest.fixture
def history(socket_path: str) -> Iterator[History]:
    with ExitStack() as undo:
        yield History(socket_path, undo)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("line", HISTORIES)
def test_histories(history: History, line: str) -> None:
    for step in line.split(", "):
        word, who = step.split()
        getattr(history, word)(who)
        # What lasts for a moment may be over at any step.
        asked = history.asked.values()
        if not (history.lasts and max(asked) == SHORT):
            history.check()
    if history.lasts:
        history.release("9")
        history.check()
    assert not history.held


@pytest.mark.parametrize("line", HISTORIES[::4])
def test_the_peer_itself_goes_at_the_end(history: History, line: str) -> None:
    """Whoever has asked: nothing of it is left, and its successor in that id is not held."""
    for step in line.split(", ")[:-1]:
        word, who = step.split()
        getattr(history, word)(who)
    history.me.close()
    until(lambda: len(history.served.server().peers) == len(history.others))
    with RawPeer(history.path) as again:
        again.set_up(VECTORS)
        with RawPeer(history.path) as other:
            other.set_up(VECTORS)
            again.take_until(lambda: again.counts.get(other.id) == VECTORS)
    assert not any(r.held for r in history.served.server().report())
    assert os.path.exists(history.path)
