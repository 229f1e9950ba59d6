"""Internal: version 0 of ivshmem's protocol, without I/O."""
