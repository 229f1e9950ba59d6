"""Bytes between a guest and its host: virtio-net, virtio-serial, a channel of bytes, a forward.

    python -m bench.transports [--rounds 3] [--buffer 256K] [--cpu max,-erms,-fsrm]

One guest of one processor, one boot; each round measures all ways in turn. The guest is emulated
(TCG) where there is no KVM, and then without ERMS and FSRM: TCG copies by `rep movsb` a byte at a
time, which would measure that instruction alone (--cpu max). guest_transports.py runs in the guest.
vsock is not among the ways: it needs a kernel's module on the host, vhost_vsock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vm.harness import Guest

import ivshmem
from ivshmem import channel
from ivshmem.memory.sizes import parse_size
from ivshmem.qemu import cmdline

from .bench_guest import pin
from .guest_transports import answer

HERE = Path(__file__).parent
WAYS = ("net", "serial", "channel", "forward", "batch forward", "loopback")
NAMES = {
    "net": "virtio-net, user networking",
    "serial": "virtio-serial",
    "channel": "a channel of bytes",
    "forward": "`ivshmem forward`",
    "batch forward": "`nice -n -10 chrt -b 0 ivshmem forward`",
    "loopback": "the guest's own loopback",
}
FORWARDS = {"forward": [], "batch forward": ["nice", "-n", "-10", "chrt", "-b", "0"]}
SIZE = 32 << 20  # bytes in each direction
TRIPS = 300


def serve(listener: Any) -> None:
    """Answer one connection after the other, in a thread."""

    def work() -> None:
        with contextlib.suppress(OSError, ivshmem.ClosedError):
            while True:
                found = listener.accept()
                connection = found[0] if isinstance(found, tuple) else found
                if isinstance(connection, socket.socket) and connection.family == socket.AF_INET:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with connection:
                    answer(connection)

    threading.Thread(target=work, daemon=True).start()


@contextlib.contextmanager
def host(
    folder: Path, buffer: str, of_forward: str
) -> Iterator[tuple[Any, list[str], dict[str, int]]]:
    """All that the guest's ways lead to: a server, QEMU's arguments, ports."""
    with contextlib.ExitStack() as stack:
        server = ivshmem.Server(folder / "socket", "64M", channels="48M")
        stack.enter_context(server.start())
        client = stack.enter_context(ivshmem.connect(server.path))
        channels = stack.enter_context(channel.open(client))
        room = channels.create_bytes("bytes", buffer=parse_size(buffer), connections=2)
        serve(stack.enter_context(room.listen()))
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        serve(tcp)
        serial = stack.enter_context(socket.socket(socket.AF_UNIX))
        serial.bind(str(folder / "serial"))
        serial.listen()
        serve(serial)
        ports = {"port": tcp.getsockname()[1]}
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports["iperf3"] = free.getsockname()[1]
        words = [sys.executable, "-m", "ivshmem", "forward", "-S", server.path]
        for name, port in (("plain", ports["port"]), ("iperf3", ports["iperf3"])):
            words += [name, "--connect", f"tcp:127.0.0.1:{port}", "--buffer", of_forward]
            words += ["--connections", "8"]
        for command in (["iperf3", "-s", "-p", str(ports["iperf3"])], words):
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        args = [
            *cmdline.doorbell(server.path, server.vectors),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
            *("-chardev", f"socket,id=bench,path={folder}/serial"),
            *("-device", "virtserialport,chardev=bench,name=bench"),
        ]
        yield server, args, ports


def measured(
    rounds: int, buffer: str, of_forward: str, cpu: str
) -> dict[str, list[dict[str, float]]]:
    """Return what each round found, by way."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory() as name,
        host(Path(name), buffer, of_forward) as (_, args, ports),
    ):
        args = [*args, "-cpu", cpu]
        with Guest(
            HERE / "guest_transports.py", args=args, name="guest", iommu=True, modules=["net"]
        ) as guest:
            guest.expect("READY", 120)
            cores = sorted(os.sched_getaffinity(0))
            pin(guest, cores[0], cores[-1])
            for number in range(rounds):
                for way in WAYS:
                    order = {"way": way, "size": SIZE, "trips": TRIPS, **ports}
                    guest.send(json.dumps(order | {"before": FORWARDS.get(way)}))
                    line = guest.expect("FOUND", 300).removeprefix("FOUND")
                    found[way].append(json.loads(line))
                    print(f"round {number + 1}: {way}: {line}", file=sys.stderr)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Yield the lines of a table: medians, and their ratios to virtio-net."""
    yield "| way | to the host, MB/s | from it, MB/s | round trip, µs | iperf3 to the host, MB/s |"
    yield "|---|---|---|---|---|"
    for way, rounds in found.items():
        cells = []
        for key, scale in (("up", 1e-6), ("down", 1e-6), ("trip", 1e6), ("iperf3", 1e-6)):
            values = [each[key] * scale for each in rounds if key in each]
            cells.append(f"{statistics.median(values):.0f}" if values else "-")
        yield f"| {NAMES[way]} | {' | '.join(cells)} |"
    yield ""
    yield "| ratio, median of the rounds | | aim |"
    yield "|---|---|---|"

    def ratio(one: str, other: str, key: str) -> float:
        pairs = zip(found[one], found[other], strict=True)
        return statistics.median(a[key] / b[key] for a, b in pairs)

    for key, text in (("up", "to the host"), ("down", "from the host")):
        for way, aim in (("channel", 3), *((way, 1) for way in FORWARDS)):
            value = min(ratio(way, other, key) for other in ("net", "serial"))
            yield f"| {NAMES[way]}, {text}, to the better virtio | {value:.2f} | {aim} |"
    for way in ("channel", *FORWARDS):
        value = max(ratio(way, other, "trip") for other in ("net", "serial"))
        yield f"| {NAMES[way]}, round trip, to the better virtio | {value:.2f} | below 1 |"
    for key, text in (("iperf3", "to the host"), ("iperf3 down", "from the host")):
        for way in FORWARDS:
            value = ratio(way, "loopback", key)
            yield f"| iperf3 by {NAMES[way]}, {text}, to {NAMES['loopback']} | {value:.2f} | 0.5 |"
    for way in FORWARDS:
        value = ratio(way, "loopback", "trip")
        yield f"| {NAMES[way]}, round trip, to {NAMES['loopback']} | {value:.2f} | |"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--buffer", default="256K", help="of the channel, in each direction")
    parser.add_argument("--forward-buffer", default="1M", help="of the forward")
    parser.add_argument("--cpu", default="max,-erms,-fsrm", help="the guest's, as QEMU has it")
    options = parser.parse_args()
    print(
        *table(measured(options.rounds, options.buffer, options.forward_buffer, options.cpu)),
        sep="\n",
    )


if __name__ == "__main__":
    main()
