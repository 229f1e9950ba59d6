"""A live guest moves to another QEMU with its shared memory: the device is master."""

from pathlib import Path

import pytest

from ivshmem.qemu import cmdline

from .harness import Guest, MakeGuest
from .inside import records

# The machine types and the stream of a migration are QEMU's.
pytestmark = pytest.mark.qemu

SIZE = 1 << 20

# Writes on and on; for each line says how much it has written; at the last, checks all of it.
PROGRAM = """
    import select
    import ivshmem, records
    from ivshmem import guest

    with guest.open() as device, memoryview(device.region) as memory:
        orders = select.poll()
        orders.register(0, select.POLLIN)
        print("WRITES", device.id, flush=True)
        written, order = 0, "go on"
        while order != "stop":
            written = records.write(memory, lambda: orders.poll(0), written)
            order = input()
            print("WROTE", written, flush=True)
        print("WRONG", records.wrong(memory, written), flush=True)
        assert input() == "end"
    """


def wrote(guest: Guest, order: str) -> int:
    guest.send(order)
    return int(guest.expect("WROTE").split()[1])


def region(path: Path) -> list[str]:
    """QEMU's arguments for a master on a file of its own."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    return cmdline.plain(str(path), SIZE, ident="db", master=True)


@pytest.mark.nightly
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_memory_moves_while_written(guest: MakeGuest, tmp_path: Path, machine: str) -> None:
    kind = ["-machine", machine]
    here, there = tmp_path / "here", tmp_path / "there"
    source = guest(PROGRAM, args=[*kind, *region(here)], migratable=True)
    destination = guest(waiting_for=source, args=[*kind, *region(there)])
    source.expect("WRITES")
    before = wrote(source, "go on")
    source.migrate(destination)
    assert source.qmp("query-status")["status"] == "postmigrate"
    after = wrote(destination, "go on")
    assert after > before
    written = wrote(destination, "stop")
    assert written > after
    assert destination.expect("WRONG") == "WRONG []"
    assert records.wrong(memoryview(there.read_bytes()), written) == []
    assert records.wrong(memoryview(here.read_bytes()), written), "left behind as it was"
    destination.send("end")
    assert destination.wait() == 0
