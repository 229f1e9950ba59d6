"""Internal: what a migration asks of servers: hold messages back, evict a peer, free places.

Knows: the control socket's requests for it, which peers of a server are the QEMU of a step.
Does not know: how a device is unplugged, in which order the steps come.

QEMU 10.0 and newer uses freed memory if any message comes between the moment when the guest lets go
of the device and the device's end, and nobody can see when that begins. So the server holds all
messages back, from before device_del on. It does so as long as we are connected, and then for as
long again as a guest has to let go (LINGER seconds at least): if this process is killed, or the
guest has not let go yet, it still may.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ..errors import ControlError, StepFailed, UnplugPending
from ..qemu.programs import is_qemu
from ..server.limits import LINGER, LONGEST_LINGER
from ..service import control_client
from ..system.answers import Answer
from .model import Step

_SECONDS = 10.0  # for an answer of a server, and for a peer to read what it was sent


async def hold_leaves(step: Step, *, on: bool) -> None:
    """Let the step's server hold leaves back from QEMUs, or tell them to QEMUs that join later."""
    message = {"do": "hold-leaves", "on": on, "region": step.region}
    await asyncio.to_thread(control_client.request, step.control, message, _SECONDS)


async def free_places(step: Step) -> None:
    """Let the step's server free all places in channels: their processes were at the source.

    Processes of guests that came along join again, with the ids that they have now.
    """
    message = {"do": "free-places", "region": step.region}
    await asyncio.to_thread(control_client.request, step.control, message, _SECONDS)


async def evict(step: Step) -> None:
    """Let the step's server disconnect a peer, if it is still the same one."""
    await asyncio.to_thread(_evict, step)


@contextlib.asynccontextmanager
async def messages_held(step: Step, unplug_seconds: float) -> AsyncIterator[None]:
    """While the block runs, the step's server sends the QEMU of an unplug step nothing.

    UnplugPending says that the guest may still release the device. After it, the server holds the
    messages back for `unplug_seconds`, the time that a guest has for it, and for LINGER at least.

    Raises:
        StepFailed: a peer does not read what it was sent before.
        ControlError, OSError: the server cannot be asked.
    """
    if not step.control:
        yield
        return
    client = await asyncio.to_thread(control_client.ControlClient, step.control, _SECONDS)
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
    peers = [peer.number("id") for peer in _peers(client, step) if _is_its(peer, step.pid)]
    for peer in peers:
        try:
            client.hold(peer, linger=linger, region=step.region)
        except TimeoutError as error:
            raise StepFailed(f"{step.vm}: {step.control}: {error.strerror}") from None
        except ControlError:
            if any(each.number("id") == peer for each in _peers(client, step)):
                raise
    return peers


def _release(client: control_client.ControlClient, step: Step, peers: list[int]) -> None:
    """Release the peers that are still there: a QEMU can have several devices at one server."""
    for peer in peers:
        # The peer has left, or the server has ended: then nobody is held.
        with contextlib.suppress(ControlError, OSError):
            client.release(peer, region=step.region)


def _is_its(peer: Answer, pid: int) -> bool:
    """Whether a peer is the QEMU with that pid; any QEMU if the pid is 0, not known."""
    if pid:
        return peer.number("pid") == pid
    return is_qemu(0, peer.text("process")) is not False


def _evict(step: Step) -> None:
    assert step.peer is not None
    with control_client.ControlClient(step.control, _SECONDS) as client:
        wanted = (step.peer.id, step.peer.pid)
        if any((each.number("id"), each.number("pid")) == wanted for each in _peers(client, step)):
            client.ask({"do": "evict", "id": step.peer.id, "region": step.region})


def _peers(client: control_client.ControlClient, step: Step) -> list[Answer]:
    """The peers of the step's region."""
    reply = Answer(client.ask({"do": "status", "region": step.region}), step.control)
    return [peer for region in reply.parts("regions") for peer in region.parts("peers")]
