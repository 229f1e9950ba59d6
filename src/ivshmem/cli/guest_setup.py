"""`ivshmem guest setup`: what a guest needs after each boot: its steps shown, made, and taken back.

Knows: words, and who is asked. Does not know: what the steps are (guest/setup_plan.py).
"""

from __future__ import annotations

import os
import sys

from .. import _core, guest
from ..errors import IvshmemError
from ..guest import setup_plan as plan
from ..guest.choice import choose, full_address
from ..guest.setup_steps import StartUnits
from ..guest.setup_system import SetupRecord, System, alone
from ..text import command, counted, plain
from .run import one_line
from .systemd import hidden_place, own_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..guest.device import Access
    from ..guest.pci import Device
    from ..guest.setup_steps import SetupStep
    from ..guest.setup_undo import Undo

    _Files = dict[str, tuple[bytes, int]]

_PROGRAM = "ivshmem.pyz"


def run(options: argparse.Namespace) -> int:
    """Set a guest up, or take that back."""
    system = System(options.root)
    if not options.dry_run:
        if system.live and os.geteuid() != 0:
            raise PermissionError(
                "only root can set a guest up: run the command as root, or --root"
            )
        if not options.yes and not sys.stdin.isatty():
            raise IvshmemError(
                "nobody can be asked, because standard input is not a terminal: give --yes, or"
                " --dry-run to see the steps"
            )
    with alone(system):
        record = SetupRecord(system)
        if options.undo:
            return _undo(options, record)
        return _setup(options, record)


# -- setting up -----------------------------------------------------------------------------------


def _setup(options: argparse.Namespace, record: SetupRecord) -> int:
    system = record.system
    if system.live and not os.path.isdir("/run/systemd/system"):
        raise IvshmemError("systemd does not run here, and the units and rules need it")
    settings, notes = _settings(options, system)
    planned = plan.steps(system, settings)
    plan.check(record, planned)
    for note in notes:
        print(plain(note))
    undo = command(["ivshmem", "guest", "setup", "--undo", *_rooted(options)])
    asking = not (options.yes or options.dry_run)
    made = 0
    for number, step in enumerate(planned, 1):
        head = f"[{number}/{len(planned)}] {step.title}"
        if step.is_done():
            print(f"{head}: done already")
            continue
        print(head, *(f"    {plain(line)}" for line in step.shown()), sep="\n", flush=True)
        if options.dry_run:
            continue
        if asking and (answer := _answer()) != "y":
            if answer == "q":
                print(f"stopped before step {number}; to take back what was made: {undo}")
                return 1
            asking = False
        try:
            record.add(step.entries())
            step.make()
        except (OSError, IvshmemError) as error:
            raise IvshmemError(_stopped(error, number, made, undo)) from None
        made += 1
        _mark_changed(planned, step)
    if options.dry_run:
        print("nothing was changed")
    else:
        print(f"done; to take it back: {undo}")
        _advise(settings)
    return 0


def _rooted(options: argparse.Namespace) -> list[str]:
    """The option that names another machine's root, for the command that takes all back."""
    return ["--root", os.path.abspath(options.root)] if options.root else []


def _stopped(error: Exception, number: int, made: int, undo: str) -> str:
    return (
        f"{one_line(error)} (step {number} was not made, {counted(made, 'step')} before it"
        f" {'was' if made == 1 else 'were'}: repeat the command, or `{undo}`)"
    )


def _mark_changed(planned: Sequence[SetupStep], made: SetupStep) -> None:
    """What runs from a changed file starts again."""
    if any(kind == "file" for kind, _ in made.stands_for()):
        for step in planned:
            if isinstance(step, StartUnits):
                step.changed = True


def _answer() -> str:
    """One of y (make it), a (make all) and q (stop)."""
    while True:
        print("make it? [y]es, [a]ll, [q]uit: ", end="", flush=True)
        word = sys.stdin.readline()
        if not word:
            print()
            return "q"
        if word.strip().lower()[:1] in ("y", "a", "q", "n"):
            return word.strip().lower()[0].replace("n", "q")


def _advise(settings: plan.Settings) -> None:
    if settings.users:
        print(f"{', '.join(settings.users)}: log in again, to be in the group {settings.group}")
    later = [d for d in settings.devices if not plan.is_usable_now(d, settings.access)]
    if later:
        print(
            f"{later[0].address} has no IOMMU group yet: reboot with an IOMMU, see `ivshmem doctor`"
        )


