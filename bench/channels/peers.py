"""Messages through other libraries, each at its best setting.

Knows: of each library, how a link is made, and what was chosen. Does not know: how it is measured.

What a library needs is imported when it is used: none of them has to be installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import pickle
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..ways import Iceoryx, Shared, pickled
from .exchange import Exchange, Link

QUEUED = 1024  # messages that a library keeps, where it can be chosen


class Zmq(Exchange):
    label = "pyzmq"
    module = "zmq"
    settings = "PAIR, ipc, copy=True, no high-water mark"

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        zmq = self.library()
        with zmq.Context() as library, library.socket(zmq.PAIR) as end:
            end.linger = 0
            end.set_hwm(0)
            address = f"ipc://{directory}/socket"
            end.bind(address) if role == "ping" else end.connect(address)
            yield Link("send(data)", "receive()", {"send": end.send, "receive": end.recv})


# -- the standard library --------------------------------------------------------------------------


class Multiprocessing(Exchange):
    """A pair of objects for each direction: what the ends send into, and take from."""

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        of = get_context("spawn")
        (a_in, a_out), (b_in, b_out) = self.direction(of), self.direction(of)
        (ping, ping_fds), (echo, echo_fds) = pickled((a_in, b_out)), pickled((b_in, a_out))
        yield Shared([ping], [echo], [*ping_fds, *echo_fds])

    def direction(self, of: Any) -> tuple[Any, Any]:
        """What one end sends into, and what the other takes from."""
        raise NotImplementedError

    @contextlib.contextmanager
    def link(self, role: str, ends: str) -> Iterator[Link]:
        out, back = pickle.loads(bytes.fromhex(ends))  # noqa: S301
        yield self.calls(out, back)

    def calls(self, out: Any, back: Any) -> Link:
        raise NotImplementedError


class Pipe(Multiprocessing):
    label = "multiprocessing.Pipe"
    settings = "duplex=False, send_bytes"

    def direction(self, of: Any) -> tuple[Any, Any]:
        back, out = of.Pipe(duplex=False)
        return out, back

    def calls(self, out: Any, back: Any) -> Link:
        names = {"send": out.send_bytes, "receive": back.recv_bytes}
        return Link("send(data)", "receive()", names)


class SimpleQueue(Multiprocessing):
    """It has no thread, so it is quicker than Queue."""

    label = "multiprocessing.SimpleQueue"
    settings = "of bytes objects"

    def direction(self, of: Any) -> tuple[Any, Any]:
        queue = of.SimpleQueue()
        return queue, queue

    def calls(self, out: Any, back: Any) -> Link:
        return Link("send(data)", "receive()", {"send": out.put, "receive": back.get})


# -- shared memory ---------------------------------------------------------------------------------


class IceoryxMessages(Exchange):
    """Publisher and subscriber; the reader makes bytes of what it took."""

    label = "iceoryx2"
    module = "iceoryx2"
    settings = f"publish_subscribe, send_copy, no overflow, {QUEUED} messages, both ends spin"

    @contextlib.contextmanager
    def shared(self) -> Iterator[Shared]:
        with Iceoryx(self.label, self.module).shared() as shared:
            yield shared

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        iceoryx2 = self.library()
        node = Iceoryx(self.label, self.module).node(directory)
        there, here = ("there", "back") if role == "ping" else ("back", "there")
        kept = QUEUED if self.size <= 4096 else 4

        def service(name: str, size: int) -> Any:
            kind = type(f"Bytes{size}", (ctypes.Structure,), {"_fields_": _bytes_field(size)})
            builder = node.service_builder(iceoryx2.ServiceName.new(name)).publish_subscribe(kind)
            builder = builder.enable_safe_overflow(False).subscriber_max_buffer_size(kept)
            return kind, builder.max_publishers(1).max_subscribers(1).open_or_create()

        sizes = {"there": self.size, "back": 64}
        (kind, out), (_, back) = service(there, sizes[there]), service(here, sizes[here])
        subscriber = back.subscriber_builder().create()
        strategy = iceoryx2.BackpressureStrategy.RetryUntilDelivered
        publisher = out.publisher_builder().backpressure_strategy(strategy).create()
        while out.dynamic_config.number_of_subscribers < 1:
            time.sleep(0.001)
        publisher.update_connections()
        take, string_at, size = subscriber.receive, ctypes.string_at, sizes[here]

        def receive() -> bytes:
            while (sample := take()) is None:
                pass
            return string_at(sample.payload_ptr, size)  # quicker than bytes(payload().contents)

        names = {"send": publisher.send_copy, "receive": receive, "message": kind()}
        yield Link("send(message)", "receive()", names)


def _bytes_field(size: int) -> list[tuple[str, Any]]:
    return [("data", ctypes.c_uint8 * size)]


class Tachyon(Exchange):
    """Two buses, since a bus has one direction."""

    label = "tachyon"
    module = "tachyon"
    settings = "Bus.send, iteration, both ends spin (set_polling_mode(1))"

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        bus = self.library().Bus
        room = 1 << 20 if self.size <= 4096 else 1 << 26
        if role == "ping":
            out = _connected(bus, f"{directory}/there")
            back = bus.listen(f"{directory}/back", 1 << 20)
        else:
            back = bus.listen(f"{directory}/there", room)
            out = _connected(bus, f"{directory}/back")
        with out, back:
            for each in (out, back):
                each.set_polling_mode(1)
            yield self.calls(out, back)

    def calls(self, out: Any, back: Any) -> Link:
        names = {"send": out.send, "receive": iter(back).__next__}
        return Link("send(data)", "receive().data", names)


def _connected(bus: Any, path: str) -> Any:
    """Connect to a bus whose reader may not listen yet."""
    while not Path(path).exists():
        time.sleep(0.001)
    return bus.connect(path)


class TachyonBatches(Tachyon):
    """As many as are there are taken in a call."""

    label = "tachyon, drain_batch"
    settings = "Bus.send, drain_batch(64), both ends spin (set_polling_mode(1))"

    def calls(self, out: Any, back: Any) -> Link:
        def drain(count: int) -> None:
            while count > 0:
                with back.drain_batch(64) as batch:
                    count -= len(batch)
                    for i in range(len(batch)):
                        with memoryview(batch[i]) as message:
                            bytes(message)

        link = super().calls(out, back)
        names = {**link.names, "drain": drain}
        return link._replace(names=names, hear="drain(1)", receive_all=f"drain({self.count})")


class Zenoh(Exchange):
    """Two sessions that know of each other only, by a socket; the payload is in shared memory."""

    label = "zenoh"
    module = "zenoh"
    settings = "peers by unixsock, ShmProvider, express, congestion control block"

    @contextlib.contextmanager
    def link(self, role: str, directory: str) -> Iterator[Link]:
        zenoh = self.library()
        shm = importlib.import_module("zenoh.shm")
        config = zenoh.Config()
        address = f"unixsock-stream/{directory}/socket"
        for key, value in {
            "mode": "peer",
            "scouting/multicast/enabled": False,
            "transport/shared_memory/enabled": True,
            "listen/endpoints" if role == "ping" else "connect/endpoints": [address],
        }.items():
            config.insert_json5(key, json.dumps(value))
        if role == "echo":
            config.insert_json5("listen/endpoints", "[]")
        there, here = ("there", "back") if role == "ping" else ("back", "there")
        with zenoh.open(config) as session:
            subscriber = session.declare_subscriber(here, zenoh.handlers.FifoChannel(QUEUED))
            publisher = session.declare_publisher(
                there, congestion_control=zenoh.CongestionControl.BLOCK, express=self.count == 1
            )
            while not publisher.matching_status.matching:
                time.sleep(0.001)
            provider = shm.ShmProvider.default_backend(64 << 20)
            policy = shm.BlockOn(shm.GarbageCollect())
            alloc, put, take = provider.alloc, publisher.put, subscriber.recv

            def send(data: bytes) -> None:
                memory = alloc(len(data), policy=policy)
                memory[:] = data
                put(memory)

            def receive() -> bytes:
                return bytes(take().payload)

            yield Link("send(data)", "receive()", {"send": send, "receive": receive})
