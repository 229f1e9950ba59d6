"""What outlives a process. Knows nothing of peers."""
