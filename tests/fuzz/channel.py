"""Channels in memory that others write at any moment: an end of each kind, and its other end.

The thread of the beat is the real one, so an input does not quite the same each time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from ivshmem import Directory, Region, channel
from ivshmem.channel import Channels
from ivshmem.errors import IvshmemError
from ivshmem.native.areas import find_area

from .script import Grammar, Op
from .target import Finding, Scripted

_SIZE, _AREA = 1 << 18, 192 << 10
_BEAT, _LEASE = 0.002, 0.01
_LIMIT = 64  # bytes of a message
_VALUE, _REST = ((1 << 40) - 1) << 24, (1 << 24) - 1  # of a word
_DOCUMENTED = (IvshmemError, TimeoutError, BufferError, OSError)

FORMS = {
    "call": "b",  # one of what a program can do
    "word": "wq",  # one that is in use becomes this
    "bit": "wb",  # of one that is in use: it is another
    "add": "wq",  # to the value of one that is in use, whose flags and epoch stay
    "wraps": "wb",  # the value of one that is in use: so many before it begins at 0 again
    "copy": "ww",  # one that is in use gets what another one has
    "any": "wq",  # any word of the area becomes this
    "page": "b",  # of the area: a punched hole
    "all": "",  # of it
}


def ends(channels: Channels) -> list[Callable[[], Any]]:
    """Ends of each kind, and what a program does with them; none of it waits."""
    messages = channels.create_messages("a", limit=_LIMIT, slots=4, overflow=("block", "overwrite"))
    discarding = channels.create_messages("b", limit=_LIMIT, slots=4, overflow="discard", readers=2)
    queue = channels.create_queue("c", limit=_LIMIT, slots=4)
    value = channels.create_value("d", limit=_LIMIT)
    calls = channels.create_calls("e", limit=_LIMIT, slots=4)
    room = channels.create_bytes("f", buffer=64, connections=3)
    listener, stream = room.listen(), room.connect()
    other = listener.accept(0)
    assert other is not None
    stream.settimeout(0)
    other.settimeout(0)
    caller, server = calls.caller(), calls.server()

    def view(look: Callable[[], channel.View | None]) -> None:
        seen = look()
        if seen is not None:
            with seen:
                _check(seen.size)
                if not _SIZE - _AREA - 8192 < seen.offset <= _SIZE - seen.size:
                    raise Finding(f"a view at {seen.offset:#x}")
                bytes(seen)

    def take(worker: channel.QueueReader) -> None:
        taken = worker.take(0)
        if taken is not None:
            with taken:
                _check(len(bytes(taken)))

    def call() -> None:
        pending = caller.submit(b"x", 0)
        served = server.take(0)
        if served is not None:
            _check(len(bytes(served)))
            served.reply(b"y")
        _check(len(pending.result(0)))

    def get(look: Callable[[], bytes | None]) -> None:
        _check(len(look() or b""))

    made: list[Callable[[], Any]] = [call, channels.list, channels.places]
    for each in (messages, discarding):
        made += [functools.partial(each.writer().put, b"x" * 30, 0) for _ in range(2)]
        for reader in (each.reader(), each.reader()):
            made.append(functools.partial(get, functools.partial(reader.get, 0)))
            made.append(functools.partial(view, functools.partial(reader.view, 0)))
    work, worker, setter, watcher = queue.writer(), queue.reader(), value.writer(), value.reader()
    return [
        *made,
        lambda: messages.reader().close(),
        lambda: messages.writer().close(),
        lambda: work.put(b"x" * 30, 0),
        lambda: get(lambda: worker.get(0)),
        lambda: take(worker),
        lambda: setter.put(b"y" * 30, 0),
        lambda: get(watcher.get),
        lambda: get(lambda: watcher.wait_changed(0)),
        lambda: view(watcher.view),
        lambda: stream.send(b"z" * 10),
        lambda: _check(len(other.recv(_LIMIT))),
        lambda: channels.open("a"),
        lambda: room.connect().close(),
        lambda: listener.accept(0),
        lambda: channels.create_messages("g", limit=8).remove(),
    ]


def _check(size: int) -> None:
    if size > _LIMIT:
        raise Finding(f"{size} bytes, and {_LIMIT} are the limit")


class ChannelTarget(Scripted):
    """What stands in the words that the ends of channels share."""

    name = "channel"
    modules = ("channel/channels", "channel/kinds", "channel/geometry", "channel/types")
    share = 1  # it takes ten times as long as others
    grammar = Grammar(FORMS)

    def scripts(self) -> Sequence[Sequence[Op]]:
        every = [Op("call", (number,)) for number in range(len(FORMS) * 4)]
        wraps = [Op("wraps", (number * 7, number % 3)) for number in range(40)]
        return [every * 2, [Op("all"), *every], [*wraps, *every, *every], [*every, *wraps, *every]]

    def mutate(self, data: bytes, numbers: Random, other: bytes) -> bytes:
        # Most of what an input reaches is in Cython, of which the campaign sees nothing: so half of
        # the inputs are new ones.
        if numbers.random() < 0.5:
            return super().mutate(data, numbers, other)
        names = numbers.choices([*FORMS], [40, 3, 3, 3, 6, 2, 2, 1, 0.2], k=numbers.randrange(99))
        script = []
        for name in names:
            args = [numbers.randrange(1 << 16) for _ in FORMS[name]]
            if FORMS[name].endswith("q"):
                args[-1] = numbers.getrandbits(numbers.choice((4, 24, 63)))
            script.append(Op(name, tuple(args)))
        return self.grammar.encode(script)

    def set_up(self) -> None:
        self._region = self.undo.enter_context(Region.create(_SIZE))
        Directory.create(self._region, channels=_AREA).close()
        self._begin = self._region.read(0, _SIZE)
        with channel.open(self._region, beat=_BEAT, lease=_LEASE) as channels:
            area = find_area(self._region)
            assert area is not None
            self._area = (area.offset, area.size)
            ends(channels)
            words = memoryview(self._region.read(0, _SIZE)).cast("Q")
            at, size = self._area
            self._used = [i * 8 for i in range(at // 8, (at + size) // 8) if words[i]]

    def play(self, script: Sequence[Op]) -> None:
        self._region.write(0, self._begin)
        with channel.open(self._region, beat=_BEAT, lease=_LEASE) as channels:
            made = ends(channels)
            for op in script:
                if op.name != "call":
                    self._write(op)
                    continue
                with contextlib.suppress(*_DOCUMENTED):
                    made[int(op.args[0]) % len(made)]()
            made.clear()
        at, size = self._area
        now = self._region.read(0, _SIZE)
        if now[:at] != self._begin[:at] or now[at + size :] != self._begin[at + size :]:
            raise Finding("what is not the area's has changed")

    def _write(self, op: Op) -> None:
        at, size = self._area
        args = [int(arg) for arg in op.args]
        if op.name == "all":
            self._region.write(at, bytes(size))
        elif op.name == "page":
            self._region.write(at + args[0] * 4096 % size, bytes(4096))
        elif op.name == "any":
            self._store(at + args[0] * 8 % size, args[1])
        else:
            where = self._used[args[0] % len(self._used)]
            word = self._load(where)
            if op.name == "word":
                word = args[1]
            elif op.name == "bit":
                word ^= 1 << args[1] % 64
            elif op.name == "add":
                word = (word + (args[1] << 24)) & _VALUE | word & _REST
            elif op.name == "wraps":
                word = (_VALUE - (args[1] << 24)) & _VALUE | word & _REST
            else:
                word = self._load(self._used[args[1] % len(self._used)])
            self._store(where, word)

    def _load(self, at: int) -> int:
        return int.from_bytes(self._region.read(at, 8), "little")

    def _store(self, at: int, word: int) -> None:
        self._region.write(at, (word % (1 << 64)).to_bytes(8, "little"))
