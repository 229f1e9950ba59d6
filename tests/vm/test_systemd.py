"""The units, under a real systemd, which a guest has: one's own is not there to be tried on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from .harness import MakeGuest

UNITS = Path(__file__).parents[2] / "systemd"

BEGIN = """
    import os, signal, sys, time
    from pathlib import Path
    from ivshmem import Interrupt, PeerJoined, PeerLeft, Disconnected, connect
    from manager import Manager, install

    def step(text):
        print(f"{time.monotonic() - began:5.1f} {text}", flush=True)

    def until(client, *wanted):
        for event in client.events(60):
            wanted = [each for each in wanted if each != event]
            if not wanted:
                return
        raise AssertionError(f"{wanted} never came")

    began = time.monotonic()
    install(Path(sys.argv[1]))
    manager = Manager()
    step("systemd runs")
"""

TEMPLATE = """
    unit, path = "ivshmem@web.service", "/run/ivshmem-web.sock"
    manager.override(unit, "[Service]", "WatchdogSec=2s",
                     'Environment="OPTIONS=--size 64K --vectors 2"')
    manager.ctl("start", "ivshmem@web.socket")
    assert manager.show(unit, "ActiveState") == "inactive"
    a = connect(path, timeout=60)
    step("activated by a first client")
    b = connect(path, timeout=60)
    until(a, PeerJoined(1))
    manager.wait_for(lambda: manager.show(unit, "StatusText") == "1 region, 2 peers")
    assert manager.show(unit, "ActiveState") == "active"
    # The journal, the listening socket and the memory, two clients.
    assert manager.show(unit, "NFileDescriptorStore") == "9"
    print(manager.run("ivshmem", "status", "--control", "/run/ivshmem-web/control"), flush=True)

    def went_on(clients, what, act):
        pid = manager.show(unit, "MainPID")
        for client in clients:
            for other in clients:
                if other is not client:
                    client.ring(other.id, 1)
        act()
        manager.wait_for(lambda: manager.show(unit, "MainPID") not in (pid, "0"))
        visitor = connect(path, timeout=60)
        for client in clients:
            until(client, Interrupt(1, 1), PeerJoined(visitor.id))
            assert set(client.peers) == {each.id for each in [*clients, visitor]} - {client.id}
            visitor.ring(client.id, 0)
            assert client.wait(0, timeout=60)
        visitor.close()
        for client in clients:
            until(client, PeerLeft(visitor.id))
        step(what)

    for _ in range(2):
        went_on([a, b], "killed", lambda: manager.ctl("kill", "-s", "KILL", unit))
    went_on([a, b], "stopped by a signal: the watchdog kills it",
            lambda: manager.ctl("kill", "-s", "STOP", unit))
    went_on([a, b], "restarted", lambda: manager.ctl("restart", unit))
    manager.ctl("kill", "-s", "KILL", unit)
    b.close()  # while nobody looks
    until(a, PeerLeft(1))
    manager.wait_for(lambda: manager.show(unit, "NFileDescriptorStore") == "6")
    step("a client left while it was down")
    manager.ctl("stop", unit)
    until(a, Disconnected("the server ended the connection"))
    step("stopped")
    a.close()
    connect(path, timeout=60).close()
    manager.ctl("stop", unit, "ivshmem@web.socket")
    assert not os.path.exists(path)
"""

SERVICE = """
    unit, path = "ivshmem.service", "/run/ivshmem/a"
    file = Path("/etc/ivshmem.toml")
    a, b = ('[region.%s]\\nsocket = "/run/ivshmem/%s"\\nmode = "0666"\\n' % (n, n) for n in "ab")
    file.write_text(a)
    manager.ctl("start", unit)
    step("started")
    client = connect(path, timeout=60)
    assert os.stat(path).st_uid != 0
    file.write_text(a + b)
    manager.ctl("reload", unit)
    manager.wait_for(lambda: os.path.exists("/run/ivshmem/b"))
    with connect("/run/ivshmem/b", timeout=60):
        step("reloaded")
    file.write_text(a.replace("socket", "sockets"))
    manager.ctl("restart", unit)
    with connect(path, timeout=60) as other:
        until(client, PeerJoined(other.id))
    step("restarted, though the file is wrong")
    file.write_text(a)
    manager.ctl("reload", unit)
    manager.wait_for(lambda: not os.path.exists("/run/ivshmem/b"))
    print(manager.run("ivshmem", "status", "-S", path), flush=True)
    manager.ctl("kill", "-s", "KILL", unit)
    with connect(path, timeout=60) as other:
        until(client, PeerJoined(other.id))
    manager.ctl("stop", unit)
    until(client, Disconnected("the server ended the connection"))
    assert not os.path.exists(path)
    client.close()
    for each in ("ivshmem.service", "ivshmem@.service", "ivshmem@.socket"):
        manager.run("systemd-analyze", "verify", "--man=no", f"/usr/lib/systemd/system/{each}")
    for each in ("ivshmem.service", "ivshmem@.service"):
        # 10 is naked; up to 2.0 systemd calls "OK".
        table = manager.run("systemd-analyze", "security", "--offline=yes", "--threshold=25",
                            "--no-pager", f"/usr/lib/systemd/system/{each}")
        print(table.splitlines()[-1], flush=True)
    print("DONE", flush=True)
"""


@pytest.mark.nightly
@pytest.mark.timeout(1000)  # two minutes on two idle processors, six on busy ones
def test_units(guest: MakeGuest) -> None:
    if shutil.which("/lib/systemd/systemd") is None:
        reason = "needs systemd: apt-get install systemd"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    inside = guest(BEGIN + TEMPLATE + SERVICE, argv=[str(UNITS)], memory="512M")
    inside.expect("DONE", timeout=900)
    assert inside.wait() == 0
