"""Migration of VMs that share memory: a plan, and carrying it out.

    import asyncio
    from ivshmem import migration

    vms = [
        migration.Vm("db", "/run/db.qmp", "/run/db-there.qmp", "tcp:192.0.2.7:4444"),
        migration.Vm("web", "/run/web.qmp", "/run/web-there.qmp", "tcp:192.0.2.7:4445"),
    ]
    plan = asyncio.run(migration.prepare(vms))      # raises MigrationRefused; nothing was touched
    print(*plan.steps, sep="\\n")
    asyncio.run(migration.migrate(plan))

`prepare`, `migrate`, `resume` and `put_back` are coroutines; each stands alone, so that a program
without an event loop runs it as above. They need the library qemu.qmp.
"""

from ..errors import (
    MigrationError,
    MigrationFailed,
    MigrationRefused,
    MigrationUnfinished,
    QmpError,
)
from .inspection import Controls
from .model import FoundPeer, Group, GroupMember, Kind, Options, Plan, Step, StepKind, Vm, VmDevice
from .run import Tell, migrate, prepare, put_back, resume
from .state_file import default_path
from .transfer import TransferProgress, Watch

__all__ = [
    "Controls",
    "FoundPeer",
    "Group",
    "GroupMember",
    "Kind",
    "MigrationError",
    "MigrationFailed",
    "MigrationRefused",
    "MigrationUnfinished",
    "Options",
    "Plan",
    "QmpError",
    "Step",
    "StepKind",
    "Tell",
    "TransferProgress",
    "Vm",
    "VmDevice",
    "Watch",
    "default_path",
    "migrate",
    "prepare",
    "put_back",
    "resume",
]
