"""Schedules of the model, in the words of the C header (tests/channel/schedulers.h follows them).

Knows: which case each script of the C follows, and which word of the header an address is.
Does not know: the C's own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from model import value
from model.calls import Calls
from model.discard import Discard
from model.explorer import Case, Step, by_chance, covering
from model.messages import OVERWRITE, Channel
from model.messages_cases import Setting
from model.queue import Queue
from model.streams import ENDS, Streams

Word = tuple[str, int, int]


@dataclass(frozen=True)
class Followed:
    """A case of the model that a script of the C follows: its parties are the processes."""

    case: Callable[[], Case]
    word: Callable[[Any], Word]
    walks: int = 0  # so many schedules by chance; 0: along every edge of the state graph


def of_messages(address: Any) -> Word:
    if address == "joins":
        return ("joins", 0, 0)
    kind, *rest = address
    if kind == "sleeper":
        role = {"w": "writer", "r": "reader"}[rest[0][0]]
        return (f"{role}-sleeper", int(rest[0][1:]), 0)
    if kind == "cell":
        writer, cell, *part = rest
        return (kind, writer, 8 * cell + (part[0] if part else 0))
    first, *second = rest
    return (kind, first, second[0] if second else 0)


def after_two(address: Any) -> Word:
    """The C's writer has published two messages before, and so has its cells in another order."""
    if isinstance(address, tuple) and address[0] == "cell":
        kind, writer, cell, *part = address
        return of_messages((kind, writer, (cell + 2) % 3, *part))
    return of_messages(address)


def of_discard(address: Any) -> Word:
    if address in ("head", "tail"):
        return ({"head": "backlog", "tail": "tail"}[address], 0, 0)
    kind, *rest = address
    if kind == "entry":
        return ("backlog-entry", 0, rest[0])
    return of_messages(("cell", 0, *rest) if kind == "cell" else address)


def _blocks(writers: int, messages: int, walks: int = 0, **how: Any) -> Followed:
    channel = Channel(writers, 1, 2, parts=1, counted=16, ordered=True)
    return Followed(Setting(channel, messages, **how).case, of_messages, walks)


_NEXT = Channel(1, 1, 2, parts=1, counted=16)
MESSAGES: Mapping[str, Followed] = {
    "as-block": _blocks(1, 3, 300),
    "as-two-writers": _blocks(2, 1),
    "as-a-writer-dies": _blocks(1, 3, 300, mortal=frozenset({"w0"})),
    "as-a-reader-dies": _blocks(1, 3, 300, mortal=frozenset({"r0"})),
    "as-overwrite": Followed(
        Setting(Channel(1, 1, 2, counted=16), 3, (OVERWRITE,)).case, of_messages
    ),
    "as-discard": Followed(
        Discard(messages=3, parts=1, most=2, counted=16, stacked=True).case, of_discard
    ),
    "as-join": Followed(Setting(_NEXT, 2, start=2, joins=frozenset({"r0"})).case, after_two),
}


def of_queue(address: Any) -> Word:
    if address == "begun":  # the C takes a word that a queue does not use
        return ("joins", 0, 0)
    return of_messages(address)


def _queue(
    *ways: str, messages: int, most: tuple[int, ...] = (), walks: int = 0, **how: Any
) -> Followed:
    queue = Queue(
        readers=len(ways),
        messages=messages,
        ways=ways,
        closes=False,
        most=most,
        counted=16,
        ordered=True,
        **how,
    )
    return Followed(queue.case, of_queue, walks)


QUEUE: Mapping[str, Followed] = {
    "as-get": _queue("get", messages=3, most=(3,), walks=300),
    "as-take": _queue("take", messages=3, most=(3,), walks=300),
    "as-a-writer-dies": _queue("get", messages=2, most=(2,), mortal=frozenset({"w0"})),
    "as-a-reader-comes-back": _queue(
        "heir", "heir", messages=1, walks=300, silent=frozenset({"r0"})
    ),
    "as-fail": _queue("fail", "second", messages=1),
}


def _value(walks: int = 0, **how: Any) -> Followed:
    """The C's writer has set the value before, so that each slot has the cell that it has here."""
    setting = value.Setting(start=6, counted=16, ordered=True, **how)
    return Followed(setting.case, of_messages, walks)


