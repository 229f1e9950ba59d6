"""Several regions, and everything around a running server."""
