"""What a line of the log is about, for programs that read it.

Knows: how an event and its fields travel with a line. Does not know: what form it is written in,
what happens.

A module that has something to tell logs a sentence for people, and gives `extra=fields(event, ..)`
for programs. Handlers that know nothing of it write the sentence; `ivshmem serve --log-format json`
writes both, as each handler with an `ivshmem.JsonFormatter` does. Every line has "time" (UTC),
"level" (debug, info, warning, error), "event" and "text";
the events, and what else they have where it is known ("region" can be left out where there is only
one):

    joined        peer, pid, uid, gid, process, vectors, since (seconds since the epoch), region
    left          the same, seconds (that it was there)
    refused       uid, pid, process, reason, region: somebody who may not be a peer; at most once a
                  minute for each user
    stalled       peer, pid, uid, process, pending, since, region: a peer has not read for some
                  seconds
    reading       peer, pid, uid, process, seconds, region: it reads again
    waiting       reason, region: newcomers are left in the queue; at most once a minute a reason
    starved       reason, region: sending has to wait for memory or descriptors; likewise
    evicted       peer, region, by_uid, by_pid: somebody asked for that over the control socket
    held          on, region, by_uid, by_pid: QEMU is told of no leaves from now on, or is again
    holding       peer, region, linger, by_uid, by_pid: a peer is sent no messages from now on
    released      peer, region, by_uid, by_pid, or reason ("expired"): it is sent messages again
    freed         places, region, by_uid, by_pid: all places of channels were freed
    reloaded      changes, by_uid, by_pid (if over the control socket): the configuration was read
                  again
    unreloaded    reason, by_uid, by_pid: it was wrong, and all stays as it was
    takeover      pid, reason: this process continues where another ended
    rebound       path, region (none: the control socket): the path of a socket had led elsewhere,
                  and was bound again
    unreachable   path, reason, region: it could not be bound again, so nobody can connect
    limit         limit, peers, vectors: how many descriptors there can be, and for how many peers
                  of so many vectors that is enough; at start
    metrics       address: where Prometheus gets the metrics, HOST:PORT; at start
    lost          lines: nobody read the log, and so many lines are missing
    log           whatever else there is to say

`logging` is imported with the first line, or by `load`: with what it imports itself it is a sixth
of the time until a server listens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..system import late_logging
from ..text import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from typing import Any

DEFAULT_EVENT = "log"
_KEY = "ivshmem"  # the attribute of a logging.LogRecord


def fields(event: str, **values: object) -> dict[str, Any]:
    """What to give a logging call as `extra`; None and "" say that a value is not known."""
    known = {name: value for name, value in values.items() if value is not None and value != ""}
    return {_KEY: {"event": event, **known}}


def fields_in(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The event in what `fields` made, and its fields."""
    found = extra.get(_KEY)
    return dict(found) if isinstance(found, dict) else {"event": DEFAULT_EVENT}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The same of a line of the log."""
    return fields_in(vars(record))


def json_line(when: float, level: int, text: str, fields: Mapping[str, object]) -> str:
    """A line for programs; its text may have several lines, a traceback for instance.

    JSON itself writes out whatever is not ASCII, but a program that reads it prints the text.
    """
    import json  # here: most logs are for people

    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
    head = {
        "time": f"{moment}.{int(when * 1000) % 1000:03}Z",
        "level": late_logging.LEVELS.get(level, str(level)),
        **{
            name: plain(value) if isinstance(value, str) else value
            for name, value in fields.items()
        },
        "text": text,
    }
    return json.dumps(head, separators=(",", ":"), default=str)
