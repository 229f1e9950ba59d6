"""Internal: what outlives a process. Knows nothing of peers."""
