"""`ivshmem migrate` with guests that live: one writes all the while, one lets go of its device."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.mounts import huge_pages, mounted
from support.served import Served

import ivshmem
from ivshmem import migration
from ivshmem.migration import Options, Vm

from .harness import MakeGuest
from .inside import records
from .test_migrate import free_port
from .test_migration_smoke import PROGRAM, wrote

SIZE = 2 << 20

# Lets go of the device; when told to, waits for it to come back and checks what is in it.
OTHER = """
    import time
    import ivshmem, records
    from ivshmem import guest

    def look(written):
        while not guest.devices():
            time.sleep(0.05)
        with guest.open() as device, memoryview(device.region) as memory:
            wrong = records.wrong(memory, written) if written else ""
            print("SEES", len(memory), wrong, flush=True)

    look(0)
    look(int(input()))
    assert input() == "end"
    """


def device(kind: str, where: str, options: str = "") -> list[str]:
    """In a slot of its own, so that it comes back to the same place."""
    if kind == "plain":
        backend = f"memory-backend-file,id=m0,share=on,mem-path={where},size={SIZE}"
        one = f"ivshmem-plain,id=shm0,memdev=m0,addr=9{options}"
        return ["-object", backend, "-device", one]
    chardev = f"socket,id=c0,path={where}"
    one = f"ivshmem-doorbell,id=shm0,chardev=c0,vectors=2,addr=9{options}"
    return ["-chardev", chardev, "-device", one]


# Each kind, each way, huge pages on each side (0, 1) or on none (-1).
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "uri", "huge", "options"),
    [
        ("plain", "tcp:127.0.0.1:{2}", 1, Options()),
        ("doorbell", "unix:{1}/{0}", -1, Options()),
        pytest.param("plain", "file:{1}/{0}", 0, Options(), marks=pytest.mark.nightly),
        pytest.param(
            "plain", "tcp:127.0.0.1:{2}", -1, Options(multifd=True), marks=pytest.mark.nightly
        ),
    ],
)
def test_a_group_moves_while_one_writes(
    guest: MakeGuest, directory: Path, kind: str, uri: str, huge: int, options: Options
) -> None:
    where = [str(directory / "here"), str(directory / "there")]
    with ExitStack() as undo:
        files = list(where)
        if huge >= 0:
            assert undo.enter_context(huge_pages(2 << 20, 1)) == 1
            mount = undo.enter_context(mounted("hugetlbfs", "pagesize=2M"))
            files[huge] = str(mount / "memory")
        for path, file in zip(where, files, strict=True):
            if kind == "plain":
                undo.enter_context(ivshmem.Region.create(SIZE, path=file))
            else:
                undo.enter_context(Served(path, size=SIZE, file=file if file != path else None))
        if kind == "plain":
            where = files
        writer = guest(
            PROGRAM, name="w", args=device(kind, where[0], ",master=on"), migratable=True
        )
        writes = guest(waiting_for=writer, args=device(kind, where[1], ",master=on"))
        other = guest(OTHER, name="o", args=device(kind, where[0]), migratable=True)
        comes = guest(waiting_for=other)
        writer.expect("WRITES")
        other.expect("SEES")
        before = wrote(writer, "go on")
        pairs = {"w": (writer, writes), "o": (other, comes)}
        vms = [
            Vm(
                name,
                str(here.qmp_path),
                str(there.qmp_path),
                uri.format(n, directory, free_port()),
            )
            for n, (name, (here, there)) in enumerate(pairs.items())
        ]
        plan = asyncio.run(migration.prepare(vms, options))
        assert [step.kind for step in plan.steps if step.kind not in ("hold", "release")] == [
            *("unplug", "migrate", "migrate", "plug")
        ]
        progress: list[migration.TransferProgress] = []
        asyncio.run(migration.migrate(plan, state=directory / "state", watch=progress.append))
        assert progress[0].total > progress[0].shared == SIZE
        assert wrote(writes, "go on") > before
        written = wrote(writes, "stop")
        assert writes.expect("WRONG") == "WRONG []"
        comes.send(str(written))
        assert comes.expect("SEES") == f"SEES {SIZE} []"
        if kind == "plain":
            there = memoryview(Path(where[1]).read_bytes())
            assert records.wrong(there, written) == []
        for each in (writes, comes):
            each.send("end")
            assert each.wait() == 0