VALUE: Mapping[str, Followed] = {
    "as-latest": _value(messages=2),
    "as-the-writer-dies": _value(400, messages=2, mortal=frozenset({"w0"})),
    "as-the-next-owner": _value(messages=1, gets=2, successor=1, mortal=frozenset({"w0"})),
    "as-the-writer-comes-back": _value(messages=1, gets=2, successor=1, silent=frozenset({"w0"})),
}


def _calls(setting: Calls, walks: int = 0) -> Followed:
    def word(address: Any) -> Word:
        kind, *rest = address
        if kind == "sleeper":
            role = {"c": "writer", "s": "reader"}[rest[0][0]]
            return (f"{role}-sleeper", int(rest[0][1:]), 0)
        if kind == "request":
            return ("cell", rest[0], 8 * rest[1])
        if kind == "reply":  # behind the cells of requests
            return (kind, rest[0], 8 * (setting.slots + 1 + rest[1]))
        return (kind, rest[0], rest[1] if rest[1:] else 0)

    return Followed(setting.case, word, walks)


CALLS: Mapping[str, Followed] = {
    "as-call": _calls(Calls(slots=2, calls=2, most=2, counted=16, cells=True)),
    "as-two-servers": _calls(
        Calls(servers=2, slots=2, calls=2, most=1, counted=16, cells=True), 200
    ),
    "as-a-server-dies": _calls(
        Calls(servers=2, slots=2, calls=1, mortal=frozenset({"s0"}), counted=16, cells=True), 300
    ),
    "as-a-server-comes-back": _calls(
        Calls(servers=2, slots=2, calls=1, silent=frozenset({"s0"}), counted=16, cells=True), 300
    ),
    "as-a-caller-dies": _calls(
        Calls(slots=2, calls=2, most=2, mortal=frozenset({"c0"}), counted=16, cells=True), 300
    ),
}


def of_bytes(address: Any) -> Word:
    if address == ("sleeper", "s"):
        return ("reader-sleeper", 0, 0)
    if address in ("head", "tail"):
        return (f"end-{address}", 0, {"head": 0, "tail": 1}[address])
    if isinstance(address, str):
        return (address, 0, 0)
    kind, which = address
    if kind == "end sleeper":
        return ("end-sleeper", 0, ENDS.index(which))
    return (kind, 0, 4 * which)  # the C sends so many words at once


def _streams(walks: int = 0, **setting: Any) -> Followed:
    return Followed(Streams(counted=16, announced=True, **setting).case, of_bytes, walks)


BYTES: Mapping[str, Followed] = {
    "as-one": _streams(most=1, count=1),
    "as-one-way": _streams(200, most=1, count=3),
    "as-refused": _streams(most=1, count=2, reads=1),
    "as-a-caller-dies": _streams(300, most=1, count=1, mortal=frozenset({"c0"})),
    "as-used-again": _streams(60, callers=2, most=2, count=3, again=True),
}
FOLLOWED: Mapping[str, Mapping[str, Followed]] = {
    "schedules_messages": MESSAGES,
    "schedules_queue": QUEUE,
    "schedules_value": VALUE,
    "schedules_calls": CALLS,
    "schedules_bytes": BYTES,
}


def lines(program: str, script: str, *, walks: int | None = None) -> list[str]:
    """Return the schedules that a script of the C follows, one a line.

    `walks`: so many by chance, or with 0 those along every edge; if None, as the script has it.
    """
    followed = FOLLOWED[program][script]
    case = followed.case()
    count = followed.walks if walks is None else walks
    found = by_chance(case, count) if count else covering(case)
    names = list(case.processes)
    return [" ".join([_token(step, names, followed.word) for step in steps]) for steps in found]


def _token(step: Step, names: list[str], word: Callable[[Any], Word]) -> str:
    place: Word = ("other", 0, 0)
    if step.what == "rings":
        place = ("other", names.index(str(step.address)), 0)
    elif isinstance(step.address, tuple) and step.address[0] == "looks":
        place = ("number", names.index(step.address[1]), 0)
    elif step.what in ("shows", "loads", "older", "exchanges"):
        place = word(step.address)
    parts = [names.index(step.process), step.what, *place]
    if step.what == "shows":
        parts += [step.others, int(step.waits)]
    return ":".join(map(str, parts))
