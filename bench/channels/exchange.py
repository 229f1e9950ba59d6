"""One way to pass messages from process to process, and to take an answer.

Knows: a turn: the ping end sends some messages, the echo end takes them and answers with one. Does
not know: how a message is sent or taken.

With many messages in a turn this measures a stream, with one a round trip.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

from ivshmem.bench.roundtrip import End, python_end
from ivshmem.bench.worker import Steps

from .. import in_memory
from ..ways import ROOT, Shared, Way

ANSWER = 64  # bytes of an answer, at most


class Link(NamedTuple):
    """What an end does.

    Attributes:
        send: a statement that sends `data`.
        receive: a statement that waits for a message and takes it.
        names: what the statements know, beside `data`.
        answer, hear: statements for the answer, if those differ.
        receive_all: a statement that takes all messages of a turn, if that is not `receive` in a
            loop.
    """

    send: str
    receive: str
    names: dict[str, Any]
    answer: str = ""
    hear: str = ""
    receive_all: str = ""


class Exchange(Way):
    """A way to pass messages.

    Attributes:
        settings: what was chosen of the options that it has; the table prints it.
        at_once: how many messages one `send` has.

    Args:
        size: bytes of a message.
        count: messages in a turn.
    """

    label: str
    module = ""  # that it needs
    settings = ""
    at_once = 1

    def __init__(self, size: int = 64, count: int = 1) -> None:
        super().__init__(self.label, self.module)
        self.size = size
        self.count = count

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        kind = (type(self).__module__, type(self).__qualname__, self.size, self.count)
        with self.shared() as shared:
            fds = shared.fds
            yield (
                python_end("ping", ENTER, *kind, *shared.ping, fds=fds, directory=ROOT),
                python_end("echo", ENTER, *kind, *shared.echo, fds=fds, directory=ROOT),
            )

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        """A directory in memory, of which both ends know."""
        with in_memory.folder() as directory:
            yield Shared([directory], [directory])

    @contextlib.contextmanager
    def steps(self, role: str, *arguments: Any) -> Iterator[Steps]:
        with self.link(role, *arguments) as link:
            times = self.count // self.at_once
            data = bytes(self.size if role == "ping" else min(self.size, ANSWER))
            names = {"data": data, "repeat": repeat, **link.names}
            if role == "ping":
                yield Steps(_many(times, link.send), link.hear or link.receive, names)
            else:
                all_of_them = link.receive_all or _many(times, link.receive)
                yield Steps(link.answer or link.send, all_of_them, names)

    def link(self, role: str, *arguments: Any) -> contextlib.AbstractContextManager[Link]:
        """What an end does, in its own process, given what it shares with the other.

        The other end is ready to receive when both have entered.
        """
        raise NotImplementedError


ENTER = f"{__name__}:enter"


def enter(
    role: str, module: str, name: str, size: int, count: int, *arguments: Any
) -> contextlib.AbstractContextManager[Steps]:
    """What an end of an exchange does; called in its process."""
    kind = getattr(importlib.import_module(module), name)
    steps: contextlib.AbstractContextManager[Steps] = kind(size, count).steps(role, *arguments)
    return steps


def _many(times: int, statement: str) -> str:
    """A statement so many times; they stand at one place in a loop of worker.py."""
    if times == 1:
        return statement
    return f"for _ in repeat(None, {times}): {statement}"
