"""Channels between a real guest and the host: each kind, both ways, whichever way the guest has."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivshmem
from ivshmem import channel
from ivshmem.channel import Channels
from ivshmem.qemu import cmdline

from .harness import MakeGuest
from .host import TIMEOUT, doorbell

COUNT = 200  # messages each way

# What the guest does at its end of each kind. A message is its number, its checksum and its bytes;
# the host checks the guest's in the same way.
PROGRAM = """
import struct, sys, zlib
from ivshmem import channel, guest

COUNT, ACCESS = int(sys.argv[1]), sys.argv[2]

def message(number):
    body = bytes((number + i) % 251 for i in range(number % 400))
    return struct.pack("<II", number, zlib.crc32(body)) + body

with guest.open(access=None if ACCESS == "any" else ACCESS) as device:
    with channel.open(device, name="guest") as channels:
        print("JOINED", device.access, device.vectors, flush=True)
        out, back = channels.open("out"), channels.open("back")
        with out.reader("block") as reader, back.writer() as writer:
            print("READS", flush=True)
            for number in range(COUNT):
                assert reader.get(60) == message(number), number
            for number in range(COUNT):
                writer.put(message(number), 60)
            print("MESSAGES", flush=True)
            assert reader.get(60) == b"go on"
        with channels.open("jobs").reader() as jobs, back.writer() as writer:
            taken = jobs.take(60)
            with taken:
                writer.put(b"took " + bytes(taken), 60)
            writer.put(b"got " + jobs.get(60), 60)
        with channels.open("value").reader() as value, back.writer() as writer:
            content = value.get() or value.wait_changed(60)
            writer.put(b"saw " + content, 60)
        with channels.open("calls").server() as server, channels.open("calls").caller() as caller:
            call = server.take(60)
            call.reply(bytes(call)[::-1])
        with channels.open("bytes").connect(wait_for_listener=True, timeout=60) as stream:
            stream.settimeout(60)
            data = bytearray()
            while len(data) < 100000:
                data += stream.recv(1 << 16)
            stream.sendall(data[::-1])
            stream.shutdown(1)
            assert stream.recv(1) == b""
print("DONE", flush=True)
"""


def message(number: int) -> bytes:
    body = bytes((number + i) % 251 for i in range(number % 400))
    return struct.pack("<II", number, zlib.crc32(body)) + body


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ivshmem.Server]:
    with ivshmem.Server(tmp_path / "socket", "4M", vectors=2, channels="3M").start() as server:
        yield server


def meet(channels: Channels) -> None:
    """The host's end of PROGRAM."""
    out = channels.open("out")
    back = channels.open("back")
    assert isinstance(out, channel.Messages)
    assert isinstance(back, channel.Messages)
    with out.writer() as writer, back.reader("block") as reader:
        for number in range(COUNT):
            writer.put(message(number), TIMEOUT)
        for number in range(COUNT):
            assert reader.get(TIMEOUT) == message(number)
        with channels.open("jobs").writer() as jobs:  # type: ignore[attr-defined]
            writer.put(b"go on")
            jobs.put(b"one")
            jobs.put(b"two")
            assert reader.get(TIMEOUT) == b"took one"
            assert reader.get(TIMEOUT) == b"got two"
        with channels.open("value").writer() as value:  # type: ignore[attr-defined]
            value.put(b"content")
            assert reader.get(TIMEOUT) == b"saw content"
        with channels.open("calls").caller() as caller:  # type: ignore[attr-defined]
            assert caller.call(b"abc", TIMEOUT) == b"cba"
        with channels.open("bytes").listen() as listener:  # type: ignore[attr-defined]
            with listener.accept(TIMEOUT) as stream:
                stream.settimeout(TIMEOUT)
                data = bytes(range(250)) * 400
                stream.sendall(data)
                got = bytearray()
                while part := stream.recv(1 << 16):
                    got += part
                assert got == data[::-1]


def make_channels(channels: Channels) -> None:
    for name in ("out", "back"):
        channels.create_messages(name, limit=1000, slots=64)
    channels.create_queue("jobs", limit=100)
    channels.create_value("value", limit=100)
    channels.create_calls("calls", limit=100)
    channels.create_bytes("bytes", buffer=1 << 14, connections=4)


@pytest.mark.nightly
def test_a_plain_device_and_a_process_that_has_its_file(guest: MakeGuest, tmp_path: Path) -> None:
    """Without a server and without interrupts: both ends poll."""
    with ivshmem.Region.create("4M", path=tmp_path / "memory") as region:
        ivshmem.Directory.create(region, channels="3M").close()
        with channel.open(region, name="host") as channels:
            make_channels(channels)
            args = cmdline.plain(str(tmp_path / "memory"), region.size)
            a = guest(PROGRAM, argv=[str(COUNT), "any"], args=args)
            assert a.expect("JOINED").split()[2] == "0"
            a.expect("READS")
            meet(channels)
            a.expect("DONE")


@pytest.mark.parametrize("access", ["vfio", pytest.param("sysfs", marks=pytest.mark.nightly)])
def test_a_guest_and_the_host(guest: MakeGuest, room: ivshmem.Server, access: str) -> None:
    """By vfio with interrupts; by sysfs the guest polls, and still rings the host."""
    with ivshmem.connect(room.path, timeout=TIMEOUT) as client:
        with channel.open(client, name="host") as channels:
            make_channels(channels)
            a = guest(
                PROGRAM, argv=[str(COUNT), access], args=doorbell(room), iommu=access == "vfio"
            )
            assert a.expect("JOINED").split()[1] == access
            a.expect("READS")
            names = {place.name: place for place in channels.places()}
            assert names.keys() == {"host", "guest"}
            assert (names["guest"].vector is None) == (access == "sysfs")
            meet(channels)
            a.expect("DONE")
