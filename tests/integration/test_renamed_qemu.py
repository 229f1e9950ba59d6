"""A real QEMU whose process has another name is a QEMU to the server, `status` and `migrate`."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.emulator import QEMU, needs_qemu
from support.serving import Running, running
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import control
from ivshmem.cli import status_text
from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.migration.inspection import _Servers, inspect_qemu
from ivshmem.qemu.monitor import Monitor
from ivshmem.service.observability import observable

pytestmark = [pytest.mark.qemu, needs_qemu]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    path = str(tmp_path / "socket")
    region = RegionConfig(path, "64K", hold_leaves=True)
    config = ServiceConfig({"one": region}, control=control.default_path(path))
    with running(config) as here, contextlib.ExitStack() as stack:
        here.call(lambda: stack.enter_context(observable(here.service)))
        yield here
        here.call(stack.close)


@pytest.fixture
def qemu(server: Running, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """It has no devices, but is a peer: a chardev connects by itself."""
    line = [QEMU, "-machine", "none", "-accel", "tcg", "-S", "-display", "none", "-nodefaults"]
    line += ["-name", "x,process=web1", "-chardev", f"socket,id=c,path={tmp_path}/socket"]
    line += ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    with subprocess.Popen(line) as process:
        try:
            until((tmp_path / "qmp").exists, "its monitor")
            until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "web1\n", "its name")
            yield process
        finally:
            process.kill()


def test_to_all(server: Running, qemu: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with ivshmem.connect(tmp_path / "socket", timeout=PATIENCE):
        pass
    path = control.default_path(str(tmp_path / "socket"))

    def peer() -> dict[str, object] | None:
        status = control.request(path, {"do": "status"}, PATIENCE)
        status_text.Guests().name(status)
        (found,) = status["regions"][0]["peers"]
        return found if found["leaves_held"] else None

    found = until(peer, "the server: it holds the leave back from what it takes for a QEMU")
    assert (found["pid"], found["process"], found["guest"]) == (qemu.pid, "web1", "x")

    async def look() -> tuple[int | None, bool]:
        async with Monitor(f"{tmp_path}/qmp") as monitor:
            servers = _Servers([path], local=True)
            await servers.memory(f"{tmp_path}/socket", local=True)
            (peer,) = servers.found[f"{tmp_path}/socket"].peers
            return (await inspect_qemu("vm", monitor, servers, ())).pid, peer.is_qemu

    assert asyncio.run(look()) == (qemu.pid, True)
