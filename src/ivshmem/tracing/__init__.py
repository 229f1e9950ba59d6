"""Internal: who is rung, and when, in a file for Perfetto: what `ivshmem trace` does."""
