"""A guest with devices of two regions of one `ivshmem serve --config`, which is told to reload."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ivshmem

from .harness import MakeGuest
from .host import TIMEOUT

IVSHMEM = [sys.executable, "-m", "ivshmem"]

# One that waits for both devices answers on the one that was rung, and says so in its memory.
PROGRAM = """
    from ivshmem import guest
    found = {device.size: device for device in guest.devices()}
    with guest.open(found[1 << 20].address) as db, guest.open(found[1 << 16].address) as log:
        print("READY", db.id, db.vectors, log.id, log.vectors, flush=True)
        for line in iter(input, "end"):
            name, vector, peer = line.split()
            device = {"db": db, "log": log}[name]
            assert device.wait(int(vector), timeout=60)
            device.region.write(0, name.encode())
            device.ring(int(peer), int(vector))
"""


def write(file: Path, **regions: str) -> None:
    tables = (
        f'[region.{name}]\nsocket = "{file.parent}/{name}"\n{settings}\n'
        for name, settings in regions.items()
    )
    file.write_text("".join(tables))


@pytest.mark.nightly
def test_two_regions_in_a_guest_and_reloads(guest: MakeGuest, tmp_path: Path) -> None:
    file = tmp_path / "ivshmem.toml"
    db, log = 'size = "1M"\nvectors = 3', 'size = "64K"'
    write(file, db=db, log=log, gone="")
    command = [*IVSHMEM, "serve", "--quiet", "--no-control", "--config", str(file)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as serving:
        assert serving.stdout is not None
        assert serving.stderr is not None
        try:
            assert serving.stdout.readline().startswith("serving 3 regions")
            asked = [*IVSHMEM, "qemu", "--config", str(file), "--json"]
            asked += ["--region", "db", "--region", "log"]
            args = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
            inside = guest(PROGRAM, args=args, iommu=True)
            assert inside.expect("READY") == "READY 0 3 0 1"
            with (
                ivshmem.connect(tmp_path / "db", timeout=TIMEOUT) as db_host,
                ivshmem.connect(tmp_path / "log", timeout=TIMEOUT) as log_host,
            ):

                def exchange() -> None:
                    """Interrupts both ways in both regions, each in its own."""
                    for name, host, vector in (("db", db_host, 2), ("log", log_host, 0)):
                        inside.send(f"{name} {vector} {host.id}")
                        host.ring(0, vector)
                        assert host.wait(vector, TIMEOUT) == 1, inside.report()
                        assert host.region.read(0, len(name)) == name.encode()
                        host.region.write(0, b"   ")
                    assert db_host.wait(timeout=0) is None
                    assert log_host.wait(timeout=0) is None

                exchange()
                for regions, said in (
                    ({"db": db, "log": log + '\nmode = "0600"'}, "gone: removed"),
                    ({"db": db, "log": log, "new": ""}, "new: added"),
                    ({"db": 'size = "1M"', "log": log}, "region.db.vectors = 1: it cannot change"),
                    ({"db": db, "log": log, "new": "size = 3"}, "region.new.size = 3"),
                ):
                    write(file, **regions)
                    serving.send_signal(signal.SIGHUP)
                    assert said in serving.stderr.readline()
                    assert db_host.peers == log_host.peers == [0]
                    exchange()
                inside.send("end")
                assert inside.wait() == 0
                for host in (db_host, log_host):
                    assert host.next_event(TIMEOUT) == ivshmem.PeerLeft(0)
        finally:
            serving.send_signal(signal.SIGTERM)
            serving.communicate(timeout=TIMEOUT)
    assert serving.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ivshmem.toml"]
