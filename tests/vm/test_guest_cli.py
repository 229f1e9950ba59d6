"""`ivshmem guest` in a real guest: what each command prints, and that the device is given back."""

from __future__ import annotations

import pytest

import ivshmem
from ivshmem.qemu import cmdline

from .harness import MakeGuest

NAME = 'it\'s a "front" door'

PROGRAM = """
    import json, signal, subprocess, sys, time
    from ivshmem import guest

    COMMAND = [sys.executable, "-m", "ivshmem", "guest"]

    def run(*arguments, status=0):
        result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
        assert result.returncode == status, result
        assert status == 0 or len(result.stderr.splitlines()) == 1, result
        return result.stderr if status else result.stdout

    address = guest.devices()[0].address
    _, line = run("list").splitlines()
    assert line.split()[:4] == [address, "1M", "doorbell", "4"]
    (found,) = json.loads(run("list", "--json"))
    info = json.loads(run("info", "--json", "-a", address.removeprefix("0000:")))
    assert found["vectors"] == info["vectors"] == 4 and info["id"] == 1
    assert info["access"] == info["memory"] == "vfio" and info["bus_master"]
    assert "open it by vfio" in run("info", "--access", "sysfs")
    assert run("hexdump", "0", "5", "--raw") == "hello"
    assert run("dump").startswith("00000000  68 65 6c 6c 6f")
    assert "it ends at 0x100000" in run("dump", "2M", "--raw", status=1)
    assert run("ring", NAME, "2") == run("ring", "0") == "rang 1 doorbell\\n"
    assert NAME in run("names")
    assert "no interrupt within 0.01 seconds" in run("wait", "-t", "0.01", status=1)
    assert "no interrupts here" in run("wait", "--access", "sysfs", status=1)
    assert "ids are 0 to 65535" in run("ring", "70000", status=1)
    assert "the device has 4 vectors" in run("ring", "0", "4", status=1)
    assert "there is " + address in run("info", "-a", "00:1f", status=1)
    assert "is neither an id nor a range" in run("serve", "--peers", "5-3", status=2)
    speeds = json.loads(run("measure", "--json", "--length", "4K"))
    assert [speed["memory"] for speed in speeds if speed["error"]] == ["uio"], speeds
    assert all(speed["read"] > 0 for speed in speeds if not speed["error"]), speeds

    def signalled(number):
        process = subprocess.Popen([*COMMAND, "wait"], stderr=subprocess.DEVNULL)
        while not guest.devices()[0].driver:
            time.sleep(0.001)
        process.send_signal(number)  # perhaps while it opens
        return process.wait(), guest.devices()[0].driver

    assert signalled(signal.SIGTERM) == (143, "")
    assert signalled(signal.SIGHUP) == (129, "")
    assert signalled(signal.SIGINT) == (130, "")
    waiting = subprocess.Popen([*COMMAND, "wait", "3"], stdout=subprocess.PIPE, text=True)
    while not guest.devices()[0].driver:
        time.sleep(0.001)
    print("RING", flush=True)
    print("WAITED", waiting.communicate()[0].strip(), guest.devices()[0].driver or "free")
    """


@pytest.mark.nightly
@pytest.mark.timeout(900)  # some twenty interpreters start in an emulated guest
def test_every_command(guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client) -> None:
    with memoryview(host.region) as memory:
        memory[:5] = b"hello"
    with ivshmem.Directory.create(host) as names, names.publish(NAME):
        a = guest(
            PROGRAM.replace("NAME", repr(NAME)), args=cmdline.doorbell(server.path, 4), iommu=True
        )
        a.expect("RING", 700)
        assert (host.wait(2, 0), host.wait(0, 0)) == (1, 1)
        # An interrupt that comes before the device is open is lost.
        while not any(line.startswith("WAITED") for line in a.lines):
            host.ring(1, 3)
            try:
                a.expect("WAITED", 0.2)
            except AssertionError:
                continue
        line = a.lines[-1]
        assert line.startswith("WAITED interrupt on vector 3")
        assert line.endswith("free")
        assert a.wait() == 0
