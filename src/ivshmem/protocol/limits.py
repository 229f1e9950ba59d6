"""Numbers and words that options and settings are checked against.

Knows: what is allowed. Does not know: why; the modules that give these values their meaning say it.
They stand here so that a command line can be read without importing those modules.
"""

from __future__ import annotations

MAX_ID = 65535  # the doorbell register has 16 bits for it
MAX_VECTORS = 2048  # of the device's property `vectors`
LINGER = 60.0  # seconds that a peer's news are held after the one who asked for that is gone
LONGEST_LINGER = 1e6  # seconds that a hold may be asked for
MAX_SLOTS = 4095  # of a directory of names
SLOT_BYTES = 128  # of a slot of it, and of the trailer behind the last one, at the region's end
MAGIC = b"IVSHNAME"  # with which that trailer begins

DEFAULT_SIZE = "4M"
EXISTING = ("attach", "grow", "refuse", "replace", "require")
LOG_FORMATS = ("text", "json")
