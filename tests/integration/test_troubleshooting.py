"""docs/howto/troubleshooting.md: what it says that this package and QEMU say is what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.messages import said, said_in_cython
from support.pages import HOME
from support.waiting import PATIENCE

import ivshmem

PAGE = (HOME / "docs/howto/troubleshooting.md").read_text()
QEMU = "qemu-system-x86_64"

# First cells that are not, or not only, texts of this package.
OTHERS = {"probe .. failed with error -22", "Input/output error", "resource2", "status", "put"}


def symptoms(section: str) -> list[str]:
    """What stands in backticks in the first column of a section's table."""
    part = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = (each for each in part if each.startswith(f"{section}\n"))
    cells = re.findall(r"^\| (.*?) \| ", text, re.MULTILINE)
    return [a or b for cell in cells for a, b in re.findall(r"``(.+?)``|`(.+?)`", cell)]


def pattern(symptom: str) -> str:
    return ".*".join(re.escape(part) for part in symptom.split(".."))


@pytest.mark.parametrize(
    ("section", "least"), [("In a guest", 9), ("Host programs", 7), ("Servers", 4), ("Channels", 3)]
)
def test_the_package_says_that(section: str, least: int) -> None:
    texts = [*(text for _, text in said()), *said_in_cython()]
    quoted = [each for each in symptoms(section) if each not in OTHERS and " " in each]
    assert len(quoted) >= least
    for each in quoted:
        assert any(re.search(pattern(each), text) for text in texts), each


def socket_of(path: Path) -> list[str]:
    return ["-chardev", f"socket,path={path},id=c"]


def file_of(path: Path, size: str) -> list[str]:
    backend = f"memory-backend-file,id=m,mem-path={path},size={size},share=on"
    return ["-object", backend, "-device", "ivshmem-plain,memdev=m"]


DOORBELL = ["-device", "ivshmem-doorbell,chardev=c"]
# For each text: QEMU's arguments, made from a server's path and from a file of 3 MiB.
WRONG: dict[str, Callable[[Path, Path], list[str]]] = {
    "'ivshmem' is not a valid device model name": lambda *_: ["-device", "ivshmem"],
    "You must specify a 'chardev'": lambda *_: ["-device", "ivshmem-doorbell"],
    "You must specify a 'memdev'": lambda *_: ["-device", "ivshmem-plain"],
    "Failed to connect to '..': No such file or directory": lambda path, _: [
        *socket_of(path.with_name("none")),
        *DOORBELL,
    ],
    "Device '..' is in use": lambda path, _: [*socket_of(path), *DOORBELL, *DOORBELL],
    "master must connect to the server before any peers": lambda path, _: [
        *socket_of(path),
        *(*DOORBELL[:1], f"{DOORBELL[1]},master=on"),
    ],
    "Failed to initialize interrupts: The number of MSI-X vectors is invalid": lambda path, _: [
        *socket_of(path),
        *(*DOORBELL[:1], f"{DOORBELL[1]},vectors=4000"),
    ],
    "Assertion `is_power_of_2(size)' failed": lambda _, file: file_of(file, "3M"),
    "backing store size .. does not match 'size' option ..": lambda _, file: file_of(file, "4M"),
}


@pytest.fixture(scope="module")
def server_and_file(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("t")
    file = folder / "file"
    with file.open("wb") as made:
        made.truncate(3 << 20)
    path = folder / "s"
    # A process of its own: what it has of a QEMU that ended is nothing that a test left open.
    command = [sys.executable, "-m", "ivshmem", "serve", "-S", str(path), "-l", "1M"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            with ivshmem.connect(path, timeout=PATIENCE, wait_for_server=True) as first:
                assert first.id == 0
                yield path, file
        finally:
            server.terminate()


@pytest.mark.skipif(
    shutil.which(QEMU) is None, reason=f"no {QEMU}: apt-get install qemu-system-x86"
)
@pytest.mark.parametrize("text", WRONG)
def test_qemu_says_that(text: str, server_and_file: tuple[Path, Path]) -> None:
    assert text in symptoms("QEMU does not start")
    machine = ["-M", "q35", "-nodefaults", "-display", "none", "-S", "-m", "32"]
    done = subprocess.run(
        [QEMU, *machine, *WRONG[text](*server_and_file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode != 0
    assert re.search(pattern(text), done.stderr), done.stderr
