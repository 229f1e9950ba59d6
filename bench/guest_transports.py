"""In a guest: bytes to the host and back, by each way that leads there; orders come in JSON.

Knows: how each way is opened, how long it takes. Does not know: what the figures are compared with.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivshmem import channel, guest

HOST = "10.0.2.2"  # as QEMU's user networking has it
BLOCK = 1 << 18
TRIP = 64  # bytes of a round trip
LOCAL = 9000  # a port of the guest
_ADDRESS, _FLAGS, _NETMASK = 0x8916, 0x8914, 0x891C  # ioctl(2) requests, netdevice(7)


def configure() -> None:
    """Do what `ip address add` and `ip link set up` would."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def request(number: int, name: bytes, value: bytes) -> None:
            fcntl.ioctl(any_socket, number, struct.pack("16s24s", name, value))

        for name, address in ((b"lo", "127.0.0.1"), (b"eth0", "10.0.2.15")):
            for number, text in ((_ADDRESS, address), (_NETMASK, "255.255.255.0")):
                packed = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))
                request(number, name, packed)
            request(_FLAGS, name, struct.pack("H", 0x41))


class Serial:
    """A virtio-serial port, with the methods of a socket."""

    def __init__(self, name: str) -> None:
        for port in Path("/sys/class/virtio-ports").iterdir():
            if (port / "name").read_text().strip() == name:
                self._fd = os.open(f"/dev/{port.name}", os.O_RDWR)

    def sendall(self, data: bytes | memoryview) -> None:
        """As of a socket."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def recv_into(self, buffer: memoryview) -> int:
        """As of a socket."""
        return os.readv(self._fd, [buffer])

    def close(self) -> None:
        """As of a socket."""
        os.close(self._fd)


@contextlib.contextmanager
def opened(way: str, port: int) -> Iterator[Any]:
    """A connection to the host."""
    if way == "channel":
        with guest.open() as device, channel.open(device) as channels:
            found = channels.open("bytes", "bytes")
            assert isinstance(found, channel.Bytes)
            with found.connect(wait_for_listener=True, timeout=60) as stream:
                yield stream
    elif way == "serial":
        with contextlib.closing(Serial("bench")) as serial:
            yield serial
    else:
        local = LOCAL + 2 if way == "loopback" else LOCAL
        where = (HOST, port) if way == "net" else ("127.0.0.1", local)
        with socket.create_connection(where, timeout=60) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sock


def answer(connection: Any) -> None:
    """Do what the guest's side asks for, until it ends."""
    block = memoryview(bytearray(BLOCK))

    def receive(view: memoryview) -> bool:
        while view:
            count = connection.recv_into(view)
            if not count:
                return False
            view = view[count:]
        return True

    with contextlib.suppress(ConnectionError):
        while receive(block[:9]):
            order, number = bytes(block[:1]), int.from_bytes(block[1:9], "big")
            for _ in range(number if order == b"P" else number // BLOCK):
                if order == b"D":
                    connection.sendall(block)
                else:
                    part = block[:TRIP] if order == b"P" else block
                    receive(part)
                    if order == b"P":
                        connection.sendall(part)
            if order != b"P":
                connection.sendall(b"k")


def receive(connection: Any, view: memoryview) -> None:
    """Receive until the memory is full."""
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]


def measure(connection: Any, size: int, trips: int) -> dict[str, float]:
    """Return bytes a second in both directions, and the median of round trips in seconds."""
    block = memoryview(bytearray(BLOCK))
    found = {}
    for key, order in (("up", b"U"), ("down", b"D")):
        began = time.perf_counter()
        connection.sendall(order + size.to_bytes(8, "big"))
        for _ in range(size // BLOCK):
            if order == b"U":
                connection.sendall(block)
            else:
                receive(connection, block)
        receive(connection, block[:1])
        found[key] = size / (time.perf_counter() - began)
    connection.sendall(b"P" + trips.to_bytes(8, "big"))
    times = []
    for _ in range(trips):
        began = time.perf_counter()
        connection.sendall(block[:TRIP])
        receive(connection, block[:TRIP])
        times.append(time.perf_counter() - began)
    found["trip"] = sorted(times)[trips // 2]
    return found


@contextlib.contextmanager
def forwards(before: list[str]) -> Iterator[None]:
    """This side of two forwards, in one process. `before`: what starts its command."""
    words = [*before, sys.executable, "-m", "ivshmem", "forward", "--guest"]
    for number, name in enumerate(("plain", "iperf3")):
        words += [name, "--listen", f"tcp:127.0.0.1:{LOCAL + number}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for _ in range(2):
            line = process.stderr.readline()
            assert b"listens at" in line, line
        try:
            yield
        finally:
            process.terminate()


def iperf3(host: str, port: int, *words: str) -> float:
    """Return bytes a second."""
    command = ["iperf3", "-c", host, "-p", str(port), "-t", "3", "-J", *words]
    for _ in range(50):
        done = subprocess.run(command, capture_output=True, check=False)
        found = json.loads(done.stdout)
        if "busy" not in found.get("error", ""):
            break
        time.sleep(0.1)
    assert "error" not in found, found["error"]
    speed: float = found["end"]["sum_received"]["bits_per_second"] / 8
    return speed


def main() -> None:
    """Do what the lines of the standard input order."""
    configure()
    server = subprocess.Popen(["iperf3", "-s", "-p", "5201"], stdout=subprocess.DEVNULL)
    listener = socket.create_server(("127.0.0.1", LOCAL + 2))
    if os.fork() == 0:
        while True:
            with listener.accept()[0] as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                answer(connection)
    print("READY", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        way, port, other = order["way"], order["port"], order["iperf3"]
        found: dict[str, float] = {}
        before = order["before"]  # None: this way has no forward
        with contextlib.nullcontext() if before is None else forwards(before):
            with opened(way, port) as connection:
                found |= measure(connection, order["size"], order["trips"])
            if way not in ("serial", "channel"):
                where = (HOST, other) if way == "net" else ("127.0.0.1", 5201)
                if before is not None:
                    where = "127.0.0.1", LOCAL + 1
                found["iperf3"] = iperf3(*where)
                found["iperf3 down"] = iperf3(*where, "-R")
        print("FOUND", json.dumps(found), flush=True)
    server.kill()


if __name__ == "__main__":
    main()
