"""Internal: Linux in Python. Knows nothing of ivshmem."""
