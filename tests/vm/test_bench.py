"""`ivshmem bench` between a real guest and the host: each of them rings once, the other answers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import ivshmem
from ivshmem.qemu import cmdline

from .harness import Guest, MakeGuest

TIMEOUT = 240.0  # Python starts slowly in a guest, and several times in each measurement
BENCH = [sys.executable, "-m", "ivshmem", "bench"]

# Runs `ivshmem bench` with the words of each line.
PROGRAM = """
    import json, subprocess, sys
    from ivshmem import guest

    for line in sys.stdin:
        command = [sys.executable, "-m", "ivshmem", "bench", *line.split()]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            errors = []
            for said in process.stderr:
                errors.append(said)
                print("NEWS", said, end="", flush=True)
            out = process.stdout.read()
        free = all(not device.driver for device in guest.devices())
        print("ENDED", json.dumps([process.returncode, out, errors[-1:], free]), flush=True)
    """


def ended(guest: Guest) -> tuple[int, str, list[str], bool]:
    """Status, stdout, the last line of stderr, and whether the device was given back."""
    found = guest.expect("ENDED", TIMEOUT).removeprefix("ENDED ")
    status, out, errors, free = json.loads(found)
    return status, out, errors, free


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*BENCH, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def told(process: subprocess.Popen[str], start: str) -> str:
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith(start), line
    return line


@pytest.mark.nightly
def test_host_and_guest(guest: MakeGuest, server: ivshmem.Server) -> None:
    a = guest(PROGRAM, args=cmdline.doorbell(server.path, 4), iommu=True)
    common = ["--vector", "2", "--timeout", str(TIMEOUT)]

    # The host rings first, and says what the guest has to start.
    ping = started("--peer", "0", "-S", server.path, "--seconds", "1", "--json", *common)
    with ping:
        command = told(ping, "no answer yet; this is peer 1: start there: ivshmem bench ")
        assert command.endswith("--echo 1 --vector 2\n")
        a.send("--echo 1 --vector 2 --timeout 3 --json")
        assert a.expect("NEWS") == (
            "NEWS this is peer 0, waiting for peer 1: start there:"
            " ivshmem bench --peer 0 --vector 2"
        )
        out, errors = ping.communicate(timeout=TIMEOUT)
    assert (ping.returncode, errors) == (0, "")
    (group,) = json.loads(out)["groups"]
    trips = sum(result["count"] for result in group["results"][1:])
    assert trips >= 100
    status, said, _, free = ended(a)
    assert (status, free) == (0, True)
    answered = json.loads(said)
    assert answered["peer"] == 1
    assert answered["answered"] >= trips

    # The guest rings, and the host answers the only one who is there.
    with started("--echo", "-S", server.path, "--rounds", "400", *common) as echo:
        said = told(echo, "this is peer ")
        assert "waiting for peer 0: start there: ivshmem bench --peer " in said
        number = said.split()[3].rstrip(",")
        a.send(f"--peer {number} --seconds 0.1 --vector 2 --json")
        status, out, errors_there, free = ended(a)
        assert (status, errors_there, free) == (0, [], True)
        (group,) = json.loads(out)["groups"]
        assert all(result["nanoseconds"]["p50"] > 0 for result in group["results"])
        echo.terminate()
        out, errors = echo.communicate(timeout=TIMEOUT)
    assert (echo.returncode, errors) == (0, "")
    assert out.startswith("answered peer 0")

    # Nobody is told in a guest who is there.
    a.send("--echo")
    status, out, errors_there, free = ended(a)
    assert (status, out, free) == (1, "", True)
    assert "Give the id that the other end prints (--echo ID)" in errors_there[0]
    a.send("--peer 9 --timeout 0.5")
    status, out, errors_there, free = ended(a)
    assert (status, out, free) == (1, "", True)
    assert "peer 9 did not answer for 0.5 seconds" in errors_there[0]


@pytest.mark.nightly
def test_by_name(guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client) -> None:
    """Where there is a directory of names, the guest's end finds out by itself whom to answer."""
    with ivshmem.Directory.create(host):
        a = guest(PROGRAM, args=cmdline.doorbell(server.path, 4), iommu=True)
        with started("--peer", "1", "-S", server.path, "--seconds", "1", "--json") as ping:
            told(ping, "no answer yet; this is peer 2")
            a.send("--echo --timeout 3")
            out, errors = ping.communicate(timeout=TIMEOUT)
        assert (ping.returncode, errors) == (0, "")
        status, out, _, free = ended(a)
        assert (status, free) == (0, True)
        assert out.startswith("answered peer 2")
