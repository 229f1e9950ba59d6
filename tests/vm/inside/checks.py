"""What several programs in guests check, with nothing but the standard library."""

import ctypes
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 30.0  # seconds; reached only when a test fails

PCI = Path("/sys/bus/pci")


@contextmanager
def refused(kind: type[BaseException], *texts: str) -> Iterator[None]:
    """What is done inside raises exactly this, and the message has all these texts."""
    try:
        yield
    except kind as error:
        said = str(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
    missing = [text for text in texts if text not in said]
    assert not missing, f"{said!r} does not say {missing}"


def until(condition: Callable[[], object], what: str = "condition") -> None:
    """Look again and again until it is true; for what nobody tells of."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not come true"
        time.sleep(0.001)


def in_child(action: Callable[[], object]) -> None:
    """Fork, do it in the child, and check that it went well; shows the child's traceback."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"child: {status}"


def driver(address: str) -> str:
    """Of a PCI device; "" for none. Not asked of the package."""
    link = PCI / "devices" / address / "driver"
    return link.resolve().name if link.exists() else ""


def command(address: str) -> int:
    """The PCI command register: 2 memory decoding, 4 bus mastering."""
    config = (PCI / "devices" / address / "config").read_bytes()
    return int.from_bytes(config[4:6], "little")


def set_command(address: str, value: int) -> None:
    with (PCI / "devices" / address / "config").open("r+b", buffering=0) as config:
        config.seek(4)
        config.write(value.to_bytes(2, "little"))


_FINIT_MODULE, _DELETE_MODULE = 313, 176  # of x86-64


def load_module(path: str) -> None:
    """Load a kernel module, as insmod does."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY)
    try:
        if libc.syscall(_FINIT_MODULE, fd, b"", 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)


def unload_module(name: str) -> None:
    """Take it out of the kernel, as rmmod does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_DELETE_MODULE, name.encode(), os.O_NONBLOCK):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
