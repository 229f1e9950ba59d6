"""The other end of a round trip: answers each ring of a peer.

Knows: whom to answer, since a doorbell does not say who rang. Does not know: how that is shown.
"""

from __future__ import annotations

import time
from typing import Literal

from ..errors import IvshmemError, NoDirectory, NoSuchName, NoSuchPeer
from ..peer.client import Client
from ..peer.directory import Directory
from ..peer.endpoint import Endpoint, PeerJoined, PeerLeft

NAME = "bench"  # that the pinging end publishes where there is a directory of names

_TICK = 0.25  # seconds without a ring until it is asked again whom to answer
_PAUSE = 0.05  # seconds between looks for a peer to answer
_MOST = 1000  # answers at once, between which signals are looked at
_SLOW = 0.02  # seconds between rings of a peer that does not know yet whether it is answered


class Echo:
    """Answers one peer at a time; a context manager.

    Args:
        peer: whom to answer; None: who has published NAME, or on a host the peer that joined last.

    Raises:
        IvshmemError: in a guest without a directory of names, a peer has to be named.
        NoSuchVector, NoInterrupts: as of `wait`.

    Attributes:
        peer: the one that is answered at present; None: there is none.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        peer: int | None,
        vector: int,
        spin: float | Literal["auto"],
    ) -> None:
        self.peer = peer
        self._endpoint = endpoint
        self._vector = vector
        self._spin = spin
        self._fixed = peer is not None
        self._at_once = 1
        endpoint.wait(vector, 0)  # raises if it can hear nothing
        if self._fixed:
            return
        try:
            self._names: Directory | None = Directory.open(endpoint)
        except NoDirectory:
            self._names = None
        if self._names is None and not isinstance(endpoint, Client):
            raise IvshmemError(
                "no peer to answer: a guest does not know its peers. Give the id that the other"
                " end prints (--echo ID), or serve with a directory of names (serve --names)"
            )
        if isinstance(endpoint, Client):
            endpoint.peer_events()
            peers = endpoint.peers
            self.peer = peers[0] if len(peers) == 1 else None
        self._choose()

    def step(self, most: int | None = None) -> int:
        """Answer rings, for a quarter of a second if none comes; return how many were answered.

        Args:
            most: answer no more than these; None: as many as are convenient.

        Raises:
            NoSuchPeer: the peer that was given is not there, or not any more.
        """
        if self.peer is None:
            time.sleep(_PAUSE)
            self._choose()
            return 0
        wanted = self._at_once if most is None else min(most, self._at_once)
        start = time.monotonic()
        try:
            # The time limit makes each wait two system calls longer. But a call that an exception
            # ends does not tell how many it has answered.
            done = self._endpoint.echo(
                self.peer, self._vector, rounds=wanted, timeout=_TICK, spin=self._spin
            )
        except NoSuchPeer:
            if self._fixed:
                raise
            done = 0
        # A peer that gets its answers is not left for one that has joined since.
        if done < wanted or time.monotonic() - start > wanted * _SLOW:
            self._at_once = 1
            try:
                self._choose()
            except NoSuchPeer:
                if not done:
                    raise
                # What was answered counts; the next step finds the same.
        else:
            self._at_once = min(self._at_once * 2, _MOST)
        return done

    def _choose(self) -> None:
        """Find out whom to answer from now on."""
        client = self._endpoint if isinstance(self._endpoint, Client) else None
        if self._fixed:
            if client is not None and client.connected and self.peer not in client.peers:
                raise NoSuchPeer(f"peer {self.peer} is not connected")
            return
        for event in client.peer_events() if client is not None else ():
            if isinstance(event, PeerJoined):
                self.peer = event.peer
            elif isinstance(event, PeerLeft) and event.peer == self.peer:
                self.peer = None
        # It is withdrawn as soon as an answer came.
        if (named := self._published()) is not None:
            self.peer = named

    def _published(self) -> int | None:
        if self._names is None:
            return None
        try:
            return self._names.lookup(NAME).id
        except NoSuchName:
            return None
