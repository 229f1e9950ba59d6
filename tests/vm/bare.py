"""QEMUs without a guest's system, which start in a moment: what concerns QEMU alone needs no more.

Knows: QEMU's options, and how a device can be unplugged where no system lets go of it.
Does not know: what is tested.

With `obliging`, the slot of an empty PCI Express port is without power until a system turns it on.
What is plugged into it by device_add then is let go of at once; a device of the command line,
never. Otherwise a device is let go of at the next reset, once SeaBIOS has numbered the buses. Where
that is not needed, the firmware halts at once: SeaBIOS, emulated, takes longer than all the rest.
"""

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from support.emulator import QEMU

from .host import TIMEOUT
from .machine import main_memory
from .process import spawn
from .qmp import Qmp
from .wire import Deadline, Wire

_ARGS = (
    QEMU,
    *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"),
    *main_memory("32M"),
    *("-machine", "q35"),
    *("-device", "pcie-root-port,id=port0,chassis=1,slot=1"),
)
_HALT = b"\xf4" * (64 << 10)  # HLT at every address, the reset vector's too
_NATIVE = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")


class Bare:
    """A QEMU in `folder`. `monitor` is for the tool that is tested; `qmp` has its own."""

    def __init__(
        self,
        folder: Path,
        name: str,
        args: Sequence[str] = (),
        *,
        waits: bool = False,
        obliging: bool = True,
    ) -> None:
        self.name = name
        self.monitor = folder / f"{name}.qmp"
        self.log = folder / f"{name}.log"
        mine, far = socket.socketpair()
        more = ["-incoming", "defer"] if waits else []
        if obliging:
            firmware = folder / "firmware"
            firmware.write_bytes(_HALT)
            more += [*_NATIVE, "-bios", str(firmware)]
        with far, self.log.open("wb") as output:
            command = [
                *(*_ARGS, *args, *more),
                *("-qmp", f"unix:{self.monitor},server=on,wait=off"),
                *("-chardev", f"socket,id=test,fd={far.fileno()}"),
                *("-mon", "chardev=test,mode=control"),
            ]
            self.process: subprocess.Popen[bytes] = spawn(command, (far.fileno(),), output)
        self._qmp = Qmp(Wire(mine))
        try:
            self.qmp("query-status")
        except BaseException:
            self.close()
            print(self.log.read_text(errors="replace"))
            raise

    def qmp(self, command: str, /, **arguments: Any) -> Any:
        return self._qmp.execute(command, arguments, Deadline(TIMEOUT))

    @property
    def status(self) -> str:
        return str(self.qmp("query-status")["status"])

    @property
    def devices(self) -> list[str]:
        """The ids of its ivshmem devices."""
        entries = self.qmp("qom-list", path="/machine/peripheral")
        return [entry["name"] for entry in entries if "ivshmem" in entry["type"]]

    def plug(self, kind: str, where: str, *, vectors: int = 2, size: int = 1 << 20) -> None:
        """A device that is no master, called shm0, into port0."""
        arguments: dict[str, Any] = {"id": "shm0", "bus": "port0", "driver": f"ivshmem-{kind}"}
        if kind == "plain":
            memory = {"mem-path": where, "size": size, "share": True}
            self.qmp("object-add", **{"qom-type": "memory-backend-file", "id": "m0", **memory})
            arguments["memdev"] = "m0"
        else:
            address = {"type": "unix", "data": {"path": where}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            self.qmp("chardev-add", id="m0", backend=backend)
            arguments |= {"chardev": "m0", "vectors": vectors}
        self.qmp("device_add", **arguments)

    def slow(self) -> None:
        """Its migration takes minutes from now on."""
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 100_000})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._qmp.close()

    def __enter__(self) -> "Bare":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def device(
    kind: str, where: str, options: str = ",master=on", *, vectors: int = 2, size: int = 1 << 20
) -> list[str]:
    """Arguments for a device called shm0 in port0, from the start."""
    if kind == "plain":
        backend = f"memory-backend-file,id=m0,share=on,mem-path={where},size={size}"
        return [
            *("-object", backend),
            *("-device", f"ivshmem-plain,id=shm0,memdev=m0,bus=port0{options}"),
        ]
    return [
        *("-chardev", f"socket,id=m0,path={where}"),
        *("-device", f"ivshmem-doorbell,id=shm0,chardev=m0,vectors={vectors},bus=port0{options}"),
    ]
