"""Numbers of the table of names, in a small module, so that a command line is parsed quickly."""

from __future__ import annotations

MAX_SLOTS = 4095  # of a directory of names
SLOT_BYTES = 128  # of one slot, and of the trailer after the last slot, at the region's end
AREA_START = 8192  # the first byte of a region that can be set aside for channels, at a
AREA_PAGE = 4096  # multiple of this
LEAST_AREA = 16384  # bytes: the smallest tables, and one unit of data
MAGIC = b"IVSHNAME"  # the first bytes of that trailer
