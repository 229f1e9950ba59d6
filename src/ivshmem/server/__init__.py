"""Internal: a server of one region."""
