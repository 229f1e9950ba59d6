"""Numbers of the table of names, in a small module, so that a command line is parsed quickly."""

from __future__ import annotations

MAX_SLOTS = 4095  # of a directory of names
SLOT_BYTES = 128  # of one slot, and of the trailer after the last slot, at the region's end
MAGIC = b"IVSHNAME"  # the first bytes of that trailer
