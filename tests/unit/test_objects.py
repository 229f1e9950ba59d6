"""All classes: what owns descriptors or threads is not copied; what is half made is silent."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import importlib
import inspect
import os
import pickle
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import ivshmem
from ivshmem import channel, guest
from ivshmem._core import Doorbells
from ivshmem.channel.ends import Wakeup
from ivshmem.channel.queues import ClaimingEnd
from ivshmem.channel.roles import ReaderEnd, WriterEnd
from ivshmem.channel.stream_poll import StreamPoll
from ivshmem.native import descriptors
from ivshmem.native import mapping as _memory


def classes() -> list[type]:
    """All classes of the package, wherever they are."""
    found: dict[type, None] = {}
    for module in pkgutil.walk_packages(ivshmem.__path__, "ivshmem."):
        if module.name.endswith("__main__"):
            continue
        try:
            names = vars(importlib.import_module(module.name))
        except ModuleNotFoundError as error:
            if error.name != "mcap":  # other Pythons than the first are tested without it
                raise
            continue
        for thing in names.values():
            if inspect.isclass(thing) and thing.__module__.startswith("ivshmem"):
                found[thing] = None
    return sorted(found, key=lambda each: (each.__module__, each.__qualname__))


CLASSES = classes()
NAMES = [f"{each.__module__}.{each.__qualname__}" for each in CLASSES]

# What looks as if it owned something, and owns nothing that a copy could close.
BORROWERS = {
    "ivshmem.cli.progress.ProgressBar",  # a terminal's stream, which is the caller's
    "ivshmem.cli.screen.Screen",
    "ivshmem.cli.shell.Shell",  # a client, which is the caller's
    "ivshmem.cli.shell.ClientShell",
    "ivshmem.cli.top.StatusPoller",  # a connection, which it opens again when it is gone
}

# The same with no close(): each of these holds a descriptor, a mapping or a lock.
OWNERS = {
    "ivshmem.native.descriptors.Epoll",
    "ivshmem.native.descriptors.FdArray",
    "ivshmem.native.mapping.Mapping",
    "ivshmem.native.wire.Outbox",
    "ivshmem.peer.client.Client",
    "ivshmem.peer.directory.Directory",
    "ivshmem.peer.directory.Publication",
    "ivshmem.guest.broker.Broker",
    "ivshmem.guest.device.GuestDevice",
    "ivshmem.lasting.journal.Journal",
    "ivshmem.memory.region.Region",
    "ivshmem.server.server.Server",
    "ivshmem.service.service.Service",
    "ivshmem.system.listener.Listener",
    "ivshmem.lasting.fd_store.FdStore",
}


def owns(kind: Any) -> bool:
    name = f"{kind.__module__}.{kind.__qualname__}"
    ends = any(hasattr(kind, each) for each in ("close", "__exit__", "__del__"))
    return name in OWNERS or (
        ends and name not in BORROWERS and not getattr(kind, "_is_protocol", False)
    )


def mapping() -> _memory.Mapping:
    fd = os.memfd_create("mapping")
    try:
        os.ftruncate(fd, 4096)
        return _memory.Mapping(fd, 4096)
    finally:
        os.close(fd)


def registers() -> _memory.Registers:
    fd = os.memfd_create("registers")
    try:
        os.ftruncate(fd, 4096)
        return _memory.Registers(fd, 0, 256)
    finally:
        os.close(fd)


def relay() -> descriptors.Relay:
    bells = descriptors.FdArray.eventfds(2)
    return descriptors.Relay(bells[0], [bells[1]])


OPENED: list[tuple[channel.Channels, ivshmem.Region]] = []


@pytest.fixture(autouse=True)
def close_channels() -> Iterator[None]:
    yield
    while OPENED:
        for thing in OPENED.pop():
            thing.close()


def end_of_a_channel(kind: str) -> Any:
    """A thing of a channel, which keeps the region as long as it lives."""
    region = ivshmem.Region.create("1M")
    ivshmem.Directory.create(region, slots=1, channels="512K").close()
    channels = channel.open(region)
    OPENED.append((channels, region))
    messages = channels.create_messages("messages", limit=8)
    queue = channels.create_queue("queue", limit=8)
    queue.writer().put(b"a")
    calls = channels.create_calls("calls", limit=8)
    pending = calls.caller().submit(b"a")
    makers: dict[str, Callable[[], Any]] = {
        "Membership": lambda: channels._membership,
        "Wakeup": lambda: Wakeup(channels._member),
        "WriterEnd": lambda: WriterEnd(channels, channels._member, messages._facts),
        "ReaderEnd": lambda: ReaderEnd(channels, channels._member, messages._facts, None, 1),
        "ClaimingEnd": lambda: ClaimingEnd(channels, channels._member, queue._facts),
        "Writer": messages.writer,
        "Loan": lambda: messages.writer().loan(),
        "Reader": messages.reader,
        "ValueReader": lambda: channels.create_value("value", limit=8).reader(),
        "QueueReader": queue.reader,
        "Taken": lambda: queue.reader().take(),
        "Caller": calls.caller,
        "PendingCall": lambda: pending,
        "CallServer": calls.server,
        "Call": lambda: calls.server().take(),
        "StreamListener": lambda: channels.create_bytes("bytes", buffer=64, connections=1).listen(),
        "StreamPoll": lambda: StreamPoll(channels._member),
    }
    return makers[kind]()


# Those whose C constructor needs something.
MAKERS: dict[str, Callable[[], Any]] = {
    "ivshmem.native.descriptors.Relay": relay,
    "ivshmem.native.mapping.Mapping": mapping,
    "ivshmem.native.mapping.Registers": registers,
    "ivshmem.memory.region.Region": lambda: ivshmem.Region.create(4096),
    **{
        f"ivshmem.channel.{module}.{kind}": partial(end_of_a_channel, kind)
        for module, kinds in {
            "membership": ("Membership",),
            "ends": ("Wakeup",),
            "writers": ("Writer", "Loan"),
            "readers": ("Reader",),
            "values": ("ValueReader",),
            "roles": ("WriterEnd", "ReaderEnd"),
            "queues": ("ClaimingEnd", "QueueReader", "Taken"),
            "calls": ("Caller", "PendingCall", "CallServer", "Call"),
            "streams": ("StreamListener",),
            "stream_poll": ("StreamPoll",),
        }.items()
        for kind in kinds
    },
    # Their own __new__ refuses.
    "ivshmem.guest.device.GuestDevice": lambda: Doorbells.__new__(guest.GuestDevice),
    "ivshmem.peer.endpoint.Endpoint": lambda: Doorbells.__new__(ivshmem.Endpoint),
}


def refuses(kind: type, make: Callable[[Any], object], thing: object) -> None:
    with pytest.raises(TypeError) as error:
        make(thing)
    assert "\n" not in str(error.value), kind


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", list(filter(owns, CLASSES)), ids=lambda kind: kind.__qualname__)
def test_an_owner_is_not_copied(kind: Any) -> None:
    make_one = MAKERS.get(f"{kind.__module__}.{kind.__qualname__}", lambda: kind.__new__(kind))
    thing = make_one()
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        refuses(kind, make, thing)
    if kind.__name__ == "Region":
        thing.close()


def test_the_table_has_all() -> None:
    assert set(NAMES) >= OWNERS
    assert set(NAMES) >= BORROWERS


def test_a_server_that_lives_is_not_copied(socket_path: str) -> None:
    """The copy hung when it was collected: it waited for a thread that it did not have."""
    with ivshmem.Server(socket_path).start() as server, ivshmem.connect(socket_path) as client:
        for thing in (server, client, client.region):
            for make in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="cannot be copied or pickled"):
                    make(thing)


# -- half made ------------------------------------------------------------------------------------

WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "nothing": ((), {}),
    "something": ((object(),), {}),
    "two": ((object(), object()), {}),
    "many": ((object(),) * 30, {}),
    "unknown": ((), {"no_such_argument": 1}),
    "mixed": ((object(),), {"no_such_argument": 1}),
}


@contextlib.contextmanager
def silence() -> Any:
    """Fail if anything is said of an error that nobody can catch."""
    said: list[str] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda told: said.append(f"{told.object!r}: {told.exc_value!r}")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
            gc.collect()
    finally:
        sys.unraisablehook = before
    assert said == []
    assert [str(each.message) for each in warned] == []


def shown(kind: Any) -> bool:
    """Whether code of ours says how it is shown, or what is to be done at its end."""
    if getattr(kind, "_is_protocol", False) or issubclass(kind, tuple | BaseException):
        return False
    ours = [each for each in kind.__mro__ if each.__module__.startswith("ivshmem")]
    own = [each for each in ours if not dataclasses.is_dataclass(each)]
    return any(name in vars(each) for each in own for name in ("__repr__", "__del__", "close"))


def represented(thing: object) -> None:
    by = next(each for each in type(thing).__mro__ if "__repr__" in vars(each))
    if by is object or by.__module__.startswith("ivshmem"):
        assert repr(thing)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", list(filter(shown, CLASSES)), ids=lambda kind: kind.__qualname__)
def test_a_constructor_that_fails_says_one_thing(kind: type, wrong: str) -> None:
    """One error, its own: nothing comes from __del__ or __repr__ of what it leaves."""
    arguments, named = WRONG[wrong]
    halves: list[Any] = []

    def make() -> None:
        try:
            made = kind(*arguments, **named)
        except Exception as error:
            # As a debugger does, or a log of a traceback with its variables.
            trace = error.__traceback__
            while trace is not None:
                half = trace.tb_frame.f_locals.get("self")
                if isinstance(half, kind):
                    halves.append(half)
                trace = trace.tb_next
            for half in halves:
                represented(half)
            halves.clear()
        else:
            represented(made)
            close = getattr(made, "close", None)
            if close is not None and not inspect.iscoroutinefunction(close):
                with contextlib.suppress(Exception):
                    close()

    with silence():
        make()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", list(filter(shown, CLASSES)), ids=lambda kind: kind.__qualname__)
def test_what_no_constructor_has_seen(kind: Any) -> None:
    with silence():
        try:
            thing = kind.__new__(kind)
        except TypeError:
            return
        represented(thing)
        del thing


def test_a_wait_that_was_never_begun_can_be_closed() -> None:
    module = importlib.import_module("ivshmem.channel.sleeping_tasks")
    module.Waiting.__new__(module.Waiting).close()
