"""What the ends use of records.pyx."""

from .header cimport ivshmem_record

cdef dict facts_of(ivshmem_record *record)
