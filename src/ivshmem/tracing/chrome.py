"""Internal: a trace in the JSON that Perfetto and Chrome (chrome://tracing) open.

Knows: the format. Does not know: where events come from.

It is the format's array form, whose closing bracket may be missing: what a killed process has
written opens, too. Source: "Trace Event Format", the document of the Chromium project.

A peer is a "process" of the trace, with its id plus one as number, since number 0 means something
else to the viewers. Its first track says when it was connected, and each vector has one.
"""

from __future__ import annotations

import json
from typing import Any

from ..system.sink import Sink
from ..system.uncopied import Uncopied
from .watcher import InterruptTaken, Joined, Left, Rung

_CONNECTED = 0  # the track; vector v has track v + 1
_LEAST_WRITE = 1 << 16  # bytes that are collected before they are written


class ChromeTrace(Uncopied):
    """A file of a trace.

    Args:
        path: of the new file.
        replace: write over a file that is there.

    Attributes:
        rings, taken: how many were written.

    Raises:
        OSError: FileExistsError, and as of open(2) and write(2), with the path.
    """

    def __init__(self, path: str, *, replace: bool = False) -> None:
        self.rings = 0
        self.taken = 0
        self._sink = Sink(path, replace=replace)
        self._sink.write(b"[")  # a trace without its end can be opened, and an empty file cannot
        self._lines: list[str] = []
        self._size = 0
        self._pending: dict[tuple[int, int], bool] = {}  # (peer, vector) of slices that are open
        self._connected: set[int] = set()
        self._tracks: set[tuple[int, int]] = set()
        self._flows = 0
        self._begun = False  # there is an event in the file

    def name(self, peer: int, text: str) -> None:
        """Call a peer by this text from now on."""
        self._put("M", peer, _CONNECTED, 0, "process_name", args={"name": text})

    def add(self, event: Joined | Left | Rung | InterruptTaken) -> None:
        """Write an event."""
        if isinstance(event, Joined):
            self.name(event.peer, f"peer {event.peer}")
            self._track(event.peer, _CONNECTED, "connected")
            self._connected.add(event.peer)
            self._put("B", event.peer, _CONNECTED, event.at, "connected")
        elif isinstance(event, Left):
            self._end(event.peer, event.at)
        elif isinstance(event, Rung):
            self._add_ring(event)
        elif self._pending.pop((event.peer, event.vector), False):
            self.taken += 1
            self._put("E", event.peer, event.vector + 1, event.at)

    def _add_ring(self, event: Rung) -> None:
        self.rings += 1
        key, track = (event.peer, event.vector), event.vector + 1
        self._track(event.peer, track, f"vector {event.vector}")
        args = {} if event.by < 0 else {"from": f"peer {event.by}"}
        if event.taken:
            self.taken += 1
            self._put("i", event.peer, track, event.at, "ring, taken at once", args=args, s="t")
        elif self._pending.get(key):
            self._put("i", event.peer, track, event.at, "rung again", args=args, s="t")
        else:
            self._pending[key] = True
            self._put("B", event.peer, track, event.at, "interrupt", args=args)
            if event.by >= 0:  # an arrow from who rang
                self._flows += 1
                arrow = {"id": self._flows, "cat": "ring"}
                self._put("s", event.by, _CONNECTED, event.at, "ring", **arrow)
                self._put("f", event.peer, track, event.at, "ring", bp="e", **arrow)

    def _track(self, peer: int, track: int, name: str) -> None:
        if (peer, track) not in self._tracks:
            self._tracks.add((peer, track))
            self._put("M", peer, track, 0, "thread_name", args={"name": name})
            self._put("M", peer, track, 0, "thread_sort_index", args={"sort_index": track})

    def _end(self, peer: int, at: int) -> None:
        """End what is open of a peer."""
        for key in [key for key in self._pending if key[0] == peer]:
            del self._pending[key]
            self._put("E", peer, key[1] + 1, at)
        if peer in self._connected:
            self._connected.discard(peer)
            self._put("E", peer, _CONNECTED, at)

    def _put(self, kind: str, peer: int, track: int, at: int, name: str = "", **more: Any) -> None:
        event: dict[str, Any] = {"ph": kind, "pid": peer + 1, "tid": track, "ts": at / 1000}
        if name:
            event["name"] = name
        line = json.dumps({**event, **more}, separators=(",", ":"))
        self._lines.append(line)
        self._size += len(line)
        if self._size > _LEAST_WRITE:
            self.flush()

    def flush(self) -> None:
        """Write what was collected.

        Raises:
            OSError: as of write(2); the file ends with a whole event.
        """
        if self._lines:
            text = ("," if self._begun else "") + "\n" + ",\n".join(self._lines)
            self._lines.clear()
            self._size = 0
            self._sink.write(text.encode())
            self._begun = True

    def end(self, at: int) -> None:
        """End all that is open, at a time, and the file."""
        for peer in sorted(self._connected):
            self._end(peer, at)
        self.flush()
        self._sink.write(b"\n]\n")

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._sink.close()
