"""Numbers of the protocol. They stand here so that a command line is read at once."""

from __future__ import annotations

MAX_ID = 65535  # the doorbell register has 16 bits for it
MAX_VECTORS = 2048  # of the device's property `vectors`
