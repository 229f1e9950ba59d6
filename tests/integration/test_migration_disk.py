"""The state of a migration is written by a disk that is slow: the program's other tasks go on.

There are no VMs: the only step is that of a server that cannot be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path

import pytest

from ivshmem.migration import MigrationFailed, Options, Plan, Step, migrate
from ivshmem.migration.model import FoundPeer


class Disk:
    """Holds each fsync until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.syncs = 0
        self.goes_on = threading.Event()
        self._one = threading.Semaphore(0)
        self._waits = 0
        real = os.fsync

        def fsync(fd: int) -> None:
            self.syncs += 1
            while not self.goes_on.wait(0.001):
                if self._one.acquire(blocking=False):
                    break
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)

    def let_one_go_on(self) -> None:
        """One fsync, for each of the first two."""
        if self._waits < self.syncs < 3:
            self._waits += 1
            self._one.release()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def plan(folder: Path) -> Plan:
    peer = FoundPeer(1, 1, "python3", 0)
    step = Step("evict", control=str(folder / "nobody"), region="x", peer=peer)
    return Plan((), Options(), (), (step,))


async def ticking(disk: Disk, after: int) -> None:
    """Until the disk is busy for the time after so many; other tasks run all the while."""
    async with asyncio.timeout(60) if hasattr(asyncio, "timeout") else contextlib.nullcontext():
        while disk.syncs <= after:
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0)


def test_other_tasks_go_on(disk: Disk, tmp_path: Path) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(migrate(plan(tmp_path), state=tmp_path / "state"))
        await ticking(disk, 0)
        assert not task.done()
        disk.goes_on.set()
        with pytest.raises(MigrationFailed):
            await task

    asyncio.run(main())
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_while_the_state_is_made(disk: Disk, tmp_path: Path, times: int) -> None:
    """However often: the disk is waited for, and then nothing is left of it."""

    async def main() -> None:
        task = asyncio.ensure_future(migrate(plan(tmp_path), state=tmp_path / "state"))
        await ticking(disk, 0)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        disk.goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not (tmp_path / "state").exists()


def test_cancelled_while_a_step_is_noted(disk: Disk, tmp_path: Path) -> None:
    """The step is not begun then, and what was noted is undone."""
    begun: list[int] = []

    async def main() -> None:
        task = asyncio.ensure_future(
            migrate(plan(tmp_path), state=tmp_path / "state", tell=lambda *a: begun.append(a[0]))
        )
        await ticking(disk, 0)
        # One wait at a time: that for the plan, that for its directory, and then the first note's.
        while not (tmp_path / "state").exists() or disk.syncs < 3:
            disk.let_one_go_on()
            await asyncio.sleep(0.001)
        await ticking(disk, 2)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        disk.goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert begun == [1], "only to be undone"
    assert not (tmp_path / "state").exists()
