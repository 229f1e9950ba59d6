"""Internal: several regions, and everything around a running server."""
