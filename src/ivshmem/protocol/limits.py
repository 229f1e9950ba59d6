"""Numbers of the protocol, in a small module, so that a command line is parsed quickly."""

from __future__ import annotations

MAX_ID = 65535  # the doorbell register has 16 bits for it
MAX_VECTORS = 2048  # of the device's property `vectors`
