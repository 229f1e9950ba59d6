"""Brokers and channels in a kernel that has no asynchronous I/O, or none left, or forbids it."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import PATIENCE

# Has io_setup(2) fail as in a kernel without CONFIG_AIO, or under a container's seccomp filter.
_FILTER = r"""
import ctypes, os, struct, sys
import ivshmem

NUMBER = {"x86_64": 206, "aarch64": 0}[os.uname().machine]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
code = [
    (LOAD, 0, 0, 0),  # the call's number
    (EQUAL, 0, 1, NUMBER),
    (RETURN, 0, 0, 0x00050000 | int(sys.argv[2])),  # SECCOMP_RET_ERRNO
    (RETURN, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
]
words = b"".join(struct.pack("=HBBI", *line) for line in code)
buffer = ctypes.create_string_buffer(words)
libc = ctypes.CDLL(None, use_errno=True)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(len(code), ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, a filter
"""

BROKER = (
    _FILTER
    + r"""
from ivshmem.guest import Broker

path = sys.argv[1]
with ivshmem.Server(path, "1M", vectors=2).start(), ivshmem.connect(path) as device:
    before = set(os.listdir("/proc/self/fd"))
    try:
        Broker(device, path + ".shared")
    except OSError as error:
        print(error.errno, error.strerror)
    assert set(os.listdir("/proc/self/fd")) == before
    assert not os.path.exists(path + ".shared")
    device.ring(device.id, 1)
    assert device.wait(1, 60) == 1, "one process can use it, as the message says"
"""
)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="numbers of system calls"
)
@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSYS, "this kernel has no asynchronous I/O (CONFIG_AIO, or a seccomp filter)"),
        (errno.ENOSYS, "let one process use the device, by `open`"),
        (errno.EAGAIN, "as root, echo 1048576 > /proc/sys/fs/aio-max-nr"),
        (errno.EPERM, "Operation not permitted"),
    ],
)
def test_without_asynchronous_io(directory: Path, code: int, text: str) -> None:
    """The refusal says so in one line; nothing stays open, and the device works."""
    words = [sys.executable, "-c", BROKER, str(directory / "s"), str(code)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{code} ")
    assert text in line


# Two processes as far as channels can tell. Those that sleep look by themselves once in 1000 s.
CHANNELS = (
    _FILTER
    + r"""
import asyncio, threading, time
from ivshmem import channel

def asleep():
    time.sleep(0.1)  # a thread that sleeps only later has its message at once

path = sys.argv[1]
how = {"beat": 1000, "lease": 10000}
with ivshmem.Server(path, "4M", vectors=1, channels="1M").start():
    with ivshmem.connect(path) as a, ivshmem.connect(path) as b:
        with channel.open(a, **how) as one, channel.open(b, **how) as two:
            reader = one.create_messages("a", limit=8).reader("block")
            writer = two.open("a").writer()
            got = []
            ways = (
                lambda: reader.get(60),
                lambda: asyncio.run(reader.get_async(60)),
            )
            for way in ways:
                thread = threading.Thread(target=lambda: got.append(way()))
                thread.start()
                asleep()
                writer.put(b"rung")
                thread.join()
            assert got == [b"rung"] * 2, got
            # A hostile peer fills the counter, and lets writes to it wait: a ring does not.
            thread = threading.Thread(target=lambda: got.append(reader.get(1)))
            thread.start()
            asleep()
            fd = a._descriptor(0)
            os.eventfd_read(fd)  # the rings so far
            os.eventfd_write(fd, (1 << 64) - 2)
            os.set_blocking(fd, True)
            asleep()
            began = time.monotonic()
            writer.put(b"full")
            assert time.monotonic() - began < 0.5
            thread.join()
            assert got[2:] == [b"full"], got
print("done")
"""
)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="numbers of system calls"
)
def test_channels_without_asynchronous_io(directory: Path) -> None:
    """They ring all the same, and no ring waits for a counter that is full."""
    words = [sys.executable, "-c", CHANNELS, str(directory / "s"), str(errno.ENOSYS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
