"""Internal: shared memory: regions, pages, sizes, images."""
