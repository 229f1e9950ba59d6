"""Shared memory: regions, pages, sizes, images."""
