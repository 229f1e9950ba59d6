"""Channels: messages, queues, values, calls and bytes between the peers of a region.

Their layout and protocol are those of `ivshmem_channel.h`, which a program in C can use alone.
"""

from __future__ import annotations

import os

__all__ = ["get_include"]


def get_include() -> str:
    """Return the folder of `ivshmem_channel.h`, for a compiler's option `-I`.

    The header is for programs in C or C++ that are one end of a channel.
    """
    return os.path.dirname(__file__)
