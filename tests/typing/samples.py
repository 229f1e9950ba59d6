"""What type checkers must say of the public interface; checked by mypy, never run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import ivshmem
from ivshmem import aio, guest


def client(path: str) -> None:
    with ivshmem.connect(path, timeout=1.5) as client:
        assert_type(client, ivshmem.Client)
        assert_type(client.id, int)
        assert_type(client.vectors, int)
        assert_type(client.peers, list[int])
        assert_type(client.region, ivshmem.Region)
        assert_type(client.wait(), ivshmem.Interrupt | None)
        assert_type(client.wait(None, 1.0), ivshmem.Interrupt | None)
        assert_type(client.wait(0), int | None)
        assert_type(client.wait(vectors=3, timeout=None), int | None)
        assert_type(client.events(0), Iterator[ivshmem.Event])
        for event in client:
            match event:
                case ivshmem.Interrupt(vector, rings):
                    assert_type(vector + rings, int)
                case ivshmem.PeerJoined(peer) | ivshmem.PeerLeft(peer):
                    assert_type(peer, int)
                case ivshmem.Disconnected(reason):
                    assert_type(reason, str)


def region() -> None:
    with ivshmem.Region.create("4M", hugepages=True) as region:
        assert_type(region, ivshmem.Region)
        assert_type(memoryview(region)[0], int)
        assert_type(region.info(), ivshmem.RegionInfo)
        assert_type(region.array(np.float32, (4, 4), 64), npt.NDArray[np.float32])
        assert_type(region.array(np.dtype(np.uint8)), npt.NDArray[np.uint8])
        assert_type(region.array("<u4", 16), npt.NDArray[Any])
        np.from_dlpack(region)
        word: ivshmem.Atomic = region.atomic_u64(8)
        assert_type(word.offset, int)
    with ivshmem.Region.open(4096, name="x") as opened:
        assert_type(opened, ivshmem.Region)
        assert_type(opened.created, bool)


def server(path: str, memory: ivshmem.Region) -> None:
    with ivshmem.Server(path, memory, vectors=2).start() as server:
        assert_type(server, ivshmem.Server)
        assert_type(server.peers, list[ivshmem.Peer])
        assert_type(server.region, ivshmem.Region)


def device(address: str | None) -> None:
    for found in guest.devices():
        assert_type(found, guest.Device)
        assert_type(found.vectors, int | None)
    with guest.open(address, access="vfio", memory="resource2_wc") as device:
        assert_type(device, guest.GuestDevice)
        assert_type(device.id, int)
        assert_type(device.region, ivshmem.Region)
        assert_type(device.device, guest.Device)
        assert_type(device.wait(), ivshmem.Interrupt | None)
        assert_type(device.wait(0, timeout=1), int | None)
        assert_type(device.events(0), Iterator[ivshmem.Event])


async def asynchronous(path: str, address: str | None) -> None:
    async with aio.connect_async(path, timeout=1) as client:
        assert_type(client, aio.AsyncEndpoint[ivshmem.Client])
        assert_type(client.endpoint, ivshmem.Client)
        assert_type(client.peers, list[int])
        assert_type(await client.wait(), ivshmem.Interrupt)
        assert_type(await client.wait(0), int)
        assert_type(await client.wait(0, timeout=1), int | None)
        assert_type(await client.wait([0, 1], 0), ivshmem.Interrupt | None)
        assert_type(await client.next_event(1), ivshmem.Event | None)
        assert_type(await client.wait_word(client.region.atomic_u32(0), 0), int | None)
        client.ring(3, vector=1)
        async for event in client:
            assert_type(event, ivshmem.Event)
    device = await aio.open_async(address, access="vfio")
    assert_type(device, aio.AsyncEndpoint[guest.GuestDevice])
    assert_type(device.peers, list[int])  # type: ignore[misc]
