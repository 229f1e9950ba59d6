"""What `ivshmem qemu` prints: typed into a shell, and taken by a real QEMU, also side by side."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.emulator import QEMU, needs_qemu
from support.peer import FakeServer
from support.waiting import PATIENCE

import ivshmem
from ivshmem import ServerGone
from ivshmem.peer import inquiry
from ivshmem.qemu import cmdline, old_device
from ivshmem.text import command

IVSHMEM = command([sys.executable, "-m", "ivshmem"])
# It sets up all devices, runs no guest, and ends by itself.
START = f"{QEMU} -machine q35 -accel tcg -S -display none -nodefaults -monitor stdio"


def sh(line: str, *, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["sh", "-c", line],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHONUN")},
    )
    assert done.returncode == status, done.stderr
    return done


def start(line: str) -> None:
    """QEMU has all devices: it answers on its monitor, and ends when it is told to."""
    assert "QEMU" in sh(line, stdin="quit\n").stdout


@pytest.fixture
def sockets_of_two(tmp_path: Path) -> Iterator[tuple[str, str]]:
    names = ("a", "b")
    for name in names:
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        paths = [str(tmp_path / name / "ivshmem.sock") for name in names]
        for path in paths:
            server = ivshmem.Server(path, "1M", vectors=2)
            stack.enter_context(server.start())
        yield paths[0], paths[1]


@needs_qemu
class TestSideBySide:
    def test_two_servers(self, sockets_of_two: tuple[str, str]) -> None:
        one, other = sockets_of_two
        start(f"{START} $({IVSHMEM} qemu -S {one}) $({IVSHMEM} qemu -S {other})")

    def test_two_files(self, tmp_path: Path) -> None:
        lines = " ".join(f"$({IVSHMEM} qemu -l 1M -f {tmp_path}/{name})" for name in "ab")
        start(f"{START} {lines}")

    def test_one_region_twice(self, sockets_of_two: tuple[str, str]) -> None:
        path = sockets_of_two[0]
        start(f"{START} $({IVSHMEM} qemu -S {path}) $({IVSHMEM} qemu -S {path} --id again)")

    def test_a_path_with_commas(self, tmp_path: Path) -> None:
        with ivshmem.Server(str(tmp_path / "a,b,,c"), "1M").start() as server:
            start(f"{START} $({IVSHMEM} qemu -S {server.path})")

    def test_a_path_with_a_space(self, tmp_path: Path) -> None:
        """No quoting survives an unquoted $(..): what is printed says what does."""
        with ivshmem.Server(str(tmp_path / "a b"), "1M").start() as server:
            printed = sh(f"{IVSHMEM} qemu -S '{server.path}'")
            assert "xargs" in printed.stderr
            start(f"{START} {printed.stdout.strip()}")
            sh(f"{IVSHMEM} qemu -S '{server.path}' | xargs {START} -device help > /dev/null")

    def test_the_banner_is_pasted(self, tmp_path: Path) -> None:
        with ivshmem.Server(str(tmp_path / "a b"), "1M").start() as server:
            lines = cmdline.shell_lines(cmdline.doorbell(server.path, 1), "        ")
            assert len(lines.splitlines()) == 2
            start(f"{START} {lines}")


PATHS = [
    "/run/ivshmem.sock",
    "/run/ivshmem-sock",
    "/run/ivshmem/sock",
    "/run/ivshmem_sock",
    "/run/ivshmem sock",
    "/run/ivshmem,sock",
    "/run/\u4e16",
    "/run/\u754c",
    "/1/s",
    "/1-s",
    "/-",
    "/ ",
    "/" + "x" * 100,
    "/" + "x" * 101,
    "/tmp/a\udcff",
    "/tmp/a\n",
]


def test_each_path_has_an_id_of_its_own() -> None:
    idents = [cmdline.ident_of(path) for path in PATHS]
    assert len(set(idents)) == len(PATHS)
    for ident in idents:
        assert cmdline.check_ident(ident) == ident
        assert len(ident) < 64
    assert idents[0] == "run-ivshmem.sock"


@pytest.mark.parametrize("ident", ["", "1a", "-a", "a b", "a,b", "a\n", "\xe9", "a/b"])
def test_ids_that_qemu_refuses(ident: str) -> None:
    with pytest.raises(ValueError, match="QEMU allows letters, digits"):
        cmdline.check_ident(ident)


# -- a server that is not ours ---------------------------------------------------------------------


def test_a_foreign_server_is_not_waited_for(tmp_path: Path) -> None:
    """It greets a peer and keeps the connection, as QEMU's example server does."""
    path = str(tmp_path / "s")
    with FakeServer(path, lambda peer: (peer.send(bytes(8)), peer.recv(1))):
        with pytest.raises(ServerGone, match="does not answer questions"):
            inquiry.ask(path, 10 * PATIENCE)
    with FakeServer(path, lambda peer: (peer.send(bytes(8)), peer.recv(1))):
        said = sh(f"{IVSHMEM} qemu -S {path}", status=1).stderr
    assert "does not answer how many vectors it has: give --vectors" in said


