"""Internal: migrating one VM, with the memory of its master device.

Knows: QEMU's migration, its states and habits. Does not know: groups, what comes before and after.

Two QEMUs meet at a socket; or the source writes a file that the destination reads (file:PATH, which
QEMU 7.2 itself does not know: both do it by a shell).

Invariants:
1. `move` may be called again after any interruption: it continues with what is under way.
2. The source runs again only if the destination certainly does not.
3. A status that no version of QEMU had so far is taken for work under way, and is asked for again.
   Where a guest runs is decided by the run states of the two QEMUs, not by such a word.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import AlreadyMigrated, QemuGone, QmpError, StepFailed
from ..qemu.monitor import Monitor
from ..system.answers import Answer
from .model import Options, Step, Vm, is_under_way
from .monitors import Monitors

_LOOK = 0.1  # seconds between two looks at how far QEMU is
_SETTLE = 10.0  # seconds for what QEMU does at once, unless the machine is very busy

_PATIENCE = 5  # passes after which the guest writes faster than we can send, however little remains


@dataclass(frozen=True)
class TransferProgress:
    """How far a VM's migration is, as QEMU counts.

    Attributes:
        transferred, remaining, total: bytes of RAM and of the shared memory; of what the guest
            writes during the migration, some is sent again.
        shared: how many of `total` are the shared memory.
        rate: bytes a second.
        passes: how often the memory was gone through.
    """

    transferred: int
    remaining: int
    total: int
    shared: int
    rate: float
    passes: int


Watch = Callable[[TransferProgress], object]


class Mover:
    """Moves one VM.

    Args:
        watch: told of its progress.
    """

    def __init__(
        self, monitors: Monitors, vm: Vm, step: Step, options: Options, watch: Watch
    ) -> None:
        self._monitors = monitors
        self._vm = vm
        self._step = step
        self._options = options
        self._watch = watch
        self._file = vm.uri.removeprefix("file:") if vm.uri.startswith("file:") else None

    async def move(self) -> None:
        """Until the guest is at the destination.

        Raises:
            StepFailed: it is not; `take_back` sees to it that it runs at the source.
            QmpError, OSError: a QEMU is gone.
        """
        source = await self._monitors.monitor(self._vm.name, "source")
        # In this order: it may complete in between.
        busy = is_under_way(await _status(source))
        left = await _run_state(source) in ("finish-migrate", "postmigrate")
        if not busy and not left:
            await self._start(source)
        await self._follow(source)
        await self._arrive(source)

    async def take_back(self) -> None:
        """Until the guest runs at the source, as it did.

        Raises:
            AlreadyMigrated: it is at the destination.
            StepFailed, QmpError, OSError: it does not.
        """
        source = await self._monitors.monitor(self._vm.name, "source")
        await self._cancel(source)
        end = time.monotonic() + _SETTLE
        while (state := await _run_state(source)) != "running":
            if state == "postmigrate":
                if not await self._never_came():
                    raise AlreadyMigrated(f"{self._vm.name}: it has arrived at the destination")
                await source.execute("cont")
            elif not self._step.running and state in ("paused", "prelaunch"):
                return
            if time.monotonic() > end:
                raise StepFailed(
                    f"{self._vm.name}: unexpected state {state} at the source: examine that QEMU"
                )
            await asyncio.sleep(_LOOK)

    # -- there ------------------------------------------------------------------------------------

    async def _start(self, source: Monitor) -> None:
        destination = await self._monitors.monitor(self._vm.name, "destination")
        state = await _run_state(destination)
        if state != "inmigrate":
            raise StepFailed(
                f"{self._vm.name}: its destination is not waiting (it is in state {state}): start"
                " it with -incoming defer"
            )
        # Without a return path the source says "completed" though the destination has refused; a
        # file has none.
        wanted = {
            "return-path": self._file is None,
            "postcopy-ram": self._options.postcopy,
            "multifd": self._options.multifd,
        }
        settings = [{"capability": name, "state": on} for name, on in wanted.items()]
        await source.execute("migrate-set-capabilities", capabilities=settings)
        # It listens already if an interrupted run has told it.
        there = await _migration(destination)
        listens = bool(there.parts("socket-address"))
        status = there.text("status", "")
        if not listens and status not in ("", "none"):
            # QEMU 11 stays so if postcopy fails before the guest runs there. It takes no other.
            raise StepFailed(
                f"{self._vm.name}: its destination is left over from a failed migration (status"
                f" {status}): end that QEMU, and start it again with -incoming defer"
            )
        if not listens:
            await destination.execute("migrate-set-capabilities", capabilities=settings)
            if self._file is None:
                await destination.execute("migrate-incoming", uri=self._vm.uri)
        await source.execute("migrate", uri=self._vm.uri if self._file is None else self._writer)

    async def _follow(self, source: Monitor) -> None:
        """Until the source has sent all."""
        postcopied = False
        while True:
            migration = await _migration(source)
            status, ram = migration.text("status", ""), migration.part("ram")
            if "ram" in migration:
                self._watch(_progress(ram, self._step.size))
            if status == "completed":
                return
            if status == "postcopy-paused":
                raise StepFailed(
                    f"{self._vm.name}: the connection was lost during postcopy, and the guest"
                    " waits at the destination for the rest of its memory: reconnect the two"
                    " QEMUs (migrate-recover at the destination, migrate with resume at the"
                    " source); if the destination has ended, the guest is lost"
                )
            if not is_under_way(status):
                where = "it could not write" if self._file else "the log of the destination's QEMU"
                reason = migration.text("error-desc", "") or f"see {where}"
                raise StepFailed(
                    f"{self._vm.name}: its migration {status or 'never began'}: {reason}"
                )
            if self._options.postcopy and not postcopied and status == "active":
                postcopied = _does_not_end(_progress(ram, self._step.size))
                if postcopied:
                    await source.execute("migrate-start-postcopy")
            await asyncio.sleep(_LOOK)

    async def _arrive(self, source: Monitor) -> None:
        """Wait until the guest runs at the destination, and the source knows that."""
        destination = await self._monitors.monitor(self._vm.name, "destination")
        if self._file is not None:
            await self._read(destination)
        end = time.monotonic() + _SETTLE
        # No event tells of the one, nor of the other.
        while not (
            await _status(destination) == "completed"
            and await _run_state(destination) != "inmigrate"
            and await _run_state(source) != "finish-migrate"
        ):
            if time.monotonic() > end:
                raise StepFailed(
                    f"{self._vm.name}: its destination has all the memory, and the guest does not"
                    " start there"
                )
            await asyncio.sleep(_LOOK)

    # -- through a file ---------------------------------------------------------------------------

    @property
    def _writer(self) -> str:
        """The source's end. The name appears with the whole file, which only its owner may read."""
        path = shlex.quote(self._file or "")
        return f"exec:umask 077; rm -f {path}; cat >{path}.part && mv {path}.part {path}"

    @property
    def _reader(self) -> str:
        """The destination's; the source's shell may take a moment more than its QEMU."""
        path = shlex.quote(self._file or "")
        wait = f"i=0; until [ -e {path} ] || [ $i = 100 ]; do sleep 0.1; i=$((i+1)); done"
        return f"exec:{wait}; cat {path} && rm -f {path}"

    async def _read(self, destination: Monitor) -> None:
        try:
            if await _status(destination) in ("", "none"):
                await self._ask_to_read(destination)
            while (status := await _status(destination)) != "completed":
                # QEMU 7.2 has no status yet while the shell waits for the file.
                if status not in ("", "none") and not is_under_way(status):
                    raise QemuGone("")  # in a moment
                await asyncio.sleep(_LOOK)
        except QemuGone:
            raise StepFailed(
                f"{self._vm.name}: its destination refused what is in {self._file}: its QEMU's log"
                " says why"
            ) from None

    async def _ask_to_read(self, destination: Monitor) -> None:
        try:
            await destination.execute("migrate-incoming", uri=self._reader)
        except QemuGone:
            raise
        except QmpError as error:
            if "already" not in str(error):  # by an interrupted run, and its shell still waits
                raise

    # -- and back ---------------------------------------------------------------------------------

    async def _cancel(self, source: Monitor) -> None:
        """Until no migration is under way.

        In postcopy it cannot be cancelled once the destination runs. Before that (QEMU 10.2 says
        "postcopy-device": it still loads the devices' state) the source resumes by itself if the
        destination fails; which of the two it will be is not known yet.
        """
        end = time.monotonic() + _SETTLE
        while is_under_way(status := await _status(source)):
            postcopy = status.startswith("postcopy")
            if postcopy and await self._runs_there(status):
                raise AlreadyMigrated(
                    f"{self._vm.name}: it runs at the destination already (postcopy)", wholly=False
                )
            if not postcopy and status != "cancelling":
                await _try_to_cancel(source)
            if time.monotonic() > end:
                where = ", and it is not known where the guest will run" if postcopy else ""
                raise StepFailed(
                    f"{self._vm.name}: QEMU does not end its migration (status {status}){where}:"
                    " examine that QEMU"
                )
            await asyncio.sleep(_LOOK)

    async def _runs_there(self, status: str) -> bool:
        """Whether the guest has begun to run at the destination, as far as this can be known."""
        try:
            destination = await self._monitors.monitor(self._vm.name, "destination")
            return await _run_state(destination) != "inmigrate"
        except (QmpError, OSError):
            # It cannot be asked. These states say that its guest had run there.
            return status in ("postcopy-active", "postcopy-paused") or "recover" in status

    async def _never_came(self) -> bool:
        """Whether a guest that has left the source is certainly not at the destination.

        It is if there was a return path. Otherwise it may be that the destination was never told,
        or has ended, which is known only of a QEMU on this machine.

        Raises:
            StepFailed: that cannot be known.
        """
        if self._file is None:
            return False
        end = time.monotonic() + _SETTLE
        while time.monotonic() < end:
            try:
                async with Monitor(self._vm.destination, self._vm.name) as destination:
                    status = await _status(destination)
                    if status in ("", "none", "completed"):
                        return status != "completed"
            except (FileNotFoundError, ConnectionRefusedError):
                if self._step.local:
                    return True
            except QmpError:
                pass  # it is just ending
            await asyncio.sleep(_LOOK)
        raise StepFailed(
            f"{self._vm.name}: it is not known whether the guest runs at the destination: check"
            " that; only if it does not, resume it at the source (cont)"
        )


