"""Internal: which machine this is: its kernel, and where a PID and a start time mean something.

Knows: what makes two processes of one machine able to prove each other's end. Does not know:
places.
"""

from __future__ import annotations

import hashlib
import os


def machine() -> int:
    """Return 40 bits that two processes have in common if one can prove the other's end.

    That is, if they run on one kernel (boot id) and see the same numbers of processes (PID
    namespace) and the same times of start (time namespace). 0: it cannot be found out, and then
    nothing is proven.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read()
        spaces = [os.stat("/proc/self/ns/pid").st_ino]
        if os.path.exists("/proc/self/ns/time"):
            spaces.append(os.stat("/proc/self/ns/time").st_ino)
    except OSError:
        return 0
    digest = hashlib.blake2b(boot + repr(spaces).encode(), digest_size=5).digest()
    return int.from_bytes(digest, "little") or 1
