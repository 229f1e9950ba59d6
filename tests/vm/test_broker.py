"""A guest's device shared by several processes of the guest, which are clients as on a host."""

from __future__ import annotations

import pytest

import ivshmem
from ivshmem.qemu import cmdline

from .harness import MakeGuest
from .residents import Pair

TIMEOUT = 60.0  # for what takes milliseconds, on a machine that may be busy with other things

# Three clients, each on a vector of its own: rings the host whenever it is rung. Number 1 kills
# itself after the first time, number 2 is an ordinary user.
THREE_CLIENTS = """
    import os, signal, subprocess, sys
    from ivshmem import guest

    CLIENT = '''
    import os, sys
    import ivshmem, ivshmem.peer.client
    number = int(sys.argv[1])
    if number == 2:  # once all is imported, which only root may read
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    with ivshmem.connect("/tmp/socket", timeout=60) as client:
        words = ["CLIENT", number, client.id, client.vectors, client.peers]
        line = " ".join(map(str, words)) + os.linesep
        os.write(1, line.encode())  # at once: print writes a line in pieces, and others write, too
        for _ in range(2):
            assert client.wait(number, 60)
            with memoryview(client.region) as memory:
                memory[number] += 1
            client.ring(0, number)
            if number == 1:
                os.kill(os.getpid(), 9)
    '''

    serve = [sys.executable, "-m", "ivshmem", "guest", "serve", "-S", "/tmp/socket"]
    broker = subprocess.Popen(
        [*serve, "--peers", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    print(broker.stdout.readline(), end="")
    print(broker.stdout.readline(), end="")
    second = subprocess.run(
        [*serve, "-S", "/tmp/other"], stderr=subprocess.PIPE, text=True
    )
    print("SECOND", second.returncode, second.stderr, end="")
    os.chmod("/tmp/socket", 0o666)
    clients = [subprocess.Popen([sys.executable, "-c", CLIENT, str(n)]) for n in range(3)]
    for client in clients:
        print("ENDED", client.wait())
    broker.send_signal(signal.SIGTERM)
    status, driver = broker.wait(), guest.devices()[0].driver or "free"
    print("BROKER", status, driver, os.path.exists("/tmp/socket"))
    """


@pytest.mark.nightly
def test_three_clients_one_of_which_crashes(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
) -> None:
    a = guest(THREE_CLIENTS, args=cmdline.doorbell(server.path, 4), iommu=True)
    assert a.expect("sharing").startswith(
        "sharing 0000:00:03.0, id 1, 1M, 4 vectors, on /tmp/socket"
    )
    assert a.readline() == "  clients can ring: 0"
    second = a.expect("SECOND 1")
    assert "another process has the device open (process " in second
    assert "): stop it, or let it be `ivshmem guest serve`" in second
    assert {a.expect("CLIENT") for _ in range(3)} == {f"CLIENT {n} 1 4 [0]" for n in range(3)}
    for number in (0, 1, 2, 0, 2):
        host.ring(1, number)
        assert host.wait(number, TIMEOUT)
    assert [a.expect("ENDED") for _ in range(3)] == ["ENDED 0", "ENDED -9", "ENDED 0"]
    assert a.expect("BROKER") == "BROKER 0 free False"
    assert a.wait() == 0
    with memoryview(host.region) as memory:
        assert bytes(memory[:3]) == bytes([2, 1, 2])


def test_names_lead_from_guest_to_host(pair: Pair, pair_host: ivshmem.Client) -> None:
    """A client in the guest finds the host by name, through the broker, and is found by it."""
    host = pair_host
    with ivshmem.Directory.create(host) as names, names.publish("host", "test"):
        a = pair.a.run(
            """
            import ivshmem
            from ivshmem import guest

            with (
                guest.open(memory="resource2") as device,
                guest.Broker(device, "/tmp/socket").start(),
                ivshmem.connect("/tmp/socket", timeout=60) as client,
                ivshmem.Directory.open(client) as names,
                names.publish("guest", vector_range=range(2, 3)),
            ):
                client.ring(names.lookup("host").id, 3)
                print("RUNG", client.wait(2, 60))
            """
        )
        assert host.wait(3, TIMEOUT)
        entry = names.wait_for("guest", TIMEOUT)
        assert (entry.id, entry.vector_range) == (1, range(2, 3))
        host.ring(entry.id, entry.vector_range[0])
        assert a.expect("RUNG") == "RUNG 1"
        assert a.wait() == 0


@pytest.mark.nightly
def test_an_unplugged_device_ends_the_broker(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client
) -> None:
    chardev, device = cmdline.doorbell(server.path, 4)[1::2]
    a = guest(
        """
        import subprocess, sys
        command = [sys.executable, "-m", "ivshmem", "guest", "serve", "-S", "/tmp/socket"]
        broker = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        print("BROKER", broker.returncode, broker.stderr, end="")
        """,
        args=[
            *("-device", "pcie-root-port,id=rp0,chassis=1"),
            *("-chardev", chardev, "-device", f"{device},bus=rp0,id=shm"),
        ],
        iommu=True,
    )
    a.expect("sharing")
    a.qmp("device_del", id="shm")
    assert "the device was unplugged" in a.expect("BROKER 1")
    a.qmp_event("DEVICE_DELETED", device="shm")
    assert a.wait() == 0