def test_a_server_that_answers_drop_by_drop_is_not_waited_for_without_end(tmp_path: Path) -> None:
    def drip(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(b"{")
                time.sleep(0.05)  # slower than one read, faster than the time limit

    path = str(tmp_path / "s")
    with FakeServer(path, drip), pytest.raises(ServerGone):
        inquiry.ask(path, 0.3)


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "device"])
def test_what_cannot_be_a_server(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    make: dict[str, Callable[[], object]] = {
        "file": path.touch,
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/null"),
    }
    make[kind]()
    said = sh(f"{IVSHMEM} qemu -S {path}", status=1).stderr
    assert said == f"ivshmem: {path}: not a socket: no server listens here, choose another path\n"


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_cannot_be_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m"
    make: dict[str, Callable[[], object]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/null"),
    }
    make[kind]()
    said = sh(f"{IVSHMEM} qemu -f {path}", status=1).stderr
    assert said.startswith(f"ivshmem: {path} is not a regular file")


def test_a_file_of_no_bytes_is_one_to_be_made(tmp_path: Path) -> None:
    """tmpfiles.d makes such files, so that they have the right owner."""
    path = tmp_path / "m"
    path.touch()
    assert "size=4M" in sh(f"{IVSHMEM} qemu -f {path}").stdout
    assert "size=1M" in sh(f"{IVSHMEM} qemu -f {path} -l 1M").stdout


# -- lines of QEMU before 4.0 ----------------------------------------------------------------------

OLD = {
    "-device ivshmem,size=1": "size=1M,share=on,mem-path=/dev/shm/ivshmem,",
    "-device ivshmem,shm=x,size=1": "size=1M,share=on,mem-path=/dev/shm/x,",
    "-device ivshmem,shm=/x": "size=4M,share=on,mem-path=/dev/shm/x,",
    "-device ivshmem,shm=x,size=64M,role=master": "mem-path=/dev/shm/x,id=dev-shm-x -device"
    " ivshmem-plain,memdev=dev-shm-x,master=on",
    "-device driver=ivshmem,shm=x,use64=1,msi=off": "ivshmem-plain,memdev=dev-shm-x\n",
    "-chardev socket,path=/run/s,id=c -device ivshmem,chardev=c,size=1,vectors=8": (
        "-chardev socket,path=/run/s,id=run-s -device ivshmem-doorbell,vectors=8,chardev=run-s\n"
    ),
    "-chardev socket,id=c,path=/run/a,,b -device ivshmem,chardev=c,role=peer,msi=on": (
        "socket,path=/run/a,,b,id="
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("line", OLD)
def test_an_old_line_is_translated(line: str) -> None:
    done = sh(f"{IVSHMEM} qemu {line}")
    assert OLD[line] in done.stdout
    assert "QEMU 4.0 removed the device ivshmem" in done.stderr


@needs_qemu
def test_the_translation_is_taken(tmp_path: Path) -> None:
    name = f"ivshmem-test-{os.getpid()}"
    try:
        start(f"{START} $({IVSHMEM} qemu -device ivshmem,shm={name},size=1)")
        assert (Path("/dev/shm") / name).stat().st_size == 1 << 20
    finally:
        (Path("/dev/shm") / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("ivshmem-plain,memdev=x", "only the old device ivshmem is translated"),
        ("virtio-net-pci", "only the old device ivshmem is translated"),
        ("ivshmem,colour=red", "had no property colour"),
        ("ivshmem,shm=a,chardev=b", "shm= or chardev=: give one of them"),
        ("ivshmem,chardev=b", "also give `-chardev socket,path=PATH,id=b`"),
        ("ivshmem,size=x", "is not a size"),
        ("ivshmem,size=0", "allowed is more than 0"),
        ("ivshmem,vectors=many", "not a number of vectors"),
    ],
)
def test_an_old_line_that_never_worked(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        old_device.read(device)


def test_what_is_left_out_is_said() -> None:
    notes = old_device.read("ivshmem,shm=x,ioeventfd=off,use64=0,msi=off,vectors=2,addr=3").notes
    assert len(notes) == 5
    assert all("is omitted" in note for note in notes)


@needs_qemu
def test_an_iommu_is_printed(sockets_of_two: tuple[str, str]) -> None:
    printed = sh(f"{IVSHMEM} qemu -S {sockets_of_two[0]} --iommu").stdout
    assert printed.startswith(cmdline.shell(cmdline.iommu()))
    line = START.replace("-machine q35", "")
    start(f"{line} {printed.strip()}")
    xml = sh(f"{IVSHMEM} qemu -S {sockets_of_two[0]} --iommu --libvirt").stdout
    assert "<iommu model=" in xml
    ElementTree.fromstring(f"<x>{xml}</x>")  # noqa: S314


@needs_qemu
def test_hot_plug_as_documented(sockets_of_two: tuple[str, str]) -> None:
    document = (Path(__file__).parents[2] / "docs/howto/qemu.md").read_text()
    (lines,) = re.findall(r"```json\n(.*?)```", document, re.DOTALL)
    (port,) = re.findall(r"`(-device pcie-root-port[^`]*)`", document)
    orders = [
        '{"execute": "qmp_capabilities"}',
        lines.replace("/run/frames.sock", sockets_of_two[0]),
        '{"execute": "quit"}',
    ]
    line = START.replace("-monitor stdio", "-qmp stdio")
    said = sh(f"{line} {port}", stdin="\n".join(orders)).stdout.splitlines()
    answers = [
        answer for answer in map(json.loads, said) if "return" in answer or "error" in answer
    ]
    assert [answer.get("error") for answer in answers] == [None] * 4  # two stand in the page
