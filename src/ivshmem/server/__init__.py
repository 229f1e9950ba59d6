"""A server of one region."""
