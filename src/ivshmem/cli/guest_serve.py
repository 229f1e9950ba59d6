"""`ivshmem guest serve`: the device in a virtual machine, shared with other processes there."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from functools import partial

from .. import guest
from ..errors import IvshmemError, NoInterrupts
from ..guest import pci
from ..guest.device import RESOURCE
from ..memory.sizes import format_size
from ..peer import default_paths
from ..system import systemd
from ..system.listener import Listener
from ..text import counted
from . import daemon, pid_file, signals
from .log_writer import LogWriter, tell_peer
from .run import fail, guarded, one_line
from .writing import show


def run(options: argparse.Namespace) -> int:
    """Share the device, in the foreground or as a daemon; return the exit status."""
    work = partial(_run_broker, options)
    if options.daemon:
        return daemon.in_background(partial(guarded, work), silent=True)
    return work(lambda: None)


def _run_broker(options: argparse.Namespace, ready: daemon.TellReady) -> int:
    """Share the device until a signal says to end, and give it back."""
    with systemd.Notifier.from_environment() as notifier:
        begun = False

        def begin(status: str) -> None:
            nonlocal begun
            begun = True
            notifier.ready(status)
            ready()

        try:
            return _share(options, begin)
        except (IvshmemError, OSError, ValueError) as error:
            if begun or not notifier.active:
                raise
            # The manager hears why, and by the exit status, that another try is of no use.
            notifier.status(one_line(error))
            fail(error)
            return systemd.EXIT_FIRST_START


def _listener(options: argparse.Namespace) -> Listener:
    """The socket that the service manager passed, or a new one."""
    passed = systemd.listen_fds()
    if len(passed) > 1:
        raise ValueError(f"the service manager passed {len(passed)} sockets: one device needs one")
    for _, fd in passed:
        return Listener.adopt(fd)
    return Listener(options.socket or default_paths.default_socket())


def _share(options: argparse.Namespace, begin: Callable[[str], object]) -> int:
    with (
        signals.held(for_good=True),
        pid_file.held(options.pid_file),
        LogWriter(sys.stderr, logging.INFO),
        _listener(options) as listener,
        _open_to_share(options) as device,
        guest.Broker(
            device,
            listener,
            peers=options.peers,
            on_join=None if options.quiet else partial(tell_peer, "joined"),
            on_leave=None if options.quiet else partial(tell_peer, "left"),
        ) as broker,
    ):
        text = _banner(broker, device)
        show(text)
        begin(text.partition(", pid")[0])
        with signals.calling(broker.stop):
            broker.serve_forever()
    return 0


def _open_to_share(options: argparse.Namespace) -> guest.GuestDevice:
    """The device with its memory in a file, to hand on, and heard, if it is not a plain one."""
    if mode := pci.locked_down():
        raise OSError(
            errno.EPERM,
            f"the kernel is locked down ({mode}): it does not give out the memory's file, which"
            " clients need. One process can still use the device, with vfio",
        )
    device = guest.open(options.address, access=options.access, memory=options.memory or RESOURCE)
    if device.device.variant == "doorbell":
        try:
            device.fileno()
        except NoInterrupts:
            device.close()
            raise
    return device


def _banner(broker: guest.Broker, device: guest.GuestDevice) -> str:
    whom = (
        ", ".join(map(str, broker.remote))
        or "no peer yet (give --peers, or serve with a directory of names)"
    )
    return (
        f"sharing {device.device.address}, id {device.id}, {format_size(device.region.size)},"
        f" {counted(device.vectors, 'vector')}, on {broker.path}, pid {os.getpid()}\n"
        f"  clients can ring: {whom}"
    )
