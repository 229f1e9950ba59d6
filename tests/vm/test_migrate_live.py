"""`ivshmem migrate` with guests that live: one writes all the while, one lets go of its device."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.served import Served

import ivshmem
from ivshmem import migration
from ivshmem.migration import Vm

from .harness import MakeGuest
from .inside import records
from .test_migrate import free_port
from .test_migration_smoke import PROGRAM, wrote

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
        backend = f"memory-backend-file,id=m0,share=on,mem-path={where},size=1M"
        one = f"ivshmem-plain,id=shm0,memdev=m0,addr=9{options}"
        return ["-object", backend, "-device", one]
    chardev = f"socket,id=c0,path={where}"
    one = f"ivshmem-doorbell,id=shm0,chardev=c0,vectors=2,addr=9{options}"
    return ["-chardev", chardev, "-device", one]


@pytest.mark.parametrize(
    ("kind", "uri"), [("plain", "tcp:127.0.0.1:{2}"), ("doorbell", "unix:{1}/{0}")]
)
def test_a_group_moves_while_one_writes(
    guest: MakeGuest, directory: Path, kind: str, uri: str
) -> None:
    where = [str(directory / "here"), str(directory / "there")]
    with ExitStack() as undo:
        for path in where:
            if kind == "plain":
                undo.enter_context(ivshmem.Region.create("1M", path=path))
            else:
                undo.enter_context(Served(path))
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
        plan = asyncio.run(migration.prepare(vms))
        assert [step.kind for step in plan.steps if step.kind not in ("hold", "release")] == [
            *("unplug", "migrate", "migrate", "plug")
        ]
        progress: list[migration.Progress] = []
        asyncio.run(migration.migrate(plan, state=directory / "state", watch=progress.append))
        assert progress[0].total > progress[0].shared == 1 << 20
        assert wrote(writes, "go on") > before
        written = wrote(writes, "stop")
        assert writes.expect("WRONG") == "WRONG []"
        comes.send(str(written))
        assert comes.expect("SEES") == f"SEES {1 << 20} []"
        if kind == "plain":
            there = memoryview(Path(where[1]).read_bytes())
            assert records.wrong(there, written) == []
        for each in (writes, comes):
            each.send("end")
            assert each.wait() == 0