async def _migration(monitor: Monitor) -> Answer:
    return await monitor.execute("query-migrate")


async def _status(monitor: Monitor) -> str:
    """How far its migration is, in one word; "" if there was none."""
    return (await _migration(monitor)).text("status", "")


async def _run_state(monitor: Monitor) -> str:
    return (await monitor.execute("query-status")).text("status")


async def _try_to_cancel(source: Monitor) -> None:
    """Ask QEMU to end its migration; it may refuse if that has just ended, or goes another way."""
    try:
        await source.execute("migrate_cancel")
    except QemuGone:
        raise
    except QmpError as error:
        if not error.kind:
            raise


def _does_not_end(progress: TransferProgress) -> bool:
    """Whether the passes over the memory do not come to an end, so that postcopy is needed.

    Not if what remains takes less than a second. QEMU 11.1 may fail if it is told to begin with
    postcopy in the moment in which it is almost done (by then the guest continues at the source).
    """
    little = progress.remaining <= progress.rate or not progress.rate
    return progress.passes > (_PATIENCE if little else 1)


def _progress(ram: Answer, shared: int) -> TransferProgress:
    return TransferProgress(
        transferred=ram.number("transferred", 0),
        remaining=ram.number("remaining", 0),
        total=ram.number("total", 0),
        shared=shared,
        rate=ram.real("mbps", 0.0) * 1e6 / 8,
        passes=ram.number("dirty-sync-count", 0),
    )