def _settings(options: argparse.Namespace, system: System) -> tuple[plan.Settings, list[str]]:
    """What the options mean on this machine, and what a user should know about that."""
    devices: list[Device] = []
    addresses = list(dict.fromkeys(map(full_address, options.address)))
    if system.live:
        devices = list(map(choose, addresses)) or guest.devices()
    access: Access | None = options.access
    if access is None:
        if system.live and not devices:
            raise IvshmemError(
                "no ivshmem device in this machine, so the way to open it is unknown: give QEMU the"
                " arguments that `ivshmem qemu` prints on the host, or say --access vfio"
            )
        access = plan.way_of(devices) if devices else "vfio"
    notes = [note] if (note := plan.note_on_access(access)) else []
    serve = not options.no_serve
    if serve and (why := plan.why_not_served(devices, access) if system.live else ""):
        notes.append(f"no unit for `guest serve`: {why}")
        serve = False
    if serve and not addresses and len(devices) > 1:
        listed = ", ".join(device.address for device in devices)
        raise IvshmemError(
            f"there are several ivshmem devices ({listed}): name those to share with --address, or"
            " give --no-serve"
        )
    program, files = _program(system, serve=serve)
    settings = plan.Settings(
        access=access,
        group=options.group,
        users=options.user,
        addresses=addresses,
        devices=devices,
        program=program,
        files=files,
        serve=serve,
        peers=options.peers or "",
    )
    return settings, notes


def _program(system: System, *, serve: bool) -> tuple[list[str], _Files]:
    """The command that the unit runs, and the files of it that are copied before."""
    archive: str | None = getattr(getattr(guest.__spec__, "loader", None), "archive", None)
    if archive is None:
        return (_installed(system) if serve else []), {}
    # What is mounted or lies in /tmp now is gone after the next boot.
    folder = os.path.dirname(str(_core.__file__))
    files: _Files = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".so"):
            with open(os.path.join(folder, name), "rb") as module:
                files[f"modules/{name}"] = module.read(), 0o755
    with open(archive, "rb") as bundle:
        files[_PROGRAM] = bundle.read(), 0o755
    python = sys.executable if system.live else _first(system, "it there", "/usr/bin/python3")
    if serve and system.live:
        _check_place(os.path.realpath(python))
    return [python, f"{plan.LIBRARY}/{_PROGRAM}"], files


def _installed(system: System) -> list[str]:
    """The command of an installed package, which stays where it is."""
    if not system.live:
        others = "it there, run this command from a bundle (ivshmem guest bundle), or --no-serve"
        return [_first(system, others, "/usr/bin/ivshmem", plan.COMMAND)]
    program = own_command()
    for path in (program[0], os.path.realpath(sys.executable)):
        _check_place(path)
    return program


def _first(system: System, what: str, *paths: str) -> str:
    """The first of some programs that a machine has, or an error that says `what` to install."""
    for path in paths:
        if os.path.lexists(system.place(path)):
            return path
    raise IvshmemError(f"{system.root} has no {' and no '.join(paths)}: install {what}")


def _check_place(path: str) -> None:
    if hidden := hidden_place(path):
        raise IvshmemError(
            f"{path}: a service cannot use what is in {hidden}. Use Debian's python3 with a bundle"
            " (ivshmem guest bundle), install ivshmem elsewhere (python3 -m venv /opt/ivshmem), or"
            " give --no-serve"
        )


# -- taking back ----------------------------------------------------------------------------------


def _undo(options: argparse.Namespace, record: SetupRecord) -> int:
    if not record.entries:
        print("nothing is set up here")
        return 0
    undoing = [(undo, title) for undo in plan.undoing(record) if (title := undo.title)]
    print(*_listed(record.system, undoing), sep="\n", flush=True)
    if options.dry_run:
        print("nothing was changed")
        return 0
    if not options.yes and _answer() == "q":
        print("nothing was changed")
        return 1
    kept = []
    for undo, title in undoing:
        try:
            if undo.kept:
                kept.append(undo.kept)
            undo.make()
        except (OSError, IvshmemError) as error:
            raise IvshmemError(
                f"{one_line(error)} (stopped at: {title}; then repeat the command)"
            ) from None
    plan.finish_undo(record)
    for line in kept:
        print(plain(line))
    print("all is taken back")
    return 0


def _listed(system: System, undoing: Sequence[tuple[Undo, str]]) -> list[str]:
    """What is taken back, as a person wants to know it: the copied program is one thing."""
    program = f"{plan.LIBRARY}/"
    lines = [
        f"remove {system.place(plan.LIBRARY)}" if undo.name.startswith(program) else title
        for undo, title in undoing
        if undo.kind != "folder"
    ]
    return list(dict.fromkeys(lines))
