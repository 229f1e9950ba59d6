"""Numbers of the table of names. They stand here so that a command line is read at once."""

from __future__ import annotations

MAX_SLOTS = 4095  # of a directory of names
SLOT_BYTES = 128  # of a slot of it, and of the trailer behind the last one, at the region's end
MAGIC = b"IVSHNAME"  # with which that trailer begins
