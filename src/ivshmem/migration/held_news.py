"""Keeping a server's news from a QEMU while one of its devices is unplugged.

Knows: which peers of a server are that QEMU's, the control socket's `hold` and `release`.
Does not know: how a device is unplugged.

QEMU 10.0 and newer uses freed memory if any message comes between the moment when the guest lets go
of the device and the device's end, and nobody can see when that begins. So all news are held from
before device_del on. The server does so as long as we are connected, and then as long again as a
guest has to let go (LINGER seconds at least): if this process is killed, or the guest has not let
go yet, it still may.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ..errors import ControlError, StepFailed, UnplugPending
from ..qemu.answers import Answer
from ..qemu.programs import is_qemu
from ..server.limits import LINGER, LONGEST_LINGER
from ..service import control_client
from .model import Step


@contextlib.asynccontextmanager
async def news_held(step: Step, unplug_seconds: float) -> AsyncIterator[None]:
    """While this lasts, the QEMU of an unplug step is told nothing by the step's server.

    UnplugPending says that the guest may still release the device. After it, the server holds the
    news back for `unplug_seconds`, the time that a guest has for it, and for LINGER at least.

    Raises:
        StepFailed: a peer does not read what it was sent before.
        ControlError, OSError: the server cannot be asked.
    """
    if not step.control:
        yield
        return
    client = await asyncio.to_thread(control_client.ControlClient, step.control)
    try:
        peers = await asyncio.to_thread(_hold, client, step, _linger(unplug_seconds))
        try:
            yield
        except UnplugPending:
            raise
        except BaseException:
            await asyncio.to_thread(_release, client, step, peers)
            raise
        await asyncio.to_thread(_release, client, step, peers)
    finally:
        client.close()


def _linger(unplug_seconds: float) -> float:
    """How long a hold outlasts this process: no shorter than the unplug that it protects."""
    return min(max(unplug_seconds, LINGER), LONGEST_LINGER)


def _hold(client: control_client.ControlClient, step: Step, linger: float) -> list[int]:
    reply = Answer(client.ask({"do": "status", "region": step.region}), step.control)
    found = [peer for region in reply.parts("regions") for peer in region.parts("peers")]
    peers = [peer.number("id") for peer in found if _is_its(peer, step.pid)]
    for peer in peers:
        try:
            client.hold(peer, linger=linger, region=step.region)
        except TimeoutError as error:
            raise StepFailed(f"{step.vm}: {step.control}: {error.strerror}") from None
        except ControlError:
            if _is_there(client, step, peer):
                raise
    return peers


def _release(client: control_client.ControlClient, step: Step, peers: list[int]) -> None:
    """Those that are still there: a QEMU can have several devices at one server."""
    for peer in peers:
        # It has left, or the server has ended: then nobody is held.
        with contextlib.suppress(ControlError, OSError):
            client.release(peer, region=step.region)


def _is_its(peer: Answer, pid: int) -> bool:
    """Whether a peer is the QEMU of that process; any QEMU if that is not known."""
    if pid:
        return peer.number("pid") == pid
    return is_qemu(0, peer.text("process")) is not False


def _is_there(client: control_client.ControlClient, step: Step, peer: int) -> bool:
    reply = Answer(client.ask({"do": "status", "region": step.region}), step.control)
    peers = [each for region in reply.parts("regions") for each in region.parts("peers")]
    return any(each.number("id") == peer for each in peers)
