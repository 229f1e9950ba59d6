"""What sharing needs, checked one by one, on the host or inside a guest; and what fixes it.

    examine_guest()   the ivshmem devices of this virtual machine, down to an interrupt to oneself
    examine_host()    QEMU, the server's socket, the memory, limits
    is_guest()        which of the two fits here

Nothing is printed, and nothing is changed for longer than a check takes. (Kernel modules that
opening a device loads stay loaded, as after any use of it.)
"""

from .check import Check, State
from .guest import examine as examine_guest
from .host import default_qemu
from .host import examine as examine_host
from .side import is_guest
from .wishes import Wishes

__all__ = [
    "Check",
    "State",
    "Wishes",
    "default_qemu",
    "examine_guest",
    "examine_host",
    "is_guest",
]
