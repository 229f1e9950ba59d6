"""Numbers and words that options and settings are checked against.

Knows: what is allowed. Does not know: why; the modules that give these values their meaning say it.
They stand here so that a command line can be read without importing those modules.
"""

from __future__ import annotations

MAX_ID = 65535  # the doorbell register has 16 bits for it
MAX_VECTORS = 2048  # of the device's property `vectors`
MAX_SLOTS = 4095  # of a directory of names

DEFAULT_SIZE = "4M"
EXISTING = ("attach", "grow", "refuse", "replace", "require")
LOG_FORMATS = ("text", "json")
