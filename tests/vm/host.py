"""The host's side of tests with guests: what a server reported, events, QEMU's arguments."""

import ivshmem
from ivshmem.qemu import cmdline

TIMEOUT = 120.0  # for what takes milliseconds, on a machine that may be busy with other things
SLOW = 400.0  # for programs that start a dozen others: a second each in a guest on a quiet machine


class Events:
    """What a server reported, in order."""

    def __init__(self) -> None:
        self.joined: list[ivshmem.Peer] = []
        self.left: list[ivshmem.Peer] = []


def until(client: ivshmem.Client, wanted: ivshmem.Event) -> list[ivshmem.Event]:
    """All events up to the one that is waited for."""
    seen = []
    for event in client.events(TIMEOUT):
        seen.append(event)
        if event == wanted:
            return seen
    raise AssertionError(f"{wanted} never came, only {seen}")


def doorbell(server: ivshmem.Server) -> list[str]:
    """QEMU's arguments for a device that is connected to a server."""
    return cmdline.doorbell(server.path, server.vectors)


def pluggable(server: ivshmem.Server, number: int = 0) -> list[str]:
    """The same, in a slot that it can be unplugged from, under the id "shm0" or its like."""
    chardev, socket, option, device = cmdline.doorbell(
        server.path, server.vectors, ident=f"chardev{number}"
    )
    port = f"pcie-root-port,id=port{number},chassis={number + 1}"
    return [
        *(chardev, socket, "-device", port),
        *(option, f"{device},bus=port{number},id=shm{number}"),
    ]
