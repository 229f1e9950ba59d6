"""Round trips through channels between a guest and the host, beside a program in C with the header.

Both programs, channels/sleeping.c and channels/sleeping.py, run in turn in the same guest, of one
boot. The guest is emulated where there is no KVM.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from vm import image
from vm.harness import Guest

import ivshmem
from ivshmem import channel
from ivshmem.native.areas import find_area
from ivshmem.qemu import cmdline

from .bench_guest import RUNNER, End, InGuest, OnHost, compare, cores, measure, pin
from .conftest import HERE, Build

__all__ = ["cores"]

ROUNDS = 3  # few, because Python starts for half a minute in an emulated guest


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ivshmem.Server]:
    """A server whose memory has the two channels."""
    with ivshmem.Server(tmp_path / "socket", "1M", channels="512K").start() as server:
        with ivshmem.connect(server.path) as client, channel.open(client) as channels:
            for name in ("there", "back"):
                channels.create_messages(name, limit=64, slots=16, writers=1, readers=1)
        yield server


@pytest.mark.parametrize("by_library", ["guest", "both"])
def bench_channel_of_host_and_guest(
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    build: Build,
    room: ivshmem.Server,
    cores: tuple[int, int],
    by_library: str,
) -> None:
    """The guest's processor on one core; the rest of QEMU, and the host's end, on another."""
    if (reason := image.missing()) is not None:
        pytest.skip(reason)
    program = tmp_path / "sleeping"
    build("channels/sleeping.c", program, f"-I{channel.get_include()}")
    with ivshmem.connect(room.path) as client:
        area = find_area(client.region)
    assert area is not None
    c = [str(program), str(area.offset)]
    library = [sys.executable, str(HERE / "channels" / "sleeping.py"), str(area.offset)]
    echoing_by = library if by_library == "both" else c
    args = cmdline.doorbell(room.path, room.vectors)
    with Guest(RUNNER, args=args, name="guest", iommu=True) as guest:
        a: End = InGuest(guest)
        b: End = OnHost(room.path, cores[1])
        pin(guest, *cores)
        ours = [library, echoing_by]
        compare(
            benchmark, lambda: measure(a, c, b, c), lambda: measure(a, ours[0], b, ours[1]), ROUNDS
        )
